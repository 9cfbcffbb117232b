"""Which checkpoints a run may go on from, and which it may start from."""

from bd3lm_scale.checkpoint.names import Architecture, shape_problems, table
from bd3lm_scale.checkpoint.reader import CheckpointReader
from bd3lm_scale.config.resume import resume_differences
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.runtime.log import get_logger

log = get_logger(__name__)


def refuse_differences(reader: CheckpointReader, config: RunConfig, stream: RowStream, fresh: bool) -> None:
    """ConfigError where `fresh` forbids any checkpoint, or this one was trained with other settings or data."""
    if fresh:
        raise ConfigError(
            [f"run_dir ({config.run_dir}): holds {reader.path.name}; use another run_dir, or drop --fresh"]
        )
    found = resume_differences(reader.meta["config"], config)
    if reader.meta.get("tokenizer_hash") != stream.tokenizer_hash:
        found.append(
            f"data.path ({config.data.path}): its tokenizer is not the one {reader.path.name} was trained with; "
            "use the same shards, or another run_dir"
        )
    elif reader.meta.get("data_hash", stream.data_hash) != stream.data_hash:
        found.append(
            f"data.path ({config.data.path}): its shards are not those {reader.path.name} was trained with; "
            "use the same shards (a copy of them elsewhere will do), or another run_dir"
        )
    if found:
        raise ConfigError(found, source=f"resuming {reader.path}")


def refuse_other_model(reader: CheckpointReader, config: RunConfig, stream: RowStream) -> None:
    """ConfigError where the checkpoint's parameters or vocabulary are not those of the model that would start there."""
    wanted = {entry.ours: entry.our_shape for entry in table(Architecture.of(config, stream.vocab_size))}
    found = shape_problems(wanted, {name: reader.shape(name) for name in reader.names()})
    for name, here in (("vocab_size", stream.vocab_size), ("mask_token_id", stream.mask_token_id)):
        if reader.meta.get(name, here) != here:
            found.append(f"{name} is {reader.meta[name]}, the data's tokenizer has {here}")
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(
            [
                f"train.init_from ({config.train.init_from}): {reader.path.name} is of another model "
                f"({'; '.join(found[:3])}{more}); use its model.*, diffusion.objective family and tokenizer"
            ]
        )
    if reader.meta.get("tokenizer_hash", stream.tokenizer_hash) != stream.tokenizer_hash:
        log.warning("%s was trained with another tokenizer than the one of %s", reader.path, config.data.path)
