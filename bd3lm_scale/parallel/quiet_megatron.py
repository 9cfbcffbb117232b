"""Import this before anything of Megatron: its first import warns of libraries that are off here on purpose.

Nothing is left behind: the filter is gone when the import is over.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine)")
    import megatron.core.models.backends  # noqa: F401
