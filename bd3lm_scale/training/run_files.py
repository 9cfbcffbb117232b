"""What a run folder keeps beside its checkpoints: the resolved configuration and the tokenizer (rank 0)."""

import filecmp
import os
import shutil
from pathlib import Path

from bd3lm_scale.config.load import to_yaml
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.runtime.durable import copy_folder, make_folder, write_file
from bd3lm_scale.runtime.log import get_logger

log = get_logger(__name__)

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"


def write_run_files(config: RunConfig, stream: RowStream) -> None:
    """Write config.yaml, and the tokenizer unless the one that is there is the data's, whole.

    Nothing is written where nothing changed. A full disk is no reason to end a run: the next start tries again.
    """
    folder = make_folder(Path(config.run_dir))
    text, path = to_yaml(config), folder / CONFIG_FILE
    try:
        if not path.is_file() or path.read_bytes() != text.encode():
            write_file(path, text)
        kept = folder / TOKENIZER_FOLDER
        if not is_tokenizer_of(kept, stream):
            if os.path.lexists(kept):
                log.warning("%s is damaged, or not the tokenizer of the data: replaced", kept)
            copy_folder(Path(stream.tokenizer_path), kept)
        shutil.rmtree(folder / ".tokenizer", ignore_errors=True)  # left half-copied by an older version
    except OSError as error:
        log.warning("the run folder's configuration and tokenizer cannot be written: %s", error)


def is_tokenizer_of(folder: Path, stream: RowStream) -> bool:
    """Whether `folder` holds the tokenizer that the data was made with: the same files, or the same identity."""
    source = Path(stream.tokenizer_path)
    names = sorted(path.name for path in source.iterdir())
    if folder.is_dir() and sorted(path.name for path in folder.iterdir()) == names:
        filecmp.clear_cache()  # it believes in sizes and times
        if not any(filecmp.cmpfiles(source, folder, names, shallow=False)[1:]):
            return True
    try:
        kept = load_tokenizer(folder)
        return (kept.hash, kept.chat_template) == (stream.tokenizer_hash, load_tokenizer(source).chat_template)
    except Exception:  # whatever a damaged file makes of a parser
        return False
