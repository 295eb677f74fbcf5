"""docs/launch.md: its shell blocks run as they stand, beside recorders in place of the programs that they call.

`visor launch` and `visor plan` then run for real, as a dry run and by formula; of other commands the options are
checked. Figures that the page prints are those of the plan.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from visor_jax.__main__ import main
from visor_jax.commands import command_line
from visor_jax.config import architecture, load_config, stage_config
from visor_jax.testing.hub import write_dense_shape

PAGE = (Path(__file__).parents[2] / "docs" / "launch.md").read_text(encoding="utf-8")
PROGRAMS = ("visor", "gcloud", "hf", "tensorboard")
RECORDER = """#!/usr/bin/env python3
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page assumes it, with the JSON files of a checkpoint in HF_DIR."""
    folder = tmp_path_factory.mktemp("page")
    write_dense_shape(folder / "HF_DIR", architecture(load_config("llava_ov_0p5b")))
    return folder


@pytest.fixture(scope="module")
def calls(folder: Path) -> list[list[str]]:
    """What the page's blocks call, in order: program and arguments, with the shell's expansions done."""
    log, programs = folder / "calls.jsonl", folder / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(RECORDER.format(log=str(log), name=name))
        (programs / name).chmod(0o755)
    blocks = [block for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) if "[up|" not in block]
    text = "set -eu\n" + "\n".join(blocks).replace("S=/shared/me", f"S={folder}")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", text], check=True, cwd=folder, env=environment, timeout=120)
    return [json.loads(line) for line in log.read_text().splitlines()]


def options(call: list[str], name: str) -> str:
    """Returns the value of an option of a call; "" without it."""
    return next((word.partition("=")[2] for word in call if word.startswith(f"--{name}=")), "")


def test_every_step_of_the_page_is_called(calls: list[list[str]]) -> None:
    launches = [(options(call, "target"), call[2]) for call in calls if call[:2] == ["visor", "launch"]]
    actions = [(target, action if "--" not in action else "up") for target, action in launches]
    assert {a for t, a in actions if t == "tpu"} == {"up", "logs", "status", "stop", "resume", "delete"}
    assert {a for t, a in actions if t == "slurm"} == {"up", "logs", "status", "stop", "resume", "delete"}
    assert ("gke", "up") in actions
    others = {call[1] for call in calls if call[0] == "visor"}
    assert others == {"launch", "data", "plan", "import", "generate"}


def test_every_launch_of_the_page_is_possible(
    calls: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for call in calls:
        if call[:2] == ["visor", "launch"]:
            arguments = [*call[1:], *([] if "--dry-run" in call else ["--dry-run"])]
            assert main(arguments) == 0, (arguments, capsys.readouterr().err)
            assert capsys.readouterr().out, arguments


def test_other_commands_of_the_page_have_these_options(calls: list[list[str]]) -> None:
    for call in calls:
        if call[0] == "visor" and call[1] not in ("launch", "plan"):
            module = command_line._command(call[1])
            parser = command_line._parser(call[1], module)
            _, rest = parser.parse_known_args(call[2:])
            assert all(word.startswith("--config.") for word in rest), (call, rest)


def plan(call: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*call[1:], "--by-formula", "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]


def test_the_figures_of_the_page_are_those_of_the_plan(
    calls: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    on_tpu, on_gpu = (call for call in calls if call[:2] == ["visor", "plan"])
    shown = []
    for call in (on_tpu, on_gpu):
        stages = plan(call, capsys)
        assert all(stage["fits"] for stage in stages.values())
        config = load_config(options(call, "config"), [word for word in call if word.startswith("--config.")])
        steps = {name: stage_config(config, name).steps for name in stages}
        seconds = {name: stage["seconds_per_step"] for name, stage in stages.items()}
        largest = max(stage["bytes_per_chip"] for stage in stages.values()) / 1e9
        shown.append((steps, seconds, largest, sum(steps[name] * seconds[name] for name in stages)))
    wanted = [text.replace(",rows=4", "") for text in on_tpu]
    stages = plan(wanted, capsys)
    assert stages["full"]["bytes_per_chip"] > 0.95 * stages["full"]["bytes_available"]
    assert f"largest step would take {stages['full']['bytes_per_chip'] / 1e9:.1f} of 16.9 GB" in " ".join(PAGE.split())

    (steps, seconds, largest, total), (_, gpu_seconds, gpu_largest, gpu_total) = shown
    assert (steps["warmup"], steps["full"], steps["universal"], steps["policy"]) == (725, 725, 725, 937)
    assert f"largest step takes {largest:.1f} GB" in " ".join(PAGE.split())
    for name in seconds:
        assert f"{seconds[name]:.2f}" in PAGE, (name, seconds[name])
        assert f"{gpu_seconds[name]:.2f}" in PAGE, (name, gpu_seconds[name])
    (told,) = re.findall(r"= ([\d,]+) s, .* hours", PAGE)
    assert abs(int(told.replace(",", "")) / total - 1) < 0.01, total
    assert f"{total * 16 / 3600:.0f} chip-hours" in PAGE and f"costs {total * 16 / 3600 * 1.2:.0f} dollars" in PAGE
    assert f"largest step takes {gpu_largest:.1f} of 80 GB" in " ".join(PAGE.split())
    (told,) = re.findall(r"training ([\d,]+) s\.", PAGE)
    assert abs(int(told.replace(",", "")) / gpu_total - 1) < 0.01, gpu_total
