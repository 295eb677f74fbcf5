"""`visor launch` as a command: actions, the check that the run fits, dry runs, and what `--json` prints."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from visor_jax.__main__ import main
from visor_jax.launching import tpu
from visor_jax.launching.steps import Runner

LINE = [
    *(
        "launch",
        "--target=tpu",
        "--name=first",
        "--topology=v5e:4x4",
        "--zone=us-west4-a",
        "--workdir=gs://runs-1/first",
    ),
    *("--config=llava_ov_0p5b", "--dry-run"),
    *("--config.tokenizer.path=/gcs/data-1/tokenizer.json", "--config.data.root=/gcs/data-1", "--bucket=data-1"),
]


@pytest.fixture(autouse=True)
def without_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run needs no client, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_dry_run_prints_every_command_and_says_that_it_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(LINE) == 0
    out, err = capsys.readouterr()
    assert "fits" in err and "GB per chip by formula" in err
    commands = [
        shlex.split(line) for line in out.splitlines() if line.startswith("gcloud ") and "--command" not in line
    ]
    assert [command[4] for command in commands[:3]] == ["describe", "create", "describe"]
    assert "--accelerator-type=v5litepod-16" in commands[1] and not list(tmp_path.iterdir())


def test_json_holds_commands_and_files_and_the_configuration_with_its_overrides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*LINE, "--json", "--config.train.steps=77"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["target"], result["action"], result["dry_run"]) == ("first", "tpu", "up", True)
    assert [command[4] for command in result["commands"] if command[0] == "gcloud"] == [
        *("describe", "create", "describe", "ssh", "scp", "ssh", "ssh"),
    ]
    assert json.loads(result["files"]["visor-launch/first/config.json"])["train"]["steps"] == 77


@pytest.mark.parametrize("action", ["logs", "status", "stop", "delete"])
def test_later_actions_need_neither_topology_nor_configuration(capsys: pytest.CaptureFixture[str], action: str) -> None:
    assert main(["launch", action, "--target=tpu", "--name=first", "--zone=us-west4-a", "--dry-run"]) == 0
    assert "gcloud compute tpus queued-resources" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--topology=v5e:1x1", "--config=llava_ov_7b"], "does not fit"),
        (
            [
                "--config=almanac_mini",
                "--config.tokenizer.path=almanac",
                "--config.data.root=",
                "--config.data.batch_size=12",
            ],
            "batch_size of stage 'warmup'=12: expected a multiple of 16",
        ),
        (["--bucket=data-2", "--config.tokenizer.path=/gcs/data-3/t.json"], "not mounted; expected --bucket=data-3"),
        (["--config.tokenizer.path=tokenizer.json"], "is relative to this folder, and does not travel to the machines"),
        (["--workdir="], "--workdir is missing"),
        (["--topology="], "--topology is missing"),
        (["--zone="], "--zone is missing"),
        (["destroy"], 'ACTION="destroy": expected one of up, logs, status, stop, resume, delete'),
        (["stauts"], "did you mean 'status'?"),
        (["--capacity=preemptible"], "expected one of on-demand, spot, reserved, flex-start"),
        (["--slices=0"], "--slices=0: expected 1 to"),
        (["--slices=many"], "invalid int value: 'many'"),
        (["--slice=2"], "did you mean '--slices'"),
        (["--follow"], "--follow: not for up; expected with 'visor launch logs'"),
        (["--config.train.stepz=1"], "did you mean 'train.steps'"),
        (["--config=llava_ov_0p6b"], "did you mean 'llava_ov_0p5b'"),
    ],
    ids=str,
)
def test_a_wrong_request_is_refused(capsys: pytest.CaptureFixture[str], changes: list[str], message: str) -> None:
    assert main([*LINE, *changes]) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and not out


@pytest.mark.parametrize(("asked", "said"), [(True, "first: interrupted; what was asked for stays"), (False, "")])
def test_interrupted_it_says_what_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: bool, said: str
) -> None:
    def wait(launch: Any, runner: Runner) -> NoReturn:
        runner.shown += [("gcloud",)] if asked else []
        raise KeyboardInterrupt

    monkeypatch.setitem(tpu.ACTIONS, "up", wait)
    assert main([argument for argument in LINE if argument != "--dry-run"]) == 130
    err = capsys.readouterr().err
    assert said in err and ("visor launch delete" in err) == asked


def test_force_skips_the_fit_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    unfit = [*LINE, "--topology=v5e:1x1", "--config=llava_ov_7b"]
    assert main(unfit) == 2
    assert "--topology=v5e:1x1: stage" in capsys.readouterr().err
    assert main([*unfit, "--force"]) == 0
    for wrong in ("--name=A;b", "--zone=us-west4-b", "--topology=v5e:5x5", "--workdir=gs://../x"):
        assert main([*unfit, "--force", wrong]) == 2


def test_nothing_is_imported_that_needs_an_accelerator(tmp_path: Path) -> None:
    """Neither JAX nor libtpu, nor a client's package, also not for the check that the run fits."""
    code = (
        "import sys; from visor_jax.__main__ import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'jax', 'libtpu', 'googleapiclient', 'kubernetes', 'sky'} & sys.modules.keys()))"
    )
    source = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *LINE], capture_output=True, text=True, env={"PYTHONPATH": str(source)}, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
