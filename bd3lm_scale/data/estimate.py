"""What a preparation would give, from a sample of the corpus."""

import itertools
import time
from dataclasses import dataclass, replace

from bd3lm_scale.data.shards import token_dtype
from bd3lm_scale.data.tokenizing import (
    Preparation,
    cut_units,
    file_size,
    load_tokenizer_for,
    must_stay_whole,
    tokenize,
)

_SAMPLED_FILES = 16
_UNITS_PER_FILE = 2


@dataclass(frozen=True)
class Estimate:
    """Figures of the whole corpus; all but files and input_bytes are extrapolated."""

    files: int
    input_bytes: int
    documents: int
    text_bytes: int
    tokens: int
    bytes_per_token: float
    shards: int
    output_bytes: int
    minutes: float


def estimate(task: Preparation, tokenizer_path: str, workers: int) -> Estimate:
    """Tokenize the beginnings of some files and scale up by file size (ValueError when they hold no text)."""
    tokenizer = load_tokenizer_for(task, tokenizer_path)
    whole = must_stay_whole(task, tokenizer)
    sizes = [file_size(path) or 0 for path in task.files]
    step = -(-len(sizes) // _SAMPLED_FILES)
    documents = text_bytes = tokens = read = 0
    seconds = 0.0
    for file in range(0, len(sizes), step):
        first = replace(task, inputs=(task.files[file],), validation_inputs=())
        last_read = 0
        for unit in itertools.islice(cut_units(first, whole=whole), _UNITS_PER_FILE):
            started_at = time.perf_counter()
            result = tokenize(unit, task, tokenizer)
            seconds += time.perf_counter() - started_at
            documents += int(result.starts.sum())
            text_bytes += int(result.text_bytes.sum())
            tokens += len(result.ids)
            last_read = unit.bytes_read
        read += last_read
    if not tokens:
        raise ValueError(f"no text in the beginnings of {len(task.files)} input files")
    scale = max(1.0, sum(sizes) / read) if read else 1.0
    itemsize = {"uint8": 1, "uint16": 2, "uint32": 4}[token_dtype(tokenizer.vocab_size)]
    return Estimate(
        files=len(sizes),
        input_bytes=sum(sizes),
        documents=round(documents * scale),
        text_bytes=round(text_bytes * scale),
        tokens=round(tokens * scale),
        bytes_per_token=text_bytes / tokens,
        shards=-(-round(tokens * scale) // task.shard_tokens),
        output_bytes=round(tokens * scale * itemsize),
        minutes=seconds * scale / workers / 60,
    )
