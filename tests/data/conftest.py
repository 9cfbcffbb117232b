"""A tokenizer that takes a tenth of a second to train, shared by the tests of the data package."""

from pathlib import Path

import pytest

from bd3lm_scale.data.train_sentencepiece import train_sentencepiece

TEXT = "def square(x):\n    return x * x\n\nfor i in range(10):\n    print(square(i), 'is the square of', i)\n"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_sentencepiece([TEXT] * 20, tmp_path_factory.mktemp("tokenizer"), vocab_size=320)
