"""Configurations: from a `get_config()` file, overrides and the schema to a checked `ConfigDict`, and back to JSON.

`schema.py` states every field; `checks.py` what must fit together; `resolve.py` reads, checks and resolves. No JAX
import. What the rest of the package uses is imported from here.
"""

from visor_jax.config.resolve import (
    apply_overrides,
    architecture,
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

__all__ = [
    "apply_overrides",
    "architecture",
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
