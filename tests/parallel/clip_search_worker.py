"""Run under torchrun: a session that trains, validates, searches the clip interval, saves and resumes; and probes.

    torchrun --nproc-per-node N tests/parallel/clip_search_worker.py OUTPUT_DIR

OUTPUT_DIR/data: prepared shards. OUTPUT_DIR/cases.json: {"name": {"search": ["a.b=c", ...] or null, "probe": RUN or
null, "layout": [...]}, ...}. For each case, OUTPUT_DIR/name.json gets what was chosen and measured.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from bd3lm_scale.config.checks import check
from bd3lm_scale.config.load import load_config
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.evaluation.variance import measure_variance
from bd3lm_scale.inference.loading import load_model
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.parallel.mesh import Mesh, init_mesh, new_host_group, shutdown
from bd3lm_scale.training.step import train_step
from bd3lm_scale.training.trainer import Session, open_session
from bd3lm_scale.validation import validate
from tests.parallel.worker import ROOT, TINY

ROWS = 48


def agreement_of(mesh: Mesh) -> Agreement:
    return Agreement(mesh.rank, mesh.world_size, new_host_group())


def train_steps(session: Session, count: int) -> list[dict]:
    reports = []
    for _ in range(count):
        outcome = train_step(session.engine, session.config, session.step, session.read().noised, session.policy)
        session.advance()
        reports.append(dataclasses.asdict(outcome.report))
    return reports


def search(name: str, overrides: list[str], output: Path, world: int) -> dict:
    """Two validations, the second of which searches; a save and a resume."""
    run = [f"run_dir={output / name}", f"data.path={output / 'data'}", "data.workers=0", f"evaluation.rows={ROWS}"]
    run += [
        "diffusion.clip_search.every_validations=2",
        "diffusion.clip_low=0",
        "diffusion.clip_high=1",
        "optim.lr=0.01",
        "train.threads=1",
    ]
    config = load_config(ROOT / "configs" / "demo.yaml", [*TINY, *run, *overrides])
    stream, held_out = (open_stream(config.data, config.seed, split) for split in ("train", "validation"))
    check(config, world, stream.vocab_size)
    mesh = init_mesh(config.parallel, "cpu", 60)
    session = open_session(config, mesh, stream, agreement_of(mesh))
    tables, intervals = [], []
    for _ in range(2):
        train_steps(session, 2)
        table = session.search_clip_interval(validate(session.engine, config, held_out, rows=ROWS, use_ema=True))
        tables.append({f"{low:g}-{high:g}": loss.variance for (low, high), loss in table.items()})
        intervals.append(session.clip_interval)
    after = train_steps(session, 1)
    session.save()
    session.close()
    parallel_state.destroy_model_parallel()
    mesh = init_mesh(config.parallel, "cpu", 60)
    resumed = open_session(config, mesh, stream, agreement_of(mesh))
    found = {
        "resumed_interval": resumed.clip_interval,
        "resumed_validations": resumed.validations,
        "step": resumed.step,
    }
    resumed.close()
    parallel_state.destroy_model_parallel()
    return {"tables": tables, "intervals": intervals, "after": after, **found}


def probe(run: str, layout: list[str], output: Path) -> dict:
    """The variance report of a run that another world trained."""
    loaded = load_model(output / run, ["runtime.device=cpu", *layout])
    stream = open_stream(loaded.config.data, loaded.config.seed, "validation")
    validation = validate(loaded.engine, loaded.config, stream, rows=ROWS)
    report = measure_variance(loaded.engine, loaded.config, stream, validation, (0.3, 0.8), rows=7, draws=3)
    parallel_state.destroy_model_parallel()
    return report.as_dict()


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for name, case in json.loads((output / "cases.json").read_text()).items():
        record = {}
        if case["search"] is not None:
            record["search"] = search(name, [*case["search"], *case["layout"]], output, world)
        if case["probe"]:
            record["probe"] = probe(case["probe"], case["layout"], output)
        if int(os.environ.get("RANK", "0")) == 0:
            (output / f"{name}.json").write_text(json.dumps(record))
    shutdown()


if __name__ == "__main__":
    main()
