"""Slurm's batch script and commands without Slurm; tests/launch/slurm/ has the same with a real cluster.

`python -m tests.launching.test_slurm` writes launch/slurm/visor.sbatch again.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launching.conftest import Clients
from visor_jax.errors import RequestError, RunError
from visor_jax.launching import slurm
from visor_jax.launching.description import Launch, describe
from visor_jax.launching.steps import Runner

SCRIPT = Path(__file__).parents[2] / "launch/slurm/visor.sbatch"
EXAMPLE: dict[str, Any] = {"config": "llava_ov_0p5b", "workdir": "/shared/runs/visor"}


def launch_of(topology: str = "h100x8:2", **fields: Any) -> Launch:
    launch = describe("slurm", fields.pop("name", "visor"), topology, **{**EXAMPLE, **fields})
    slurm.check(launch)
    return launch


def directives(text: str) -> dict[str, str]:
    """Returns the options that sbatch reads: those before the first command."""
    options = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options[name] = value
    return options


def test_the_script_in_launch_is_rendered() -> None:
    assert SCRIPT.read_text() == slurm.script(launch_of())


NODES = {
    "h100x8": ("1", "8"),
    "h100x8:2": ("2", "8"),
    "h200x16": ("2", "8"),
    "h100x4": ("1", "4"),
    "h100x1": ("1", "1"),
}


@pytest.mark.parametrize("topology", NODES)
def test_one_task_per_gpu(topology: str) -> None:
    nodes, per_node = NODES[topology]
    found = directives(slurm.script(launch_of(topology)))
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == (nodes, per_node, per_node)
    assert ("exclusive" in found) == ("mem" in found) == (per_node == "8")  # a part of a node leaves room for others


def test_signal_requeue_and_logs() -> None:
    launch = launch_of(grace_seconds=120, queue="gpu", labels=["team=vision", "cost=7"], workdir="gs://runs-1/first")
    found = directives(slurm.script(launch))
    assert found["signal"] == "TERM@120"  # without B: the tasks get it, not the batch shell
    assert found["requeue"] == "" and found["open-mode"] == "append" and found["partition"] == "gpu"
    assert found["comment"] == "team=vision,cost=7"
    assert found["output"] == "visor-launch/visor/logs/visor.log" == slurm.log_file(launch)
    assert directives(slurm.script(launch_of()))["output"] == "/shared/runs/visor/logs/visor.log"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topology": "v5e:4x4"}, "--topology=v5e:4x4: target slurm has no TPUs; expected GPUs, such as h100x8"),
        ({"topology": "tpu7x:2x2x2"}, "--topology=tpu7x:2x2x2: target slurm has no TPUs"),
        ({"topology": "h100x12"}, "--topology=h100x12: expected whole nodes, h100x8 or h100x8:NODES"),
        ({"topology": "h100x4:2"}, "expected whole nodes"),
        ({"slices": 2}, "--slices=2: h100x8:2 has no slices"),
        ({"capacity": "spot"}, "--capacity=spot: a Slurm cluster rents nothing; choose a partition (--queue) or set"),
        ({"max_hours": 3}, "--max-hours=3: a Slurm job waits without a limit; set SBATCH_TIMELIMIT"),
        ({"service_account": "a@p.iam.gserviceaccount.com"}, "--service-account=a@p.iam.gserviceaccount.com: not for"),
        ({"cluster": "c"}, "--cluster=c: not for target slurm; run this on a login node"),
        ({"buckets": ["data-1"]}, "--bucket=data-1: not for target slurm; Slurm mounts no buckets"),
        ({"image": "p/visor:1", "workdir": "/a,b"}, "--workdir=/a,b: expected no comma"),
        ({"name": "a;b"}, '--name="a;b": expected 1 to 40 of'),
        ({"queue": "a b"}, "--queue"),
        ({"secrets": ["HF_TOKEN=x"]}, "--secret=HF_TOKEN=...: expected the name alone"),
    ],
)  # fmt: skip
def test_what_slurm_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        launch_of(**fields)
    assert message in str(error.value)


HOSTILE = ["--config.name=a b;$(touch x)'\"`\n#SBATCH --uid=0", "--config.data.root=ü %j \\ z"]
VARIANTS: dict[str, dict[str, Any]] = {
    "nodes": {},
    "part-of-a-node": {"topology": "h100x2", "queue": "gpu", "labels": ["team=vision"]},
    "image-and-secrets": {"image": "eu.gcr.io/p/visor:1", "secrets": ["HF_TOKEN", "WANDB_API_KEY"]},
    "bucket-and-hostile-values": {"workdir": "gs://runs-1/first", "overrides": HOSTILE, "image": "p/visor"},
    "a-file": {"config": "mine.py", "overrides": HOSTILE},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_script_is_clean_shell(variant: str, tmp_path: Path) -> None:
    file = tmp_path / "visor.sbatch"
    file.write_text(slurm.script(launch_of(**VARIANTS[variant])))
    assert "uid" not in directives(file.read_text())
    checker = shutil.which("shellcheck")
    command = [checker] if checker else ["bash", "-n"]
    done = subprocess.run([*command, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_written_as_pyxis_wants_them() -> None:
    text = slurm.script(launch_of(**VARIANTS["image-and-secrets"]))
    assert "--container-image=eu.gcr.io#p/visor:1\n" in text and ",/shared/runs/visor:/shared/runs/visor$" in text
    assert "--container-image=p/visor\n" in slurm.script(launch_of(image="p/visor"))
    assert "command -v visor" not in text  # it is in the image


# --- the script, with an srun that runs the tasks one after the other ---

SRUN = """#!/bin/bash
printf '%s\\n' "$*" >>srun.log
while [ "$1" != bash ]; do shift; done
for task in ${TASKS-0 1}; do SLURM_PROCID=$task "$@" || true; done
exit "$SRUN_STATUS"
"""
VISOR = """#!/bin/bash
printf '%s\\0' "$@" >"arguments-$SLURM_PROCID"
env >environment
[ -f "ends-$SLURM_PROCID" ] && exit "$(cat "ends-$SLURM_PROCID")"
exit 0
"""
SCONTROL = """#!/bin/bash
if [ "$1" = --oneliner ]; then
  echo "JobId=7 JobName=visor JobState=${JOB_STATE-RUNNING} Reason=None"
else
  echo "$*" >>scontrol.log
  exit "${SCONTROL_STATUS:-0}"
fi
"""


def run_script(
    folder: Path, launch: Launch, ends: list[int], srun: int, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs the batch script in `folder`; the tasks end with `ends`, and srun with its own status."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("visor", VISOR), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for task, status in enumerate(ends):
        (folder / f"ends-{task}").write_text(str(status))
    (folder / "job.sbatch").write_text(slurm.script(launch))
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_CPUS_ON_NODE": "32"}
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SRUN_STATUS": str(srun), **variables, **more}
    return subprocess.run(
        ["bash", "job.sbatch"], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


# statuses of the tasks, of srun, restarts so far -> the script's status, whether it goes back, a part of its last line
DECISIONS = {
    "complete": ([0, 0], 0, "", 0, False, "complete"),
    "stopped": ([143, 143], 143, "", 143, True, "stopped by SIGTERM (143); back into the queue, restart 1 of"),
    "stopped-again": ([143, 143], 143, "1", 143, True, "restart 2 of at most 2 (task:status 0:143 1:143)"),
    "stopped-too-often": ([143, 143], 143, "2", 143, False, "restarted 2 times, at most 2"),
    "lost-a-peer": ([134, 143], 143, "", 134, True, "aborted because a process was lost (134); back into the queue"),
    "lost-too-often": ([134, 134], 134, "2", 134, False, "not put back into the queue: restarted 2 times, at most 2"),
    "killed": ([143, 137], 143, "", 137, True, "a process was killed (137); back into the queue"),
    "killed-and-noticed": ([137, 134], 137, "", 137, True, "a process was killed (137)"),
    "killed-without-a-record": ([0, 0], 137, "", 137, True, "a process was killed (137); back"),
    "wrong-request": ([2, 143], 143, "", 2, False, "failed with 2, not put back into the queue (task:status 0:2"),
    "failed": ([134, 1], 134, "", 1, False, "failed with 1, not put back into the queue (task:status 0:134 1:1)"),
    "interrupted": ([130, 143], 143, "", 130, False, "failed with 130"),
    "crashed": ([139, 137], 139, "", 139, False, "failed with 139"),
    "no-step": ([0, 0], 1, "", 1, False, "srun ended with 1, not put back into the queue (task:status none recorded)"),
}  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS)
def test_what_becomes_of_the_job(case: str, tmp_path: Path) -> None:
    ends, srun, restarts, status, again, text = DECISIONS[case]
    launch = launch_of("h100x2", workdir=str(tmp_path / "run"), max_restarts=2)
    done = run_script(tmp_path, launch, ends, srun, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert done.returncode == status and text in done.stdout.splitlines()[-1], done.stdout
    requeued = tmp_path / "scontrol.log"
    assert requeued.read_text() == "requeue 7\n" if again else not requeued.exists(), done.stdout
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.log").read_text()


def test_a_cancelled_job_does_not_return(tmp_path: Path) -> None:
    launch = launch_of("h100x2", workdir=str(tmp_path / "run"))
    done = run_script(tmp_path, launch, [143, 143], 143, JOB_STATE="COMPLETING")
    assert done.returncode == 143 and not (tmp_path / "scontrol.log").exists()
    assert (
        "stopped by SIGTERM (143); Slurm ends this job, which was cancelled; not put back into the queue" in done.stdout
    )


def test_a_site_that_refuses_is_reported(tmp_path: Path) -> None:
    done = run_script(
        tmp_path, launch_of("h100x2", workdir=str(tmp_path / "run")), [143, 143], 143, SCONTROL_STATUS="1"
    )
    assert done.returncode == 143
    assert done.stdout.endswith(
        "Slurm does not put this job back into the queue: it was stopped, or the site does not allow it\n"
    )


def test_tasks_get_their_environment_and_exact_arguments(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hidden-value\n")
    launch = launch_of("h100x2", workdir=str(tmp_path / "run"), overrides=HOSTILE, secrets=["HF_TOKEN"])
    given = {"http_proxy": "http://proxy", "JAX_PROCESS_ID": "3", "XLA_FLAGS": "--mine", "HF_TOKEN_FILE": "token"}
    done = run_script(tmp_path, launch, [], 0, **given)
    assert done.returncode == 0, done.stdout
    expected = ["run", "--config=llava_ov_0p5b", f"--workdir={tmp_path / 'run'}", *HOSTILE]
    assert (tmp_path / "arguments-1").read_text().split("\0")[:-1] == expected
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert environment["HF_TOKEN"] == "hidden-value" and environment["JAX_PLATFORMS"] == "cuda,cpu"
    assert environment["XLA_FLAGS"] == "--mine" and "XLA_FLAGS=--mine (as submitted)" in done.stdout
    assert not {"http_proxy", "JAX_PROCESS_ID"} & set(environment) and not (tmp_path / "x").exists()
    seen = done.stdout + done.stderr + (tmp_path / "srun.log").read_text() + (tmp_path / "job.sbatch").read_text()
    assert "hidden-value" not in seen and "--cpus-per-task=16" in seen


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("secret", "HF_TOKEN: not set; set HF_TOKEN or HF_TOKEN_FILE where you submit this job"),
        ("visor", "visor: not found on PATH; activate its environment where you submit this job"),
    ],
)
def test_what_is_missing_is_named_and_not_tried_again(missing: str, message: str, tmp_path: Path) -> None:
    secrets = ["HF_TOKEN"] if missing == "secret" else []
    launch = launch_of("h100x2", workdir=str(tmp_path / "run"), secrets=secrets)
    more = {"PATH": "/usr/bin:/bin"} if missing == "visor" else {}
    done = run_script(tmp_path, launch, [], 0, **more)
    assert done.returncode == 2 and message in done.stdout and not (tmp_path / "scontrol.log").exists()


# --- actions ---


def commands(action: str, capsys: pytest.CaptureFixture[str], **fields: Any) -> tuple[list[str], str]:
    """Returns the command lines of a dry run, and everything it printed."""
    runner = Runner("visor", dry_run=True)
    slurm.ACTIONS[action](launch_of(**fields), runner)
    return [shlex.join(argv) for argv in runner.shown], capsys.readouterr().out


LOOK = "squeue --me --name=visor --noheader '--format=%i|%T|%r'"
DRY = {
    "up": [LOOK, "mkdir -p /shared/runs/visor/logs", "sbatch --parsable visor-launch/visor/visor.sbatch"],
    "logs": ["tail -n 200 /shared/runs/visor/logs/visor.log /shared/runs/visor/logs/visor-0.log"],
    "status": [LOOK],
    "stop": [LOOK, "scontrol update JobId=1 Requeue=0", "scancel --signal=TERM 1", LOOK],
    "delete": [LOOK, "scancel 1"],
}
DRY["resume"] = DRY["up"]


@pytest.mark.parametrize("action", DRY)
def test_a_dry_run_prints_the_commands(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown, printed = commands(action, capsys)
    assert shown == DRY[action]
    assert all(f"\n{line}\n" in printed for line in shown)
    assert (slurm.script(launch_of()).rstrip("\n") in printed) == (action in ("up", "resume"))


def test_a_configuration_that_is_a_file_travels_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = commands("up", capsys, config="mine.py", config_json='{"seed": 5}\n', overrides=HOSTILE)
    assert "cat >visor-launch/visor/config.json <<'VISOR_END'\n{\"seed\": 5}\nVISOR_END" in printed
    assert "  visor run --config=visor-launch/visor/config.json --workdir=/shared/runs/visor\n" in printed


def act(action: str, **fields: Any) -> dict[str, Any]:
    return slurm.ACTIONS[action](launch_of(**fields), Runner("visor"))


def test_up_submits_once(clients: Clients, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = str(tmp_path / "run")
    clients.set(answers={"^sbatch": {"out": "41;cluster\n"}})
    assert act("up", workdir=workdir) == {"state": "PENDING", "job": "41", "workdir": workdir}
    (submitted,) = clients.calls("sbatch")
    assert submitted == ["sbatch", "--parsable", "visor-launch/visor/visor.sbatch"]
    assert Path(submitted[-1]).read_text() == slurm.script(launch_of(workdir=workdir))
    assert (tmp_path / "run/logs").is_dir() and f"submitted as job 41; logs: {workdir}/logs" in capsys.readouterr().err

    clients.set(answers={"^squeue": {"out": "40|COMPLETING|None\n41|PENDING|Resources\n"}})
    for action in ("up", "resume"):
        assert act(action, workdir=workdir)["job"] == "41"
        assert "job 41 is PENDING (Resources); nothing submitted" in capsys.readouterr().err
    assert len(clients.calls("sbatch")) == 1 and not clients.calls("scontrol")


def test_a_job_that_slurm_holds_is_released(clients: Clients) -> None:
    clients.set(answers={"^squeue": {"out": "41|PENDING|launch failed requeued held\n"}})
    act("resume")
    assert clients.calls("scontrol") == [["scontrol", "release", "41"]] and not clients.calls("sbatch")


def test_a_refused_submission_is_reported(clients: Clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients.fail("^sbatch", "sbatch: error: Batch job submission failed: Invalid account or account/partition")
    with pytest.raises(RunError, match=r"sbatch: could not submit the job: sbatch: error: .* Invalid account"):
        act("up", workdir=str(tmp_path / "run"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match="squeue: not found on PATH; run this on a login node of a Slurm cluster"):
        act("status", workdir=str(tmp_path / "run"))


def test_the_state_of_an_ended_job_is_the_accountings(clients: Clients, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "40|FAILED|2:0|2026-01-01T00:00:00\n41|CANCELLED by 1000|0:15|2026-01-02T00:00:00\n"
    clients.set(answers={"^sacct": {"out": lines}})
    assert act("status") == {"state": "CANCELLED", "job": "41", "exit": "0:15"}
    assert capsys.readouterr().out == "visor: job 41 CANCELLED by 1000, exit status 0, at 2026-01-02T00:00:00\n"
    clients.set(answers={})
    assert act("status") == {"state": "NOT_FOUND"}
    assert capsys.readouterr().out == "visor: not in the queue\n"
    clients.fail("^sacct", "Slurm accounting storage is disabled")
    assert act("status") == {"state": "NOT_FOUND"}
    assert "this site keeps no accounting: see the log" in capsys.readouterr().out


def test_delete_cancels(clients: Clients) -> None:
    clients.set(answers={"^squeue": {"out": "41|PENDING|Priority\n"}})
    act("delete")
    assert clients.calls("scancel") == [["scancel", "41"]]


def test_stop_cancels_a_job_that_waits_or_was_just_put_back(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("states").write_text("41|RUNNING|None\n41|RUNNING|None\n41|PENDING|BeginTime\n")
    clients.script("squeue", "#!/bin/sh\nhead -n 1 states\nsed -i 1d states\n")
    monkeypatch.setattr(Runner, "sleep", lambda runner, seconds: None)
    assert act("stop") == {"state": "stopped"}
    assert [call[1:] for call in clients.calls("scancel")] == [["--signal=TERM", "41"], ["41"]]


def test_a_job_that_does_not_stop_is_an_error(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    clients.set(answers={"^squeue": {"out": "41|RUNNING|None\n"}})
    monkeypatch.setattr(Runner, "sleep", lambda runner, seconds: None)
    monkeypatch.setattr(slurm, "POLL_SECONDS", 60.0)
    with pytest.raises(RunError, match="visor: still runs; 'visor launch delete' ends it without waiting"):
        act("stop")
    assert [call[1] for call in clients.calls("scancel")] == ["--signal=TERM"]
    assert clients.calls("scontrol") == [["scontrol", "update", "JobId=41", "Requeue=0"]]


if __name__ == "__main__":
    SCRIPT.write_text(slurm.script(launch_of()))
