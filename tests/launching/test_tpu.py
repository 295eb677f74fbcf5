"""Cloud TPU VMs against a stateful stand-in for `gcloud`, whose workers run the real scripts with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launching.conftest import Clients
from visor_jax.errors import RequestError, RunError
from visor_jax.launching import tpu
from visor_jax.launching.description import Launch, describe
from visor_jax.launching.steps import Runner

BASE: dict[str, Any] = {
    "target": "tpu", "name": "first", "topology": "v5p:2x2x1", "zone": "us-east5-a", "project": "my-project",
    "config": "llava_ov_0p5b", "config_json": '{"seed": 1}\n', "workdir": "gs://runs-1/first",
}  # fmt: skip


def launch_of(**changes: Any) -> Launch:
    launch = describe(**{**BASE, **changes})
    tpu.check(launch)
    return launch


def act(action: str, **changes: Any) -> dict[str, Any]:
    return tpu.ACTIONS[action](launch_of(**changes), Runner("first"))


def states(clients: Clients) -> dict[str, str]:
    return {name: unit["show"]["SubState"] for name, unit in clients.units().items() if not unit["timer"]}


def test_up_creates_waits_copies_and_runs_and_again_changes_nothing(clients: Clients) -> None:
    clients.set(workers=2)
    assert act("up", topology="v5p:2x2x2")["state"] == "running"
    assert states(clients) == {"first-w-0/visor-first": "running", "first-w-1/visor-first": "running"}
    assert len(clients.calls("create")) == 1 and len(clients.calls("describe")) == 3
    home = clients.folder / "workers/first-w-1/visor/first"
    assert {path.name for path in home.iterdir()} >= {"config.json", "env", "run_process", "run.log"}
    assert home.joinpath("config.json").read_text() == BASE["config_json"]
    processes = {unit["pid"] for unit in clients.units().values() if "pid" in unit}
    clients.forget()
    assert act("up", topology="v5p:2x2x2")["state"] == "running"
    assert not clients.calls("create") and not clients.calls("systemd-run") and not clients.calls("scp")
    assert processes == {unit["pid"] for unit in clients.units().values() if "pid" in unit}


def test_the_run_survives_the_ssh_session_and_its_log_is_copied_to_the_bucket(
    clients: Clients, capfd: pytest.CaptureFixture[str]
) -> None:
    act("up")
    started = "started with run --config=config.json --workdir=gs://runs-1/first"
    log = clients.folder / "workers/first-w-0/visor/first/run.log"
    clients.wait_for(lambda: log.exists() and started in log.read_text())
    act("logs")
    assert started in capfd.readouterr().out
    (copied,) = clients.calls("systemd-run", "--unit=visor-first-log", "gs://runs-1/first/logs/first-w-0.log")
    assert "--on-unit-active=60" in copied and (clients.folder / "bucket/runs-1/first/logs/first-w-0.log").exists()


def test_stop_waits_for_the_save_and_status_shows_it(clients: Clients, capfd: pytest.CaptureFixture[str]) -> None:
    two = {"topology": "v5p:2x2x2"}
    clients.set(workers=2)
    act("up", **two)
    saves = clients.folder / "workers/first-w-0/visor/first/saves"
    assert act("status", **two)["workers"] == {"first-w-0": "running", "first-w-1": "running"}
    log = clients.folder / "workers/first-w-1/visor/first/run.log"
    clients.wait_for(lambda: log.exists() and "started" in log.read_text())
    assert act("stop", **two)["state"] == "stopped"
    assert saves.read_text() == "saved\n"
    assert act("status", **two)["workers"] == {"first-w-0": "stopped after saving", "first-w-1": "stopped after saving"}
    assert "first-w-1: visor-first ended with 143" in capfd.readouterr().err
    clients.forget()
    assert act("stop", **two)["state"] == "stopped" and not clients.calls("kill")
    assert act("resume", **two)["state"] == "running"
    assert set(states(clients).values()) == {"running"} and not clients.calls("create")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "state", ["SUSPENDED", pytest.param("SUSPENDING", marks=SLOW), pytest.param("FAILED", marks=SLOW)]
)
def test_resume_recreates_what_was_preempted(clients: Clients, state: str) -> None:
    act("up")
    clients.preempt("first", state)
    with pytest.raises(RunError, match=f"first is {state}.*visor launch resume"):
        act("up")
    clients.forget()
    if state == "SUSPENDING":
        requests = clients.get("requests")
        requests["first"]["states"] = ["SUSPENDING", "SUSPENDING", "SUSPENDED"]
        clients.set(requests=requests)
    assert act("resume")["state"] == "running"
    assert len(clients.calls("delete")) == len(clients.calls("create")) == 1
    assert set(states(clients).values()) == {"running"}
    clients.forget()
    assert act("resume")["state"] == "running" and not clients.calls("delete")


def test_resume_recreates_a_slice_that_is_gone_while_the_request_is_active(clients: Clients) -> None:
    act("up")
    requests = clients.get("requests")
    requests["first"]["slices"] = {"first": "PREEMPTED"}
    clients.set(requests=requests)
    clients.forget()
    assert act("resume")["state"] == "running"
    assert len(clients.calls("delete")) == len(clients.calls("create")) == 1


@pytest.mark.parametrize(
    ("paid", "capacity"), [({"spot": {}}, "spot"), ({"guaranteed": {"reserved": True}}, "reserved")], ids=str
)
def test_resume_asks_for_the_same_capacity(clients: Clients, paid: dict[str, Any], capacity: str) -> None:
    """A forgotten --capacity=spot would rent machines that cost more."""
    lost = {"type": tpu.accelerator_type(launch_of()), "nodes": ["first"], "states": ["SUSPENDED"], "paid": paid}
    clients.set(requests={"first": lost})
    with pytest.raises(RequestError, match=f"--capacity=on-demand: first was asked for with --capacity={capacity}"):
        act("resume")
    assert not clients.calls("delete")
    assert act("resume", capacity=capacity)["state"] == "running"
    assert len(clients.calls("delete")) == 1


def test_resume_creates_what_does_not_exist(clients: Clients) -> None:
    assert act("resume")["state"] == "running"
    assert len(clients.calls("create")) == 1 and not clients.calls("delete")


def test_resume_waits_until_a_deletion_has_ended(clients: Clients) -> None:
    clients.set(requests={"first": {"type": "v5p-8", "nodes": ["first"], "states": ["DELETING", "DELETING", None]}})
    assert act("resume")["state"] == "running"
    assert len(clients.calls("create")) == 1 and not clients.calls("delete")


def test_a_long_wait_is_reported_now_and_then(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tpu, "POLL_SECONDS", 60.0)
    monkeypatch.setattr(tpu, "REPORT_POLLS", 2)
    monkeypatch.setattr(Runner, "sleep", lambda self, seconds: None)
    clients.set(requests={"first": {"type": "v5p-8", "nodes": ["first"], "states": ["ACCEPTED"] * 5 + ["ACTIVE"]}})
    tpu.wait(launch_of(), Runner("first"))
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        f"visor: first: {text}"
        for text in ("ACCEPTED", "ACCEPTED after 2 minutes", "ACCEPTED after 4 minutes", "ACTIVE after 5 minutes")
    ]


def test_a_request_that_fails_or_is_preempted_while_waiting_says_why(clients: Clients) -> None:
    clients.set(schedule=["WAITING_FOR_RESOURCES", "FAILED"])
    with pytest.raises(RunError, match=r"first is FAILED \(no capacity\); 'visor launch resume' asks for it again"):
        act("up")
    assert not clients.calls("ssh")


def test_preempted_between_two_steps(clients: Clients) -> None:
    clients.set(schedule=["ACTIVE", "SUSPENDED"])
    with pytest.raises(RunError, match=r"could not make the run's folder on every worker: .*first is not ACTIVE"):
        act("up")
    with pytest.raises(RunError, match="first is SUSPENDED; 'visor launch resume'"):
        act("up")
    clients.set(schedule=["ACTIVE"])
    assert act("resume")["state"] == "running"


def test_someone_created_it_since_we_looked(clients: Clients) -> None:
    clients.fail("queued-resources create", "ERROR: ALREADY_EXISTS: already exists")
    clients.set(requests={})
    clients.fail("queued-resources describe", "ERROR: NOT_FOUND: was not found")
    clients.set(requests={"first": {"type": "v5p-8", "nodes": ["first"], "states": ["ACTIVE"]}})
    assert act("up")["state"] == "running"


def test_the_same_name_with_other_machines_is_refused(clients: Clients) -> None:
    act("up")
    for changes in ({"topology": "v5p:2x2x2"}, {"topology": "v5p:2x2x4"}):
        with pytest.raises(RequestError, match="--name=first: exists in us-east5-a with v5p-8, not v5p-"):
            act("up", **changes)


def test_a_second_try_goes_on_after_ssh_failed_once(clients: Clients) -> None:
    clients.fail("queued-resources ssh", "ssh: connect to host 10.0.0.2 port 22: Connection refused", status=255)
    with pytest.raises(RunError, match=r"could not make the run's folder on every worker: .*Connection refused"):
        act("up")
    assert act("up")["state"] == "running" and len(clients.calls("create")) == 1


@pytest.mark.parametrize("step", ["queued-resources scp", pytest.param("systemd-run", marks=SLOW)])
def test_a_second_try_goes_on_after_any_step(clients: Clients, step: str) -> None:
    clients.fail(step, "ERROR: broken pipe")
    with pytest.raises(RunError):
        act("up")
    assert act("up")["state"] == "running"
    assert set(states(clients).values()) == {"running"}


def test_a_quota_is_reported_and_nothing_else_is_tried(clients: Clients) -> None:
    clients.fail(
        "create", "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProjectPerZone' has been exceeded."
    )
    with pytest.raises(RunError, match=r"could not create the queued resource: .*Quota limit 'TPUV5P"):
        act("up")
    assert not clients.calls("ssh")


@pytest.mark.parametrize("action", ["up", "status", "stop", "resume", "delete", "logs"])
def test_without_credentials_or_client_the_request_is_wrong(
    clients: Clients, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients.fail("gcloud", "ERROR: (gcloud) You do not currently have an active account selected.\nPlease run:")
    with pytest.raises(RequestError, match=r"no credentials: .*gcloud auth login"):
        act(action)
    monkeypatch.setenv("PATH", str(clients.folder))
    with pytest.raises(RequestError, match="gcloud: not found on PATH; install the Google Cloud CLI"):
        act(action)


def test_delete_may_be_repeated(clients: Clients, capfd: pytest.CaptureFixture[str]) -> None:
    act("up")
    act("delete")
    assert clients.get("requests") == {} and not (clients.folder / "workers/first-w-0").exists()
    act("delete")
    assert "first: does not exist" in capfd.readouterr().err
    assert act("stop")["state"] == "stopped"
    assert act("status") == {"state": "NOT_FOUND", "workers": {}}


def test_logs_of_machines_that_are_gone_come_from_the_bucket(
    clients: Clients, capfd: pytest.CaptureFixture[str]
) -> None:
    act("up")
    act("delete")
    (clients.folder / "bucket/runs-1/first/logs/first-w-0.log").write_text("the last words\n")
    act("logs")
    assert "the last words" in capfd.readouterr().out
    with pytest.raises(RunError, match="its machines have no log to show"):
        act("logs", workdir="/mnt/runs/first")


@pytest.mark.parametrize(
    ("ends", "starts", "shown"),
    [
        ("exit 0", 1, "complete"),
        ("exit 1", 1, "failed with 1 (exit-code)"),
        ("exit 134", 3, "failed with 134 (start-limit-hit), restarted 2 times"),
        pytest.param("kill -ABRT $$", 3, "failed with 6 (start-limit-hit), restarted 2 times", marks=SLOW),
    ],
)
def test_only_134_is_restarted_and_at_most_n_times(clients: Clients, ends: str, starts: int, shown: str) -> None:
    (clients.folder / "visor").write_text(f"#!/bin/bash\necho started >>starts\n{ends}\n")
    act("up", max_restarts=2)
    clients.wait_for(lambda: set(states(clients).values()) <= {"exited", "failed"})
    assert list(act("status")["workers"].values()) == [shown]
    assert (clients.folder / "workers/first-w-0/visor/first/starts").read_text() == "started\n" * starts


def test_several_slices(clients: Clients) -> None:
    assert act("up", slices=2)["state"] == "running"
    (created,) = clients.calls("create")
    assert {"--node-count=2", "--node-prefix=first", "--accelerator-type=v5p-8"} <= set(created)
    assert set(states(clients)) == {"first-0-w-0/visor-first", "first-1-w-0/visor-first"}
    assert act("status", slices=2)["workers"].keys() == {"first-0-w-0", "first-1-w-0"}
    requests = clients.get("requests")
    requests["first"]["slices"] = {"first-1": "PREEMPTED"}
    clients.set(requests=requests)
    assert act("resume", slices=2)["state"] == "running" and len(clients.calls("create")) == 2


def test_a_workdir_on_a_shared_disk_holds_the_logs(
    clients: Clients, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    act("up", workdir=f"{tmp_path}/run", topology="v5p:2x2x2")
    assert "has to be on a file system that all 2 machines share" in capfd.readouterr().err
    assert {file.name for file in (tmp_path / "run/logs").iterdir()} == {"first-w-0.log"}
    assert not clients.calls("--unit=visor-first-log")


def test_a_secret_reaches_the_run_by_reference_only(clients: Clients, capfd: pytest.CaptureFixture[str]) -> None:
    clients.set(secrets={"HF_TOKEN": "s3cr3t-canary"})
    (clients.folder / "visor").write_text('#!/bin/bash\nprintf %s "$HF_TOKEN" >token\nsleep 30\n')
    act("up", secrets=["HF_TOKEN"])
    token = clients.folder / "workers/first-w-0/visor/first/token"
    clients.wait_for(lambda: token.exists() and token.read_text())
    assert token.read_text() == "s3cr3t-canary"
    for action in ("status", "logs", "stop"):
        act(action, secrets=["HF_TOKEN"])
    assert "s3cr3t-canary" not in "".join(capfd.readouterr()) + (clients.folder / "log.jsonl").read_text()
    kept = [path for path in Path.cwd().rglob("*") if path.is_file()]
    kept += [path for path in (clients.folder / "workers").rglob("*") if path.is_file() and path.name != "token"]
    assert kept and not [path for path in kept if b"s3cr3t-canary" in path.read_bytes()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "tpu7x:2x2x2", "zone": "us-central1-c"}, "does not offer tpu7x; use --target=gke"),
        ({"topology": "h100x8"}, "target tpu has no GPUs; use --target=gke, slurm or sky"),
        ({"zone": ""}, "--zone is missing"),
        ({"image": "eu.gcr.io/p/visor:1"}, "TPU VMs run no image"),
        ({"cluster": "c1"}, "--cluster=c1: not for target tpu"),
        ({"queue": "q1"}, "--queue=q1: not for target tpu"),
    ],
    ids=str,
)
def test_what_this_api_does_not_offer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        launch_of(**changes)
