"""Hugging Face folders (our exports or published checkpoints) where a native checkpoint is expected."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.manifest import MANIFEST
from bd3lm_scale.checkpoint.write import write_weights

_IMPORT_ONLY = "mask_token_id="


def is_hf_folder(source: str | Path) -> bool:
    """Whether a folder is a Hugging Face one rather than a run or a checkpoint of ours."""
    folder = Path(source)
    return (folder / "config.json").is_file() and not (folder / MANIFEST).exists()


@contextmanager
def native_checkpoint(source: str | Path, overrides: Sequence[str] = ()) -> Iterator[tuple[Path, list[str]]]:
    """(path for load_model, overrides for it): the source itself, or a temporary native copy of a Hugging Face folder.

    Args:
        source: run folder, checkpoint folder or Hugging Face folder.
        overrides: `a.b=c`; `mask_token_id=N` is for Hugging Face folders that do not say it.
    """
    if not is_hf_folder(source):
        yield Path(source), list(overrides)
        return
    own = [text for text in overrides if text.startswith(_IMPORT_ONLY)]
    weights, meta = import_hf(source, own)
    with tempfile.TemporaryDirectory(prefix="bd3lm_scale_") as folder:
        yield write_weights(Path(folder) / "imported", weights, meta), [t for t in overrides if t not in own]
