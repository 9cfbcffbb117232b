"""A small prepared corpus, for tests that run real training."""

import random
from pathlib import Path

from bd3lm_scale.data.documents import Options
from bd3lm_scale.data.prepare import Preparation, prepare
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece

_NOUNS = ["cat", "dog", "bird", "fish", "tree", "house", "river", "stone", "cloud", "road", "lamp", "book"]
_VERBS = ["sees", "finds", "likes", "follows", "leaves", "hears"]


def write_corpus(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """One document per paragraph: short sentences that a tiny model can learn something from."""
    chance = random.Random(seed)
    texts = []
    for _ in range(documents):
        noun = chance.choice(_NOUNS)
        other = [chance.choice(_NOUNS) for _ in range(4)]
        texts.append(" ".join(f"The {noun} {chance.choice(_VERBS)} the {thing}." for thing in other))
    path.write_text("\n\n".join(texts) + "\n")
    return path


def prepare_tiny(folder: Path, vocab_size: int = 300, seed: int = 0) -> Path:
    """Tokenizer and shards of such a corpus; the folder is a data.path."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(folder / "corpus.txt", seed=seed)
    train_sentencepiece([corpus.read_text()], folder / "trained", vocab_size=vocab_size)
    task = Preparation(
        inputs=(str(corpus),),
        validation_fraction=0.2,
        options=Options(document="paragraph"),
        shard_tokens=1 << 12,
        chunk_tokens=1 << 10,
    )
    prepare(task, str(folder / "trained"), folder / "data", workers=0)
    return folder / "data"
