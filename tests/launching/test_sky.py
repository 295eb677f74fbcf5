"""SkyPilot's task file, its actions against a stand-in for `sky`, and the file as SkyPilot itself understands it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launching.conftest import Clients
from tests.launching.test_golden import findings, needs_shellcheck
from visor_jax.errors import RequestError, RunError
from visor_jax.launching import sky, wheel
from visor_jax.launching.description import Launch, describe
from visor_jax.launching.steps import Runner
from visor_jax.scale.environment import process_settings


def launch(topology: str = "v6e:4x4", **options: Any) -> Launch:
    given: dict[str, Any] = {"config": "almanac_mini", "config_json": '{"seed": 0}', "workdir": "gs://bucket/run"}
    return describe("sky", "mine", topology, **given | options)


def task(given: Launch) -> dict[str, Any]:
    return yaml.safe_load(sky.task(given))


@pytest.mark.parametrize(
    ("topology", "accelerator", "runtime", "nodes"),
    [
        ("v4:2x2x2", "tpu-v4-16", "tpu-ubuntu2204-base", 1),
        ("v5e:4x4", "tpu-v5litepod-16", "v2-alpha-tpuv5-lite", 1),
        ("v5p:2x2x4", "tpu-v5p-32", "v2-alpha-tpuv5", 1),
        ("v6e:16x16", "tpu-v6e-256", "v2-alpha-tpuv6e", 1),
        ("h100x8", "H100:8", None, 1),
        ("h200x8:2", "H200:8", None, 2),
    ],
)
def test_chips_become_accelerators(topology: str, accelerator: str, runtime: str | None, nodes: int) -> None:
    found = task(launch(topology))
    assert found["resources"]["accelerators"] == accelerator
    assert found["num_nodes"] == nodes
    assert found["resources"].get("accelerator_args", {}).get("runtime_version") == runtime


@pytest.mark.parametrize("topology", ["v6e:4x4", "h100x8:2"])
def test_only_a_stopped_or_aborted_run_restarts(topology: str) -> None:
    recovery = task(launch(topology))["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [143, 134]
    assert recovery["max_restarts_on_errors"] == 0, "another status is no reason to pay for the machines again"


def test_options_reach_their_fields() -> None:
    found = task(
        launch(
            zone="us-east5-b",
            capacity="spot",
            secrets=["HF_TOKEN"],
            labels=["team=vision"],
            buckets=["images"],
            overrides=["--config.train.steps=9"],
        )
    )
    assert found["name"] == "mine"
    assert found["resources"]["infra"] == "gcp/us-east5/us-east5-b"
    assert found["resources"]["use_spot"] is True
    assert found["resources"]["labels"] == {"team": "vision"}
    assert found["secrets"] == {"HF_TOKEN": None}
    assert found["file_mounts"]["/gcs/images"] == {"source": "gs://images", "mode": "MOUNT"}
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in found["envs"]["LIBTPU_INIT_ARGS"]
    assert found["run"].splitlines()[-1] == (
        "exec visor run --config=almanac_mini --workdir=gs://bucket/run --config.train.steps=9"
    )
    assert wheel.FILE in found["setup"] and found["workdir"] == "visor-launch/mine"


def test_an_image_brings_the_package() -> None:
    found = task(launch(image="eu.gcr.io/project/visor:1"))
    assert found["resources"]["image_id"] == "docker:eu.gcr.io/project/visor:1"
    assert not {"setup", "workdir"} & set(found)
    assert task(launch(image="eu.gcr.io/project/visor:1", config="mine.py"))["workdir"] == "visor-launch/mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "tpu7x:2x2x1"}, "--topology=tpu7x:2x2x1: .*--target=gke"),
        ({"slices": 2}, "--slices=2"),
        ({"capacity": "flex-start"}, "--capacity=flex-start"),
        ({"capacity": "reserved"}, "--capacity=reserved"),
        ({"queue": "mine"}, "--cluster, --queue"),
        ({"max_restarts": 3}, "--max-restarts=3: SkyPilot restarts after 143 and 134 without a limit"),
        ({"topology": "h200x4"}, "--topology=h200x4: .*expected h200x8"),
        ({"max_hours": 3}, "--max-hours=3: SkyPilot waits, and a run lasts, without a limit"),
        ({"workdir": "/data/run"}, "--workdir=/data/run: expected gs://BUCKET/PATH"),
        ({"service_account": "trainer@project.iam.gserviceaccount.com"}, "gcp.remote_identity"),
    ],
)
def test_what_skypilot_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sky.check(launch(**options))


# --- what the machines execute -------------------------------------------------------------------------------------


def scripts(given: Launch, folder: Path, program: str, **environment: str) -> dict[str, Any]:
    """Writes a stand-in for `visor`, and returns how SkyPilot would start the task's script: by bash, in a folder."""
    (folder / "visor/bin").mkdir(parents=True, exist_ok=True)
    (folder / "visor/bin/visor").write_text(f"#!/bin/bash\n{program}\n")
    (folder / "visor/bin/visor").chmod(0o755)
    values = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **task(given)["envs"], **environment}
    return {"args": ["bash", "-c", task(given)["run"]], "env": values, "cwd": folder, "text": True}


def test_arguments_arrive_as_they_were_given(tmp_path: Path) -> None:
    hostile = [
        "--config.a=$(touch canary)",
        "--config.b=`touch canary`",
        "--config.c='; touch canary; \"${HOME} #",
        "-ü\n",
    ]
    done = subprocess.run(
        **scripts(launch(overrides=hostile), tmp_path, 'printf "%s\\0" "$@"'), stdout=subprocess.PIPE, timeout=20
    )
    assert done.stdout.split("\0")[:-1] == ["run", "--config=almanac_mini", "--workdir=gs://bucket/run", *hostile]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_gpu_nodes_find_each_other(rank: int, tmp_path: Path) -> None:
    by_sky = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank)}
    call = scripts(launch("h100x8:2"), tmp_path, "env -0", **by_sky)
    done = subprocess.run(**call, stdout=subprocess.PIPE, timeout=20)
    values = dict(line.partition("=")[::2] for line in done.stdout.split("\0")[:-1])
    assert process_settings(values) == {
        "coordinator_address": "10.0.0.7:8476",
        "num_processes": 2,
        "process_id": rank,
    }


def test_sigterm_reaches_the_run_before_its_machine_is_taken_down(tmp_path: Path) -> None:
    """The hook that SkyPilot runs before it stops a machine ends the run, and waits until it has saved."""
    (hook,) = task(launch())["config"]["hooks"]
    name = f"visor{os.getpid()}"  # another run on this machine shall not hear of it
    script = hook["run"].replace("bin/[v]isor run", f"bin/[v]{name[1:]} run")
    assert script != hook["run"]
    saved = tmp_path / "saved"
    program = f"trap 'sleep 0.3; touch {saved}; exit 143' TERM; echo ready; while :; do read -t 0.05 <> <(:); done"
    process = subprocess.Popen(
        ["bash", "-c", f"exec -a 'bin/{name} run' bash -c \"$0\"", program], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        subprocess.run(["bash", "-c", script], check=True, timeout=30)
        assert saved.exists()
        assert process.wait(timeout=20) == 143
    subprocess.run(["bash", "-c", script], check=True, timeout=30)
    assert hook["timeout"] == launch().grace_seconds


SETUP_STAND_INS = {
    "uv": 'printf "%s\\n" "uv $*" >>"$HOME/log"\nfor last; do :; done\nif [ "$1" = venv ]; then mkdir -p "$last"; fi',
    "python3": 'printf "%s\\n" "python3 $*" >>"$HOME/log"\ncp "$HOME/bin/uv.later" "$HOME/bin/uv"',
}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("topology", "extra"), [("v6e:4x4", "tpu"), ("h100x8", "cuda")])
def test_setup_installs_the_wheel_with_the_packages_of_the_chip(
    topology: str, extra: str, installed: bool, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in SETUP_STAND_INS.items():
        file = tmp_path / "bin" / ("uv.later" if name == "uv" and not installed else name)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run(["bash", "-c", task(launch(topology))["setup"]], env=environment, check=True, timeout=30)
    calls = (tmp_path / "log").read_text().splitlines()
    assert [call for call in calls if call.startswith("python3 -m pip install")] == (
        [] if installed else [f"python3 -m pip install --user --quiet {sky.UV}"]
    )
    what = " ".join([f"./{wheel.FILE}[{extra},gcs]", *wheel.pins()])
    last = f"uv pip install --quiet --python {tmp_path}/visor/bin/python {what}"
    assert calls[-1] == last and calls.count(last) == 2


@needs_shellcheck
def test_shellcheck_of_what_the_machines_run(tmp_path: Path) -> None:
    scripts = {}
    for topology in ("v6e:4x4", "h100x8:2"):
        found = task(launch(topology))
        scripts |= {f"{topology}.setup": found["setup"], f"{topology}.run": found["run"]}
        scripts[f"{topology}.hook"] = found["config"]["hooks"][0]["run"]
    assert findings(scripts, tmp_path) == []


# --- actions -------------------------------------------------------------------------------------------------------


def act(action: str, **options: Any) -> dict[str, Any]:
    given = launch(**options)
    sky.check(given)
    return sky.ACTIONS[action](given, Runner("mine"))


def set_status(clients: Clients, status: str, recoveries: int = 0) -> None:
    clients.set(jobs=[{**job, "status": status, "recovery_count": recoveries} for job in clients.get("jobs")])


def test_a_job_is_started_once(clients: Clients) -> None:
    assert act("up", config="mine.py")["state"] == "submitted"
    folder = Path("visor-launch/mine")
    assert {path.name for path in folder.iterdir()} == {"task.yaml", "config.json", wheel.FILE, ".skyignore"}
    (call,) = clients.calls("launch")
    assert call == ["sky", "jobs", "launch", "--name", "mine", "--yes", "--detach-run", "visor-launch/mine/task.yaml"]
    assert act("up")["state"] == "pending"
    assert len(clients.calls("launch")) == 1


def test_secrets_are_named_only(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "the value")
    act("up", secrets=["HF_TOKEN"])
    (call,) = clients.calls("launch")
    assert call[call.index("--secret") + 1] == "HF_TOKEN"
    assert "the value" not in str(call) + Path("visor-launch/mine/task.yaml").read_text()


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "RECOVERING", "SUCCEEDED", "FAILED_SETUP"])
def test_status(status: str, clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    assert act("status") == {"name": "mine", "target": "sky", "state": "absent"}
    assert capsys.readouterr().out == "mine: absent\n"
    act("up")
    set_status(clients, status, recoveries=2)
    assert act("status") == {"name": "mine", "target": "sky", "state": status.lower(), "job": 1, "recoveries": 2}
    assert capsys.readouterr().out == f"mine: {status.lower()}; recoveries: 2\n"


def test_stop_and_resume(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    act("up")
    assert "mine: submitted" in capsys.readouterr().err
    set_status(clients, "RUNNING")
    assert act("stop")["state"] == "stopped"
    assert "mine: stopped" in capsys.readouterr().err
    assert act("stop")["state"] == "cancelled"
    assert len(clients.calls("cancel")) == 1
    assert act("resume")["state"] == "submitted"
    assert act("status") == {"name": "mine", "target": "sky", "state": "pending", "job": 2, "recoveries": 0}
    capsys.readouterr()
    for _ in range(2):
        assert act("delete")["state"] == "deleted"
        assert capsys.readouterr().err.endswith("visor: mine: deleted; the workdir stays\n")
    assert len(clients.calls("cancel")) == 2


def test_a_job_that_does_not_end_is_reported(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    act("up")
    set_status(clients, "CANCELLING")
    monkeypatch.setattr(sky, "POLL_SECONDS", 700.0)
    with pytest.raises(RunError, match="--name=mine: still CANCELLING"):
        act("stop")


def test_logs(clients: Clients, capfd: pytest.CaptureFixture[str]) -> None:
    act("logs")
    act("logs", follow=True)
    assert "(mine, rank=0) step 1" in capfd.readouterr().out
    assert len(clients.calls("logs", "--no-follow")) == len(clients.calls("logs", "--follow")) == 1


def test_a_dry_run_prints_the_task_and_runs_nothing(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    given = launch()
    for action in ("up", "stop", "delete"):
        sky.ACTIONS[action](given, Runner("mine", dry_run=True))
    out = capsys.readouterr().out
    assert sky.task(given).strip() in out
    assert "sky jobs launch --name mine --yes --detach-run visor-launch/mine/task.yaml" in out
    assert "sky jobs cancel --name mine --yes" in out
    assert not clients.calls()


# --- SkyPilot itself -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {
                "topology": "v6e:4x4",
                "zone": "us-east5-b",
                "capacity": "spot",
                "secrets": ["HF_TOKEN"],
                "buckets": ["b-1"],
            },
            {"machine": "TPU-VM", "accelerators": {"tpu-v6e-16": 1}, "spot": True, "zone": "us-east5-b", "nodes": 1},
        ),
        ({"topology": "v5p:2x2x4"}, {"machine": "TPU-VM", "accelerators": {"tpu-v5p-32": 1}, "spot": False}),
        ({"topology": "v5e:4x4"}, {"accelerators": {"tpu-v5litepod-16": 1}}),
        ({"topology": "h100x8:2"}, {"machine": "a3-highgpu-8g", "accelerators": {"H100": 8}, "nodes": 2}),
        ({"topology": "h200x8", "labels": ["team=vision"]}, {"machine": "a3-ultragpu-8g", "nodes": 1}),
    ],
    ids=lambda value: value.get("topology", ""),
)
def test_skypilot_loads_and_optimizes_the_task(
    options: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    program = shutil.which("sky")
    if program is None:
        pytest.skip("skypilot is not installed: pip install 'skypilot[gcp]'")
    python = Path(program).read_text().splitlines()[0].removeprefix("#!")
    given = launch(**options)
    (tmp_path / "visor-launch/mine").mkdir(parents=True)
    (tmp_path / "task.yaml").write_text(sky.task(given))
    dry = Runner("mine", dry_run=True)
    for action in sky.ACTIONS.values():
        action(given, dry)
    (tmp_path / "visor-launch/mine/task.yaml").write_text(sky.task(given))
    commands = [argv for argv in dry.shown if argv[0] == "sky"]
    assert {argv[2] for argv in commands} == {"launch", "queue", "logs", "cancel"}
    done = subprocess.run(
        [python, "-I", Path(__file__).with_name("load_task.py"), "task.yaml", tmp_path / "home", json.dumps(commands)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HF_TOKEN": "not the value"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    found, sent = json.loads(done.stdout.splitlines()[-1]), task(given)
    assert found.items() >= expected.items()
    assert found["recovery"]["recover_on_exit_codes"] == [143, 134] and found["hourly"] > 0
    assert found["recovery"]["max_restarts_on_errors"] == 0
    assert found["envs"].items() >= sent["envs"].items() and found["run"] == sent["run"]
    assert found["hooks"][0]["run"] == sent["config"]["hooks"][0]["run"]
    assert found["secrets"] == sorted(given.secrets)
