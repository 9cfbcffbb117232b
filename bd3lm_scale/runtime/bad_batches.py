"""Keeping the batch that a bad step was made of, to look at it or to feed it again."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.values import Rows

log = get_logger(__name__)


def dump_batch(
    run_dir: str | Path, step: int, data_rank: int, rows: Sequence[Rows], seed: int, data_offset: int, reason: str
) -> Path:
    """Write one data-parallel rank's rows of a step to run_dir/bad_batches/step_00000012_rank_00003.npz.

    Times and masks need not be kept: they follow from seed, step and position. `data_offset` says which rows of the
    stream these were.
    """
    folder = Path(run_dir) / "bad_batches"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}_rank_{data_rank:05d}.npz"
    documents = [part.document_BL.cpu().numpy() for part in rows if part.document_BL is not None]
    np.savez_compressed(
        path,
        document=np.concatenate(documents) if documents else np.zeros((0, 0), np.int64),
        tokens=np.concatenate([part.tokens_BL.cpu().numpy() for part in rows]),
        position=np.concatenate([part.position_B.cpu().numpy() for part in rows]),
        is_real=np.concatenate([part.is_real_B.cpu().numpy() for part in rows]),
        step=step,
        seed=seed,
        data_offset=data_offset,
        reason=reason,
    )
    log.warning("step %d (%s): batch kept in %s", step, reason, path)
    return path
