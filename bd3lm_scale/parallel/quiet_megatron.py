"""Import this before anything of Megatron: its first import warns of libraries that are off here on purpose.

It would also import wandb, a tenth of the time that a rank needs to start, for its inference engine alone.
Megatron-core from 0.17 on imports torch's compiler of extensions, which reports where CUDA's is although nothing is
to be compiled.
Nothing is left behind: filter, level and the hidden module are as before when the import is over.
"""

import logging
import sys
import warnings
from typing import Any

_modules: dict[str, Any] = sys.modules
_extensions = logging.getLogger("torch.utils.cpp_extension")
_level = _extensions.level
_is_hidden = "wandb" not in _modules
if _is_hidden:
    _modules["wandb"] = None  # to import it is an ImportError, as where it is not installed
_extensions.setLevel(logging.ERROR)
try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine)")
        import megatron.core.models.backends  # noqa: F401
finally:
    _extensions.setLevel(_level)
    if _is_hidden:
        del _modules["wandb"]
