"""What is chosen by name and can be added to: noise schedules and samplers. Adding one is a file and a line here.

The configuration allows exactly these names. The object behind a name is imported when it is first used, so reading
a configuration needs neither torch nor any of them. docs/method.md has the recipe.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class SamplerEntry:
    """A line of SAMPLERS.

    Attributes:
        address: module:object, a `Sampler` (diffusion/samplers/sampler.py).
        objectives: whose models it samples from.
    """

    address: str
    objectives: tuple[str, ...]


_SAMPLERS, _STANDARD = "bd3lm_scale.diffusion.samplers", "bd3lm_scale.diffusion.schedules.standard"

SCHEDULES = {
    "loglinear": f"{_STANDARD}:LOGLINEAR",
    "cosine": f"{_STANDARD}:COSINE",
    "square": f"{_STANDARD}:SQUARE",
    "square_root": f"{_STANDARD}:SQUARE_ROOT",
    "log": f"{_STANDARD}:LOG",
}
"""diffusion.schedule: module:object of each, a `Schedule` (diffusion/schedule.py)."""

SAMPLERS = {
    "first_hitting": SamplerEntry(f"{_SAMPLERS}.first_hitting:SAMPLER", ("bd3lm", "mdlm")),
    "ancestral": SamplerEntry(f"{_SAMPLERS}.ancestral:SAMPLER", ("bd3lm", "mdlm")),
    "confidence": SamplerEntry(f"{_SAMPLERS}.parallel:CONFIDENCE", ("bd3lm", "mdlm")),
    "entropy": SamplerEntry(f"{_SAMPLERS}.parallel:ENTROPY", ("bd3lm", "mdlm")),
    "ar": SamplerEntry(f"{_SAMPLERS}.autoregressive:sample_ar", ("ar",)),
    "analytic": SamplerEntry(f"{_SAMPLERS}.analytic:sample_sedd", ("sedd",)),
    "simplex": SamplerEntry(f"{_SAMPLERS}.simplex:sample_simplex", ("bd3lm",)),
}
"""sampling.sampler; of those that fit an objective the first is what `auto` means."""


def samplers_for(objective: str) -> tuple[str, ...]:
    """Names of the samplers that fit an objective, the default first."""
    return tuple(name for name, entry in SAMPLERS.items() if objective in entry.objectives)


def resolve(address: str, kind: type | None = None) -> Any:
    """The object at "module:object".

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    module, _, name = address.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{address}: {error}; correct its line in diffusion/registry.py") from error
    if kind is not None and not isinstance(found, kind):
        raise ValueError(f"{address}: is a {type(found).__name__}, not a {kind.__name__}; correct the module")
    return found
