"""Import this before anything of Megatron: its first import warns of libraries that are off here on purpose.

Megatron-core from 0.17 on also imports torch's compiler of extensions, which reports where CUDA's is although nothing
is to be compiled. Nothing is left behind: filter and level are as before when the import is over.
"""

import logging
import warnings

_extensions = logging.getLogger("torch.utils.cpp_extension")
_level = _extensions.level
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine)")
    _extensions.setLevel(logging.ERROR)
    try:
        import megatron.core.models.backends  # noqa: F401
    finally:
        _extensions.setLevel(_level)
