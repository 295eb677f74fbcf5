"""A checkpoint's folder as a model hub has it, without weights: what commands read that only need its sizes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from visor_jax.architecture import Architecture
from visor_jax.hf.config import write_config
from visor_jax.hf.preprocessor import write_preprocessor


def write_dense_shape(folder: Path, arch: Architecture) -> None:
    """Writes the JSON files of a dense LLaVA-OneVision with the sizes of `arch` into a new folder."""
    arch = dataclasses.replace(arch, plan="dense")
    folder.mkdir()
    told = write_config(
        arch,
        image_token_id=151_646,
        system=None,
        viable_budgets=[],
        has_policy=False,
        stage="base",
        dtype="bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "preprocessor_config.json").write_text(json.dumps(write_preprocessor(arch)))
