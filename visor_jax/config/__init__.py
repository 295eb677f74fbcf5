"""Configurations: reads a `get_config()` file and overrides, checks them, and returns a frozen `Config`.

`schema.py` declares every field in frozen dataclasses, `checks.py` checks rules that span fields, `config_file.py`
reads files, and `resolve.py` validates and serializes. No JAX import. The rest of the package imports these names from
here.
"""

from visor_jax.config.config_file import config_from_file, is_workdir
from visor_jax.config.resolve import (
    ConfigLike,
    apply_overrides,
    architecture,
    as_config,
    default_config,
    default_max_positions,
    from_dict,
    from_json,
    load_config,
    stage_config,
    to_json,
    tokenizer_file,
    unknown_field,
    validate,
)
from visor_jax.config.schema import Config
from visor_jax.config.train_fields import TrainConfig

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
