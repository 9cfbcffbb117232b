#!/bin/bash
# Turn a corpus into shards on one node, with all its CPUs; interrupted, it goes on from the last finished shard.
#
#   sbatch slurm/prepare_data.sh INPUT... --tokenizer TOKENIZER --output DIR [more of tools/prepare_data.py]
#SBATCH --job-name=bd3lm-data
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

ROOT=${BD3LM_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
. "$ROOT/slurm/lib.sh"

if ! in_batch_job; then
  export BD3LM_ROOT=$ROOT
  unset SBATCH_GPUS_PER_NODE
  exec sbatch "$0" "$@"
fi
exec "$PYTHON" "$ROOT/tools/prepare_data.py" --workers "${SLURM_CPUS_ON_NODE:-1}" "$@"
