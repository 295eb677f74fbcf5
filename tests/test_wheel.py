"""The wheel that users install: it holds the package's data files, and shipped configurations are found by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from visor_jax.config.config_file import shipped_configs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this checkout; pip would leave `build/` and `*.egg-info` in the checkout itself."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("visor_jax", "visor_jax_data", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([sys.executable, *build, str(folder / "source")], check=True, timeout=300)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    package = ROOT / "visor_jax"
    files = [file for file in package.rglob("*") if file.is_file()] + list((package / "configs").glob("*.py"))
    expected = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if "__pycache__" not in file.parts and not file.name.startswith(".")
    }
    assert len(expected) > 200
    assert sorted(expected - set(zipfile.ZipFile(wheel).namelist())) == []


def test_an_installed_wheel_finds_shipped_configurations_by_name(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "visor_jax", "plan", "--config=llava_ov_7b", "--image=1700x2200", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"tiles"' in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llava_ov_0p5", "did you mean 'llava_ov_0p5b'"), ("nothing_like_it", "the shipped ones are ")],
)
def test_an_unknown_name_is_refused(name: str, expected: str) -> None:
    from visor_jax.config import load_config
    from visor_jax.errors import RequestError

    with pytest.raises(RequestError, match=f"--config={name}: neither a file nor .*{expected}"):
        load_config(name)


def test_shipped_configurations_are_those_of_the_folder_configs() -> None:
    assert sorted(shipped_configs()) == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
