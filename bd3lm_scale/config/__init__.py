"""The configuration of a run: `load_config` gives a checked, frozen `RunConfig` or raises a `ConfigError`."""

from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.errors import ConfigError

__all__ = ["ConfigError", "RunConfig", "load_config"]
