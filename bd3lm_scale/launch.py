"""Start a run's ranks, watch them, and start them again: `python -m bd3lm_scale.launch -- train CONFIG [a.b=c ...]`.

One restart loop for a single machine, for several (launcher/machines.py) and for Slurm, where this is the job's batch
process (slurm/train_owt.sh). Three levels, each limited by launcher.policy.Limits:

    ranks died or hang      end the rest, start again from the last checkpoint
    a node is lost          go on with the nodes that answer, as far as the layout allows
    too few nodes left, preemption, time limit     save if there is time, requeue, resume
"""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from bd3lm_scale.config.checks import check
from bd3lm_scale.config.environment import number_from_environment
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.summary import summary
from bd3lm_scale.launcher.local import LocalRanks, Ranks
from bd3lm_scale.launcher.loop import Launcher, Plan
from bd3lm_scale.launcher.machines import Follower, LeadingRanks
from bd3lm_scale.launcher.policy import Limits, choose_nodes
from bd3lm_scale.launcher.slurm import SlurmRanks
from bd3lm_scale.runtime.command_line import Parser, parse_train_arguments
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import RunLock
from bd3lm_scale.runtime.log import set_up_logging


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; everything after `--` is the program and its arguments."""
    parser = Parser("python -m bd3lm_scale.launch", "Start, watch and restart a run.")
    parser.add_argument("--nproc-per-node", type=int, default=0, help="ranks per node; default: its GPUs, else 1")
    parser.add_argument("--nnodes", type=int, default=0, help="machines, without Slurm (with --check: also there)")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is; 0 leads")
    parser.add_argument("--master-addr", default="127.0.0.1", help="where the others reach machine 0")
    parser.add_argument("--min-nodes", type=int, default=1, help="go on with as few nodes as this")
    parser.add_argument("--max-nodes", type=int, default=None, help="train on at most so many; the others are spares")
    parser.add_argument("--max-failures", type=int, default=3, help="in a row without a new checkpoint")
    parser.add_argument("--max-requeues", type=int, default=10, help="in a row without a new checkpoint")
    parser.add_argument("--backoff-seconds", type=float, default=5.0)
    parser.add_argument("--stop-seconds", type=float, default=240.0, help="time for the last checkpoint")
    parser.add_argument("--srun-args", default="", help="more options for srun, as one string")
    parser.add_argument("--python", default=sys.executable, help="interpreter (or wrapper command) of the ranks")
    parser.add_argument("--no-requeue", action="store_true", help="under Slurm: stop instead, exit code 85")
    parser.add_argument("--check", action="store_true", help="check the configuration, say what it means, and exit")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="-- train CONFIG [a.b=c ...]")
    options = parser.parse_args(arguments)
    if options.program[:1] == ["--"]:
        options.program = options.program[1:]
    if len(options.program) < 2:
        parser.error("say what to start: -- train CONFIG [a.b=c ...]")
    return options


def ranks_per_node(options: argparse.Namespace) -> int:
    """--nproc-per-node, else the GPUs that Slurm gave this node, else 1."""
    return options.nproc_per_node or number_from_environment("SLURM_GPUS_ON_NODE") or 1


def interpreter(text: str) -> list[str]:
    """The words of --python: a program, whose path may hold spaces, or a command quoted as in a shell."""
    return [text] if shutil.which(text) else shlex.split(text)


def main(arguments: list[str] | None = None) -> int:
    """Check, then supervise."""
    options = parse_arguments(arguments)
    module, *words = options.program
    train = parse_train_arguments(words)
    under_slurm = bool(os.environ.get("SLURM_JOB_ID")) and os.environ.get("ENVIRONMENT") == "BATCH"
    try:
        per_node = ranks_per_node(options)
        nodes = options.nnodes or (under_slurm and number_from_environment("SLURM_JOB_NUM_NODES")) or 1
        config = load_config(train.config, train.overrides)
        # the job may hold more nodes than the layout can use, as after a requeue with other nodes
        parallel = config.parallel
        replica = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        used = choose_nodes([""] * nodes, per_node, replica, options.min_nodes, options.max_nodes)
        check(config, world_size=(len(used) or nodes) * per_node)
        python, srun_args = interpreter(options.python), shlex.split(options.srun_args)
    except ValueError as error:  # a ConfigError is one; so is a quote without its end
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    if options.check:
        print(summary(config, nodes * per_node))
        return ExitCode.FINISHED
    set_up_logging(None, rank=0)
    run_dir = Path(config.run_dir)
    plan = Plan(
        run_dir=run_dir,
        config=config,
        program=[*python, "-m", module if "." in module else f"bd3lm_scale.{module}"],
        arguments=words,
        ranks_per_node=per_node,
        min_nodes=options.min_nodes,
        max_nodes=options.max_nodes,
        stop_seconds=options.stop_seconds,
        goes_back_to=train.checkpoint,
        limits=Limits(options.max_failures, options.max_requeues, options.backoff_seconds),
    )
    if not under_slurm and options.node_rank:
        return Follower(run_dir, options.node_rank, per_node, [*plan.program, *plan.arguments]).run()
    lock = RunLock(run_dir)
    ranks: Ranks = LocalRanks(per_node)
    if under_slurm:
        ranks = SlurmRanks(per_node, run_dir / "runtime", options.min_nodes, srun_args, not options.no_requeue)
    elif options.nnodes > 1:
        ranks = LeadingRanks(lock, options.nnodes, per_node, options.master_addr)
    return Launcher(plan, ranks, lock).run()


if __name__ == "__main__":
    sys.exit(main())
