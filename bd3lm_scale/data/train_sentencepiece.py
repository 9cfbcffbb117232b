"""SentencePiece models that lose nothing: decode(encode(text)) == text for every text."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from bd3lm_scale.data.shards import write_file
from bd3lm_scale.data.tokenizer import MASK_PIECE

_MAX_PIECE_BYTES = 4096


def train_sentencepiece(
    texts: Iterable[str],
    output: str | Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    max_bytes: int = 100_000_000,
    seed: int = 1,
) -> Path:
    """Train a model on the first `max_bytes` of `texts` and write OUTPUT/tokenizer.model.

    Text is taken as it is: no normalization, every space and newline kept, unknown characters spelled in bytes.
    Pad, unknown, BOS, EOS and mask are ids 0 to 4, the newline is 5. The same texts and options give the same
    file. ValueError when the texts are too few for `vocab_size`.
    """
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, max_bytes),
            model_writer=written,  # a model_prefix would be stored in the model: equal trainings would differ
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9999,
            user_defined_symbols=["\n"],
            control_symbols=[MASK_PIECE],
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            max_sentence_length=_MAX_PIECE_BYTES * 4,
            # more threads would change the order of additions in the unigram trainer
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as problem:
        reason = str(problem).strip().splitlines()[-1] if str(problem).strip() else "empty text"
        raise ValueError(
            f"tokenizer: cannot train {vocab_size} pieces on this text ({reason}); give more text or a smaller "
            "--vocab-size"
        ) from problem
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    model = output / "tokenizer.model"
    write_file(model, written.getvalue())
    return model


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines without their newline, which is a symbol of its own; very long ones in pieces."""
    used = 0
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_PIECE_BYTES):
                yield line[start : start + _MAX_PIECE_BYTES].replace("\0", "")
        used += len(text.encode("utf-8", "replace"))
        if used >= max_bytes:
            return
