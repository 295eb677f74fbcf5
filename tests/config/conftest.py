"""Shared by the tests of configuration files: a checkpoint's JSON files for the file that reads its sizes from them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from visor_jax.config import architecture, load_config
from visor_jax.hf.config import write_config
from visor_jax.hf.preprocessor import write_preprocessor

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function: size ("0p5b", ...) -> folder with the JSON files of such a checkpoint, without weights."""
    root = tmp_path_factory.mktemp("hub")

    def make(size: str) -> Path:
        folder = root / size
        if not folder.exists():
            folder.mkdir()
            arch = dataclasses.replace(architecture(load_config(CONFIGS / f"llava_ov_{size}.py")), plan="dense")
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
        return folder

    return make


@pytest.fixture
def shipped(hub_folder: Callable[[str], Path]) -> Callable[[Path], str]:
    """Returns a function: file in configs/ -> what follows `--config=`, with an argument where the file needs one."""
    return lambda file: f"{file}:{hub_folder('0p5b')}" if file.name == "llava_ov_finetune.py" else str(file)
