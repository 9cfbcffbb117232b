# What the scripts of this folder share. ROOT, the repository, is set by the script that reads this file.
# Site-specific lines are in cluster.env; restarts are in bd3lm_scale/launch.py.
set -euo pipefail

# shellcheck source=slurm/cluster.env
. "${CLUSTER_ENV:-$ROOT/slurm/cluster.env}"
# sbatch passes the environment on; these belong to a distributed run of the shell it was called in
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
[ -n "${SBATCH_GPUS_PER_NODE:-}" ] || unset SBATCH_GPUS_PER_NODE # empty: a site without GPUs

in_batch_job() { [ "${ENVIRONMENT:-}" = BATCH ] && [ -n "${SLURM_JOB_ID:-}" ]; }

# ranks_per_node: from cluster.env; else the GPUs per node that Slurm gave (job) or will give (login node); else 1
ranks_per_node() {
  local gpus
  if in_batch_job; then gpus=${SLURM_GPUS_ON_NODE:-1}; else gpus=${SBATCH_GPUS_PER_NODE:-1}; fi
  echo "${RANKS_PER_NODE:-${gpus##*:}}" # "h100:8" is 8
}

# nodes_asked SCRIPT [--nodes=N ...]: what sbatch will ask for; the smaller number of a range
nodes_asked() {
  local nodes word
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$1")
  shift
  for word in "$@"; do
    case $word in --nodes=*) nodes=${word#--nodes=} ;; -N*) nodes=${word#-N} ;; esac
  done
  echo "${nodes%%-*}"
}

# snapshot CONFIG: copy code and configuration once per job; a requeued job goes on with the same. Prints the folder.
snapshot() {
  local folder=$ROOT/runs/snapshots/$SLURM_JOB_ID
  if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! -d "$folder" ]; then
    rm -rf "$folder" "$folder.new"
    mkdir -p "$folder.new"
    cp -rp "$ROOT/bd3lm_scale" "$ROOT/slurm" "$folder.new/" # -p: compiled files stay valid
    cp "$1" "$folder.new/config.yaml"
    mv "$folder.new" "$folder"
  fi
  echo "$folder"
}

# train SCRIPT DEFAULT_CONFIG [--sbatch-option=...] [CONFIG] [a.b=c ...]
train() {
  local script=$1 config=$2 options=() launch
  shift 2
  while [[ ${1:-} == -* && ${1:-} != --fresh ]]; do options+=("$1"); shift; done
  case ${1:-} in *.yaml | *.yml) config=$1; shift ;; esac
  [ -f "$config" ] || { echo "$config: no such file; give a configuration, as configs/demo.yaml" >&2; exit 86; }
  launch=("$PYTHON" -m bd3lm_scale.launch --nproc-per-node "$(ranks_per_node)")
  if in_batch_job; then
    local copy
    copy=$(snapshot "$config")
    # PYTHONSAFEPATH: without it Python prefers the package in the current folder to the snapshot
    export PYTHONPATH=$copy${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    launch+=("--python=$RANK_PYTHON" "--srun-args=$SRUN_ARGS" --min-nodes "$MIN_NODES")
    launch+=(--max-failures "$MAX_FAILURES" --stop-seconds "$STOP_SECONDS" ${MAX_NODES:+--max-nodes "$MAX_NODES"})
    [ "$REQUEUE" = yes ] || launch+=(--no-requeue)
    exec "${launch[@]}" -- train "$copy/config.yaml" "$@" # exec: Slurm signals the batch process
  fi
  PYTHONPATH=$ROOT "${launch[@]}" --check --nnodes "$(nodes_asked "$script" "${options[@]}")" -- train "$config" "$@" || exit
  export BD3LM_ROOT=$ROOT
  exec sbatch "${options[@]}" "$script" "$config" "$@"
}
