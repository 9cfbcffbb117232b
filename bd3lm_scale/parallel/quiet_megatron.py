"""Import this before anything of Megatron: its first import warns of libraries that are off here on purpose.

It would also import wandb, a tenth of the time that a rank needs to start, for its inference engine alone. Nothing is
left behind: the filter and the hidden module are as before when the import is over.
"""

import sys
import warnings
from typing import Any

_modules: dict[str, Any] = sys.modules
_is_hidden = "wandb" not in _modules
if _is_hidden:
    _modules["wandb"] = None  # to import it is an ImportError, as where it is not installed
try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine)")
        import megatron.core.models.backends  # noqa: F401
finally:
    if _is_hidden:
        del _modules["wandb"]
