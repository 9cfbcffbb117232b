"""Numbers that torchrun, srun and Slurm put into the environment."""

import os

from bd3lm_scale.errors import ConfigError


def number_from_environment(*names: str) -> int | None:
    """The first of these variables that is set and not empty, as a number; None when there is none.

    Raises:
        ConfigError: it is no number, naming the variable.
    """
    for name in names:
        text = os.environ.get(name, "").strip()
        if text and not (text.isascii() and text.isdigit()):
            raise ConfigError(
                [f"{name} ({text!r}): not a number; unset it, or start with torchrun or srun"], "environment"
            )
        if text:
            return int(text)
    return None
