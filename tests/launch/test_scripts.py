"""The launch scripts, run with a fake Python that only records its arguments: no network, no installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARALLEL = ["-n", str(min(len(os.sched_getaffinity(0)), 4)), "--dist=loadfile"]

# Replaces the system's Python and, copied by its `-m venv`, the environment's. FAKE_* set its abilities.
FAKE_PYTHON = r"""#!/bin/bash
printf '%s\n' "$(basename "$0"): $*" >>"$FAKE_LOG"
case "$*" in
  *sys.exit*) exit "${FAKE_WRONG_VERSION:-0}" ;;
  *'import ensurepip'*) exit "${FAKE_NO_ENSUREPIP:-0}" ;;
  *'python%d.%d-venv'*) echo python3.11-venv ;;
  '-m venv '*) folder="${@: -1}"; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
  '-m pip --version') [ "$(basename "$0")" = python ] || exit "${FAKE_NO_PIP:-0}" ;;
  '-m pip '*' install '*) exit "${FAKE_INSTALL_STATUS:-0}" ;;
  *'-m visor_jax'*)
    printf '%s\n' "JAX_PLATFORMS=$JAX_PLATFORMS" "${@}" >"$FAKE_LOG.visor"
    exit "${FAKE_VISOR_STATUS:-0}" ;;
  *'-m ruff check'*) exit "${FAKE_RUFF_STATUS:-0}" ;;
  *'-m pytest'*)
    printf '%s\n' "JAX_PLATFORMS=$JAX_PLATFORMS" "${@:3}" >"$FAKE_LOG.pytest"
    exit "${FAKE_PYTEST_STATUS:-0}" ;;
esac
"""


class Clone:
    """A folder with the launch scripts and the files that they read, and a PATH whose only Python is the fake one."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.log = folder / "a clone", folder / "bin", folder / "log"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in ("bash", "basename", "cat", "cp", "dirname", "flock", "mkdir", "nproc", "rm", "sha256sum"):
            actual = shutil.which(tool)
            assert actual is not None
            (self.bin / tool).symlink_to(actual)
        self.log.touch()
        self.add_python("python3.11")

    def add_python(self, name: str) -> None:
        (self.bin / name).write_text(FAKE_PYTHON)
        (self.bin / name).chmod(0o755)

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **fake: str
    ) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        return subprocess.run(
            [str(self.bin / "bash"), str(self.root / script), *arguments],
            env={"PATH": str(self.bin), "FAKE_LOG": str(self.log), **fake},
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
        )

    def calls(self, word: str) -> list[str]:
        """Returns the command lines of the fake Pythons that contain `word`."""
        return [line for line in self.log.read_text().splitlines() if word in line]

    def got(self, program: str) -> list[str]:
        """Returns the platform and the arguments with which a program was run."""
        return Path(f"{self.log}.{program}").read_text().splitlines()


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_quickstart_installs_and_runs_on_the_cpu(clone):
    done = clone.run("launch/quickstart.sh", JAX_PLATFORMS="cuda")
    assert done.returncode == 0, done.stderr
    assert len(clone.calls("--requirement")) == 1
    assert len(clone.calls("--editable")) == 1
    config, workdir = clone.root / "configs" / "almanac_mini.py", clone.root / "runs" / "almanac_mini"
    assert clone.got("visor") == [
        "JAX_PLATFORMS=cpu", "-P", "-m", "visor_jax", "run", f"--config={config}", f"--workdir={workdir}",
    ]  # fmt: skip


def test_the_workdir_is_the_caller_s_and_options_pass(clone, tmp_path):
    done = clone.run("launch/quickstart.sh", "my run", "--config.seed=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert clone.got("visor")[-2:] == ["--workdir=my run", "--config.seed=3"]


@pytest.mark.parametrize("arguments", [["a", "b"], [""]])
def test_quickstart_refuses_more_than_one_workdir(clone, arguments):
    done = clone.run("launch/quickstart.sh", *arguments)
    assert done.returncode == 2
    assert "usage: launch/quickstart.sh" in done.stderr
    assert not clone.calls("install")


def test_the_status_of_the_run_is_the_script_s(clone):
    assert clone.run("launch/quickstart.sh", FAKE_VISOR_STATUS="143").returncode == 143


def test_a_second_run_installs_nothing(clone):
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert clone.run("launch/test.sh").returncode == 0
    assert not clone.calls("install")
    assert not clone.calls("-m venv")


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_changed_requirements_are_installed(clone, name):
    assert clone.run("launch/quickstart.sh").returncode == 0
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert clone.calls("--requirement")


def test_a_failed_installation_is_tried_again(clone):
    done = clone.run("launch/quickstart.sh", FAKE_INSTALL_STATUS="1")
    assert done.returncode != 0
    assert not clone.calls("visor_jax")
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert clone.calls("--requirement")


def test_without_a_python_it_says_what_to_do(clone):
    done = clone.run("launch/quickstart.sh", FAKE_WRONG_VERSION="1")
    assert done.returncode == 1
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "apt-get install python3.11-venv" in done.stderr


def test_a_python_by_another_name_will_do(clone):
    (clone.bin / "python3.11").rename(clone.bin / "python3")
    assert clone.run("launch/quickstart.sh").returncode == 0
    assert clone.calls("python3: -m venv")


def test_without_ensurepip_the_system_s_pip_helps(clone):
    done = clone.run("launch/quickstart.sh", FAKE_NO_ENSUREPIP="1")
    assert done.returncode == 0, done.stderr
    assert clone.calls("-m venv --without-pip")
    assert clone.calls("-m pip --python")


def test_without_either_the_package_is_named(clone):
    done = clone.run("launch/quickstart.sh", FAKE_NO_ENSUREPIP="1", FAKE_NO_PIP="1")
    assert done.returncode == 1
    assert "apt-get install python3.11-venv" in done.stderr
    assert not (clone.root / ".venv").exists()


def test_an_environment_that_does_not_run_is_not_deleted(clone):
    inside = clone.root / ".venv" / "bin" / "python"
    inside.parent.mkdir(parents=True)
    inside.symlink_to("/nowhere/python3.11")
    done = clone.run("launch/quickstart.sh")
    assert done.returncode == 1
    assert "remove" in done.stderr
    assert inside.is_symlink()


def test_tests_leave_slow_ones_out_unless_asked(clone):
    assert clone.run("launch/test.sh", "-k", "two words", JAX_PLATFORMS="tpu").returncode == 0
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", "-m", "not slow", *PARALLEL, "-k", "two words"]
    assert clone.run("launch/test.sh", "--all", "tests/config/test_config.py").returncode == 0
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", *PARALLEL, "tests/config/test_config.py"]
    assert clone.run(".ci/run").returncode == 0
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", "-m", "not slow", *PARALLEL]


def test_the_cluster_s_packages_are_installed_where_they_are_missing(clone):
    apt = clone.bin / "apt-get"
    apt.write_text(f"#!/bin/bash\necho \"apt-get: $*\" >>'{clone.log}'\n")
    apt.chmod(0o755)
    done = clone.run("launch/test.sh", "--cluster", "-k", "two words")
    if os.geteuid() == 0:
        assert done.returncode == 0, done.stderr
        assert clone.calls("apt-get: update")
        (installed,) = clone.calls("apt-get: install")
        assert installed.endswith("--no-install-recommends slurm-wlm munge")
    else:
        assert done.returncode == 1
        assert "sudo apt-get install --no-install-recommends slurm-wlm munge" in done.stderr
    assert not clone.calls("ruff")
    for tool in ("sbatch", "munge"):
        (clone.bin / tool).symlink_to(apt)
    assert clone.run("launch/test.sh", "--cluster", "-k", "two words").returncode == 0
    assert not clone.calls("apt-get")
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", "-m", "cluster", "-k", "two words"]


def test_clients_get_environments_of_their_own(clone):
    assert clone.run("launch/test.sh", "--clients", "-k", "two words").returncode == 0
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", "tests/launching", "-k", "two words"]
    installed = clone.calls("--python")
    assert [line.split()[-1].partition("==")[0] for line in installed] == ["xpk", "skypilot[gcp]"]
    for line, name in zip(installed, ("xpk", "skypilot"), strict=True):
        assert f"--python {clone.root}/.venv-clients-{name}/bin/python install" in line
    assert clone.run("launch/test.sh", "--clients").returncode == 0
    assert not clone.calls("--python") and not clone.calls("ruff"), "installed already"


def test_another_version_of_transformers_lies_on_top_and_only_the_export_is_tested(clone):
    done = clone.run("launch/test.sh", "--transformers=5.3.0", "-k", "cache")
    assert done.returncode == 0, done.stderr
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", "-m", "not slow", *PARALLEL, "tests/export", "-k", "cache"]
    folder = clone.root / ".venv-transformers-5.3.0"
    assert clone.calls(f"-m venv --without-pip {folder}") and (folder / "bin" / "python").exists()
    (installed,) = clone.calls("transformers==5.3.0")
    assert "-m pip" in installed and "peft" in installed
    assert clone.run("launch/test.sh", "--transformers=5.3.0", FAKE_PYTEST_STATUS="1").returncode == 1
    assert not clone.calls("install") and not clone.calls("ruff")
    assert clone.run("launch/test.sh", "--all", "--transformers=5.3.0", "tests/export/peer").returncode == 0
    assert clone.got("pytest") == ["JAX_PLATFORMS=cpu", *PARALLEL, "tests/export/peer"]
    done = clone.run("launch/test.sh", "--transformers=5.24.0", FAKE_INSTALL_STATUS="1")
    assert done.returncode == 1 and not clone.calls("-m pytest")


@pytest.mark.parametrize("version", ["", "newest", "5", "5.3; true"])
def test_a_version_that_is_none_is_refused(clone, version):
    done = clone.run("launch/test.sh", f"--transformers={version}")
    assert done.returncode == 2
    assert f"--transformers={version}: expected a version, such as 5.3.0" in done.stderr
    assert not clone.calls("install")


@pytest.mark.parametrize(
    ("fake", "failed"),
    [
        ({"FAKE_RUFF_STATUS": "1"}, "ruff check"),
        ({"FAKE_PYTEST_STATUS": "1"}, "tests"),
        ({"FAKE_RUFF_STATUS": "1", "FAKE_PYTEST_STATUS": "1"}, "ruff check, tests"),
    ],
)
def test_every_check_runs_and_a_failed_one_is_named(clone, fake, failed):
    done = clone.run("launch/test.sh", **fake)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"test.sh: failed: {failed}"
    for check in ("ruff format", "ruff check", "basedpyright", "pytest"):
        assert clone.calls(f"-m {check}")


def test_scripts_can_be_run_as_they_are():
    for name in ("launch/quickstart.sh", "launch/test.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK)
        assert (ROOT / name).read_text().startswith("#!/usr/bin/env bash\n")


def test_requirements_are_names_with_versions_and_cover_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    installed = {name.lower().replace("_", "-") for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in project["dependencies"] + extras["torch"] + extras["dev"]:
        name = requirement.partition(">")[0].lower().replace("_", "-")
        assert name in installed or name == "pre-commit"
