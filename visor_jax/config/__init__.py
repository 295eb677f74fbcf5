"""Configurations: from a `get_config()` file, overrides and the schema to a checked `Config`, and back to JSON.

`schema.py` states every field, as frozen dataclasses; `checks.py` what must fit together; `resolve.py` reads, checks
and resolves. No JAX import. What the rest of the package uses is imported from here.
"""

from visor_jax.config.resolve import (
    ConfigLike,
    apply_overrides,
    architecture,
    as_config,
    config_from_file,
    default_config,
    default_max_positions,
    from_dict,
    from_json,
    is_workdir,
    load_config,
    stage_config,
    to_json,
    tokenizer_file,
    unknown_field,
    validate,
)
from visor_jax.config.schema import Config, TrainConfig

__all__ = [
    "Config",
    "ConfigLike",
    "TrainConfig",
    "apply_overrides",
    "architecture",
    "as_config",
    "config_from_file",
    "default_config",
    "default_max_positions",
    "from_dict",
    "from_json",
    "is_workdir",
    "load_config",
    "stage_config",
    "to_json",
    "tokenizer_file",
    "unknown_field",
    "validate",
]
