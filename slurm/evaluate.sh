#!/bin/bash
# Validation perplexity of a run or checkpoint, on all GPUs of the nodes asked for.
#
#   sbatch slurm/evaluate.sh RUN_OR_CHECKPOINT [--data SHARDS] [a.b=c ...]
#
# After a training job:  sbatch --dependency=afterok:JOB slurm/evaluate.sh runs/owt
#SBATCH --job-name=bd3lm-evaluate
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

ROOT=${BD3LM_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
. "$ROOT/slurm/lib.sh"

[ -e "${1:-}" ] || { echo "usage: sbatch slurm/evaluate.sh RUN_OR_CHECKPOINT [a.b=c ...]; '${1:-}' does not exist" >&2; exit 86; }
if ! in_batch_job; then
  export BD3LM_ROOT=$ROOT
  exec sbatch "$0" "$@"
fi
# shellcheck disable=SC2086  # these are lists of words
exec srun --ntasks-per-node="$(ranks_per_node)" --kill-on-bad-exit=1 $SRUN_ARGS $RANK_PYTHON -m bd3lm_scale.evaluate "$@"
