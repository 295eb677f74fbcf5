"""The wheel that goes to the machines: built from a checkout, or packed again from an installation."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launching.golden_files import CASES, ROOT
from visor_jax.errors import RequestError
from visor_jax.launching import wheel
from visor_jax.launching.steps import Runner

NEEDED = (
    *("visor_jax/launching/templates/tpu_start.sh", "visor_jax/configs/llava_ov_finetune.py", "visor_jax/py.typed"),
    *("visor_jax/report/templates/page.html.j2", "visor_jax/export/torch_model/modeling_visor.py"),
)


def content(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_a_wheel_is_built_and_packed_again_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: nothing is left in the repository, and pip installs the second wheel."""
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in ROOT.iterdir()}
    built = wheel.build(Runner("first"))
    assert {path.name for path in ROOT.iterdir()} == before
    files = content(built)
    assert files.keys() >= set(NEEDED) and not [name for name in files if name.startswith("tests/")]

    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, f"--target={tmp_path / 'site'}", str(built)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    pack = [sys.executable, "-P", "-m", "visor_jax.launching.wheel", "again"]
    subprocess.run(pack, check=True, env=environment, cwd=tmp_path)
    again = content(tmp_path / "again" / wheel.FILE)
    assert again.keys() == files.keys()
    assert [name for name in files if again[name] != files[name] and not name.endswith("/RECORD")] == []
    subprocess.run([*pip, f"--target={tmp_path / 'third'}", str(tmp_path / "again" / wheel.FILE)], check=True)
    assert (tmp_path / "third/visor_jax/launching/templates/tpu_start.sh").exists()
    for target in ("tpu", "gke", "slurm", "sky"):
        check_dry_run(target, environment, tmp_path)


def check_dry_run(target: str, environment: dict[str, str], folder: Path) -> None:
    """Shows that an installed wheel is enough to launch a shipped configuration: no checkout, no client."""
    fields = next(fields for fields in CASES.values() if fields["target"] == target)
    given = ("name", "topology", "zone", "workdir", "image", "cluster")
    flags = [f"--{name.replace('_', '-')}={fields[name]}" for name in given if name in fields]
    command = [sys.executable, "-P", "-m", "visor_jax", "launch", f"--target={target}", *flags, "--config=almanac_mini"]
    done = subprocess.run(
        [*command, "--force", "--dry-run"],
        capture_output=True, text=True, env={**environment, "PATH": str(folder)}, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and fields["name"] in done.stdout, done.stderr
    assert "visor_jax.launching.wheel" in done.stdout or target not in ("tpu", "sky"), "no checkout is used"


def test_an_installation_without_a_list_of_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.metadata, "files", lambda name: None)
    with pytest.raises(RequestError, match="its installation lists no files"):
        wheel.pack(tmp_path)
