"""Command lines against the real clients: their parsers refuse unknown flags before they ask for an account.

Nothing is sent: the clients get an empty home without credentials.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launching.golden_files import ACTIONS, CASES
from visor_jax.launching import gke, tpu
from visor_jax.launching.description import describe
from visor_jax.launching.steps import Runner

pytestmark = pytest.mark.slow
GCLOUD = shutil.which("gcloud")
PARSED = ("do not currently have an active account", "valid credentials")


def shown(fields: dict[str, Any], action: str) -> list[tuple[str, ...]]:
    """Returns the commands of a dry run."""
    launch = describe(**fields)
    runner = Runner(launch.name, dry_run=True)
    target = importlib.import_module(f"visor_jax.launching.{launch.target}")
    target.check(launch)
    target.ACTIONS[action](launch, runner)
    return runner.shown


def gcloud_commands() -> dict[str, tuple[str, ...]]:
    """Returns the different command lines: one of each command and set of flags; all capacities of every chip."""
    commands: list[tuple[str, ...]] = []
    for fields in CASES.values():
        for action in ACTIONS:
            commands += [argv for argv in shown(fields, action) if argv[0] == "gcloud"]
        if fields["target"] == "gke":
            commands += [command.argv for command in gke.node_pool(describe(**fields))]
    base = CASES["tpu-v5e"]
    for capacity in ("on-demand", "spot", "reserved", "flex-start"):
        commands += [argv for argv in shown({**base, "capacity": capacity}, "up") if "create" in argv]
    for script in ("secrets versions access latest --secret=A --project=my-project", "storage cp --quiet a gs://b-1/a"):
        commands.append(("gcloud", *script.split()))
    commands.append(("gcloud", "storage", "cat", "gs://b-1/first/logs/*.log"))
    return {" ".join(re.sub(r"=(?s:.)*", "", word) for word in argv): argv for argv in commands}


@pytest.mark.skipif(GCLOUD is None, reason="gcloud is not installed")
def test_gcloud_parses_every_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GCLOUD is not None
    monkeypatch.chdir(tmp_path)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CLOUDSDK_", "GOOGLE_"))},
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_PROJECT": "my-project",
    }

    def run(argv: tuple[str, ...]) -> str:
        done = subprocess.run(
            [GCLOUD, *argv[1:]], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert done.returncode != 0, argv
        return done.stderr

    commands = gcloud_commands()
    assert len(commands) >= 15
    for argv in commands.values():
        assert any(text in run(argv) for text in PARSED), (argv, run(argv))
    assert "unrecognized arguments" in run((*commands[next(iter(commands))], "--no-such-flag"))  # the check can fail


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_knows_every_property_of_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` reports what it ignores; `systemd-run` takes the same names."""
    launch = describe(**CASES["tpu-v5e"])
    words = shlex.split(tpu.script(launch, "start", run_script=""), comments=True)
    properties = [
        word.removeprefix("--property=").replace("$log", "/tmp/log") for word in words if "--property=" in word
    ]
    of_unit = [item for item in properties if item.startswith("StartLimit")]
    of_service = [item for item in properties if item not in of_unit and "SubState" not in item]
    assert len(of_unit) == 2 and len(of_service) == 10

    def reported(*more: str) -> str:
        service = "\n".join([*of_service, *more, "ExecStart=/bin/bash /tmp/x", "RemainAfterExit=yes"])
        (tmp_path / "visor-first.service").write_text("\n".join(["[Unit]", *of_unit, "[Service]", service, ""]))
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "visor-first.service")]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stderr

    assert "visor-first.service" not in reported()
    assert "Unknown key" in reported("NoSuchKey=1")
