#!/bin/bash
# Train on OpenWebText, for weeks if need be: requeued at the time limit, restarted after failures, resumed exactly.
#
#   bash slurm/train_owt.sh [--nodes=N ...] [CONFIG] [a.b=c ...]    checks the configuration here, then submits
#   sbatch [--nodes=N ...] slurm/train_owt.sh [CONFIG] [a.b=c ...]  the job checks it first
#
# Site-specific lines: slurm/cluster.env. What happens at each failure: docs/fault_tolerance.md.
#SBATCH --job-name=bd3lm-owt
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@360
# USR1 comes 300-360 s before the time limit (Slurm is up to a minute off): time for STOP_SECONDS of cluster.env.
# No --no-kill and no --ntasks-per-node here: see docs/slurm.md.

# Slurm runs a copy of this file from its spool folder: the repository is where sbatch was called, or BD3LM_ROOT
ROOT=${BD3LM_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
code=$ROOT
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || code=$ROOT/runs/snapshots/$SLURM_JOB_ID # requeued: go on with the same code
[ -f "$code/slurm/lib.sh" ] || { echo "no slurm/lib.sh in $code: submit from the repository or set BD3LM_ROOT" >&2; exit 86; }
. "$code/slurm/lib.sh"

train "$0" "$ROOT/configs/owt_110m_pretrain.yaml" "$@"
