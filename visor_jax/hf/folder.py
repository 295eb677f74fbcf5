"""Reads the shape of a model from a checkpoint folder's JSON files; opens no tensors. No JAX import.

In: a folder in Hugging Face's format. Out: its `config.json` and `Architecture`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path
from visor_jax.hf.config import MERGE, architecture_of
from visor_jax.hf.hub import hint
from visor_jax.hf.preprocessor import read_preprocessor
from visor_jax.hf.section import read_object

log = logging.getLogger(__name__)

OURS = ("configuration_visor.", "modeling_visor.", "processing_visor.")  # modules in `auto_map` of our exports


def read_shape(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], Architecture]:
    """Returns the object in `config.json` and the architecture that it and the image processor's file describe.

    Raises:
      RequestError: the folder or a file is missing or damaged, or the kind of model is not supported.
    """
    place: Path = as_path(folder)
    if not place.is_dir():
        raise RequestError(f"{place}: no such folder; expected one in Hugging Face's format{hint(place)}")
    if not (place / "config.json").exists() and (place / "adapter_config.json").exists():
        raise RequestError(f"{place}: a PEFT adapter, without the model; {MERGE}")
    config = read_object(place / "config.json")
    for field in code_fields(config):
        log.warning("%s: %s is ignored: code that a model's folder names is not run", place / "config.json", field)
    return config, architecture_of(config, read_preprocessor(place), place)


def code_fields(config: Mapping[str, Any]) -> list[str]:
    """Returns the fields of a `config.json` that would make transformers load code, except those of our exports."""
    named = config.get("auto_map")
    modules = named.values() if isinstance(named, dict) else [named]
    foreign = "auto_map" in config and not all(isinstance(name, str) and name.startswith(OURS) for name in modules)
    other = [
        name for name in ("_attn_implementation_internal", "trust_remote_code", "custom_pipelines") if name in config
    ]
    return ["auto_map"] * foreign + other


def pinpoints_text(arch: Architecture) -> str:
    """Returns the value of `model.anyres.pinpoints`: the grids in the checkpoint's order, "(1x1),(1x2),..."."""
    tile = arch.vision.tile_size
    return ",".join(f"({height // tile}x{width // tile})" for height, width in arch.anyres.pinpoints)
