"""Reads the shape of a model from a checkpoint folder's JSON files; opens no tensors. No JAX import.

In: a folder in Hugging Face's format. Out: its `config.json` and `Architecture`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path
from visor_jax.hf.config import MERGE, architecture_of
from visor_jax.hf.hub import hint
from visor_jax.hf.preprocessor import read_preprocessor
from visor_jax.hf.section import read_object


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
    return config, architecture_of(config, read_preprocessor(place), place)


def pinpoints_text(arch: Architecture) -> str:
    """Returns the value of `model.anyres.pinpoints`: the grids in the checkpoint's order, "(1x1),(1x2),..."."""
    tile = arch.vision.tile_size
    return ",".join(f"({height // tile}x{width // tile})" for height, width in arch.anyres.pinpoints)
