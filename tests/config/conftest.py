"""Shared by the tests of configuration files: a checkpoint's JSON files for the file that reads its sizes from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from visor_jax.config import architecture, load_config
from visor_jax.testing.hub import write_dense_shape

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function: size ("0p5b", ...) -> folder with the JSON files of such a checkpoint, without weights."""
    root = tmp_path_factory.mktemp("hub")

    def make(size: str) -> Path:
        folder = root / size
        if not folder.exists():
            write_dense_shape(folder, architecture(load_config(CONFIGS / f"llava_ov_{size}.py")))
        return folder

    return make


@pytest.fixture
def shipped(hub_folder: Callable[[str], Path]) -> Callable[[Path], str]:
    """Returns a function: file in configs/ -> what follows `--config=`, with an argument where the file needs one."""
    return lambda file: f"{file}:{hub_folder('0p5b')}" if file.name == "llava_ov_finetune.py" else str(file)
