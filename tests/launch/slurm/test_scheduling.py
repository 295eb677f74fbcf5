"""What Slurm does with the job of `visor launch --target=slurm`: its real daemons, and tasks that end in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import Cluster
from visor_jax.launching import slurm
from visor_jax.launching.description import Launch
from visor_jax.launching.steps import Runner

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Act = Callable[..., tuple[Launch, str]]
READY = 'touch "$ACTS/ready-$SLURM_PROCID"; for i in $(seq 3000); do sleep 0.1; done; exit 99'
SAVES = f'trap "sleep 1; exit 143" TERM; {READY}'
FAILS = f'trap "exit 1" TERM; {READY}'
DEAF = f'trap "" TERM; {READY}'
THEN = 'until [ -e "$ACTS/ready-1" ]; do sleep 0.1; done; '  # of task 0: after task 1 has its trap
COMPLETE = {(1, 0): "exit 0", (1, 1): "exit 0"}

# {(restart, task): what it does}; Slurm's word for the end, exit status, restarts, a line of the job's log
ENDS = {
    "complete": ({(0, 0): "sleep 1; exit 0", (0, 1): "exit 0"}, "COMPLETED", 0, 0, ": complete"),
    "wrong-request": (
        *({(0, 0): f"{THEN} exit 2", (0, 1): SAVES}, "FAILED", 2, 0),
        "failed with 2, not put back into the queue (task:status 0:2 1:143)",
    ),
    "failed-and-the-other-hangs": (
        {(0, 0): f"{THEN} exit 1", (0, 1): DEAF},
        "FAILED",
        1,
        0,
        "failed with 1, not put back",
    ),
    "failed-later-than-the-other": (
        *({(0, 0): f"{THEN} exit 134", (0, 1): FAILS}, "FAILED", 1, 0),
        "failed with 1, not put back into the queue (task:status 0:134 1:1)",
    ),
    "crashed": ({(0, 0): f"{THEN} kill -SEGV $$", (0, 1): SAVES}, "FAILED", 139, 0, "failed with 139, not put back"),
    "lost-a-process": (
        *({(0, 0): f"{THEN} exit 134", (0, 1): DEAF, **COMPLETE}, "COMPLETED", 0, 1),
        "; back into the queue, restart 1 of at most 50 (task:status 0:134",
    ),
    "stopped-and-lost": (
        *({(0, 0): f"{THEN} exit 134", (0, 1): SAVES, **COMPLETE}, "COMPLETED", 0, 1),
        "was lost (134); back into the queue, restart 1 of at most 50 (task:status 0:134 1:143)",
    ),
    "killed": (
        {(0, 0): f"{THEN} kill -9 $$", (0, 1): SAVES, **COMPLETE},
        "COMPLETED",
        0,
        1,
        "(task:status 0:137 1:143)",
    ),
    "killed-with-its-shell": (
        *({(0, 0): f"{THEN} kill -9 $PPID $$", (0, 1): DEAF, **COMPLETE}, "COMPLETED", 0, 1),
        "a process was killed (137); back into the queue, restart 1 of at most 50 (task:status ",
    ),
}


def log_of(launch: Launch) -> str:
    return Path(slurm.log_file(launch)).read_text()


@pytest.mark.parametrize("case", ENDS)
def test_only_what_was_stopped_or_lost_goes_back_into_the_queue(case: str, cluster: Cluster, act: Act) -> None:
    acts, word, status, restarts, line = ENDS[case]
    launch, job = act(acts)
    assert cluster.wait_for_end(job, 90) == (word, status), log_of(launch)
    assert int(cluster.job(job)["Restarts"]) == restarts
    assert line in log_of(launch)
    assert log_of(launch).count("2 processes, restart") == restarts + 1  # appended, not overwritten
    assert not list(Path(slurm.logs_folder(launch)).glob("*.ended"))


def test_a_job_goes_back_at_most_max_restarts_times(cluster: Cluster, act: Act) -> None:
    launch, job = act({(restart, task): "exit 134" for restart in (0, 1, 2) for task in (0, 1)}, max_restarts=1)
    assert cluster.wait_for_end(job, 90) == ("FAILED", 134)
    assert cluster.job(job)["Restarts"] == "1"
    assert "not put back into the queue: restarted 1 times, at most 1" in log_of(launch)


def test_the_script_of_launch_on_two_whole_nodes(cluster: Cluster, act: Act) -> None:
    """As in launch/slurm/visor.sbatch: sixteen tasks on two nodes, whose logs and statuses are in one shared folder."""
    place = 'echo $SLURM_NODEID $SLURM_LOCALID; touch "$ACTS/done-$SLURM_PROCID"; exit 0'
    last = 'until [ "$(ls "$ACTS" | grep -c done)" = 14 ] && [ -e "$ACTS/ready-3" ]; do sleep 0.1; done; exit 134'
    acts = {(0, task): place for task in range(16)}
    acts |= {(0, 3): SAVES, (0, 11): last, **{(1, task): "exit 0" for task in range(16)}}
    launch, job = act(acts, topology="h100x8:2")
    assert cluster.wait_for_end(job, 90) == ("COMPLETED", 0), log_of(launch)
    assert cluster.job(job)["NumNodes"] == "2" and cluster.job(job)["Restarts"] == "1"
    assert "16 processes, restart 1 of at most 50" in log_of(launch)
    assert "was lost (134); back into the queue, restart 1 of at most 50 (task:status 11:134 3:143)" in log_of(launch)
    places = [Path(slurm.log_file(launch, task)).read_text().split()[:2] for task in range(16) if task not in (3, 11)]
    assert places == [[str(task // 8), str(task % 8)] for task in range(16) if task not in (3, 11)]


def wait_until_ready(cluster: Cluster, tmp_path: Path) -> None:
    cluster.wait_for(lambda: len([*tmp_path.glob("acts/ready-*")]) == 2, 60, "both tasks run")


def test_slurms_sigterm_before_the_time_limit(cluster: Cluster, act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "2")
    launch, job = act({(0, 0): SAVES, (0, 1): SAVES, **COMPLETE}, grace_seconds=90)
    assert cluster.job(job)["TimeLimit"] == "00:02:00"
    assert cluster.wait_for_end(job, 240) == ("COMPLETED", 0), log_of(launch)
    assert cluster.job(job)["Restarts"] == "1"
    assert "stopped by SIGTERM (143); back into the queue" in log_of(launch)
    assert "TIME LIMIT" not in log_of(launch)


def test_a_preempted_job_saves_and_returns(cluster: Cluster, act: Act, tmp_path: Path) -> None:
    launch, job = act({(0, 0): SAVES, (0, 1): SAVES, **COMPLETE})
    wait_until_ready(cluster, tmp_path)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1"
    ).strip()
    assert cluster.wait_for_end(urgent, 120) == ("COMPLETED", 0)
    assert cluster.wait_for_end(job, 120) == ("COMPLETED", 0)
    assert cluster.job(job)["Restarts"] == "1"
    assert "stopped by SIGTERM (143); back into the queue" in log_of(launch)


def test_a_signal_to_the_whole_job_does_not_end_its_shell(cluster: Cluster, act: Act, tmp_path: Path) -> None:
    launch, job = act({(0, 0): SAVES, (0, 1): SAVES, **COMPLETE})
    wait_until_ready(cluster, tmp_path)
    cluster.run("scancel", "--full", "--signal=TERM", job)  # srun kills the tasks: nothing is saved
    assert cluster.wait_for_end(job, 120) == ("COMPLETED", 0)
    assert "a process was killed (137); back into the queue, restart 1 of at most 50" in log_of(launch)


def test_a_cancelled_job_does_not_return(cluster: Cluster, act: Act, tmp_path: Path) -> None:
    launch, job = act({(0, 0): SAVES, (0, 1): SAVES, **COMPLETE})
    wait_until_ready(cluster, tmp_path)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job, 60)[0] == "CANCELLED"
    cluster.wait_for(lambda: "which was cancelled; not put back" in log_of(launch), 30, "the script has ended")
    assert cluster.job(job)["Restarts"] == "0"


def test_the_actions(cluster: Cluster, act: Act, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch, job = act({(0, 0): SAVES, (0, 1): SAVES})
    runner = Runner(launch.name)
    wait_until_ready(cluster, tmp_path)
    assert slurm.up(launch, runner)["job"] == job
    assert f"job {job} is RUNNING (None); nothing submitted" in capsys.readouterr().err
    assert slurm.status(launch, runner) == {"state": "RUNNING", "job": job}

    assert slurm.stop(launch, runner) == {"state": "stopped"}
    assert cluster.wait_for_end(job, 30) == ("FAILED", 143)
    assert cluster.job(job)["Restarts"] == "0"
    assert "Slurm does not put this job back into the queue" in log_of(launch)
    assert slurm.stop(launch, runner) == {"state": "stopped"}
    capsys.readouterr()
    assert slurm.status(launch, runner) == {"state": "NOT_FOUND"}
    assert capsys.readouterr().out == "two-tasks: not in the queue, and this site keeps no accounting: see the log\n"

    (tmp_path / "acts/ready-0").unlink()
    (tmp_path / "acts/ready-1").unlink()
    resumed = slurm.ACTIONS["resume"](launch, runner)["job"]
    assert resumed != job
    wait_until_ready(cluster, tmp_path)
    slurm.delete(launch, runner)
    assert cluster.wait_for_end(resumed, 30)[0] == "CANCELLED"
    slurm.delete(launch, runner)
    assert "does not exist" in capsys.readouterr().err


def test_the_logs_of_both_attempts_are_in_one_file_per_task(
    cluster: Cluster, act: Act, capfd: pytest.CaptureFixture[str]
) -> None:
    acts = {(restart, task): f"echo task {task}, attempt {restart}; " for restart in (0, 1) for task in (0, 1)}
    acts[0, 0] += f"{THEN} exit 134"
    acts[0, 1] += SAVES
    launch, job = act(acts)
    cluster.wait_for_end(job, 90)
    for task in (0, 1):
        text = Path(slurm.log_file(launch, task)).read_text()
        assert text.index(f"task {task}, attempt 0") < text.index(f"task {task}, attempt 1")
    slurm.logs(launch, Runner(launch.name))
    shown = capfd.readouterr().out
    assert "task 0, attempt 1" in shown and "2 processes, restart 1 of at most 50" in shown


def test_a_missing_program_and_secret_are_named_and_not_tried_again(
    cluster: Cluster, act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, job = act({}, secrets=["HF_TOKEN"])
    assert cluster.wait_for_end(job, 60) == ("FAILED", 2)
    assert "HF_TOKEN: not set; set HF_TOKEN or HF_TOKEN_FILE where you submit this job" in log_of(launch)

    (tmp_path / "token").write_text("hidden-value\n")
    monkeypatch.setenv("HF_TOKEN_FILE", str(tmp_path / "token"))
    same = '[ "$HF_TOKEN" = hidden-value ] && echo "it has it"'
    launch, job = act({(0, 0): same, (0, 1): same}, secrets=["HF_TOKEN"])
    assert cluster.wait_for_end(job, 60) == ("COMPLETED", 0)
    texts = [
        file.read_text() for file in (*Path(slurm.logs_folder(launch)).iterdir(), *Path("visor-launch").rglob("*.*"))
    ]
    assert not any("hidden-value" in text for text in texts)

    monkeypatch.setenv("PATH", "/usr/bin:/bin:/usr/sbin")
    job = slurm.up(launch, Runner(launch.name))["job"]
    assert cluster.wait_for_end(job, 60) == ("FAILED", 2)
    assert "visor: not found on PATH; activate its environment where you submit this job" in log_of(launch)


def test_the_command_line(cluster: Cluster, act: Act, tmp_path: Path) -> None:
    launch, job = act({(0, 0): "echo first; exit 0", (0, 1): "exit 0"})
    assert cluster.wait_for_end(job, 60) == ("COMPLETED", 0)
    for task in (0, 1):
        (tmp_path / f"acts/0-{task}").write_text(SAVES)

    def visor(action: str, *more: str) -> tuple[int, str, str]:
        given = ["--target=slurm", f"--name={launch.name}", f"--workdir={launch.workdir}", *more]
        command = [sys.executable, "-P", "-m", "visor_jax", "launch", action, *given]
        done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    start = ("--topology=h100x2", "--config=almanac_mini", "--config.seed=3")
    status, _, messages = visor("up", *start)
    assert status == 0 and "h100x2: stage" in messages and "fits" in messages, messages
    assert f"two-tasks: submitted as job {int(job) + 1}; logs: {slurm.log_file(launch)}" in messages
    wait_until_ready(cluster, tmp_path)
    status, shown, _ = visor("status", "--json")
    assert status == 0 and json.loads(shown.splitlines()[-1])["state"] == "RUNNING"
    assert "first" in visor("logs")[1]
    assert visor("stop")[2] == "visor: two-tasks: stopped\n"
    assert cluster.wait_for_end(str(int(job) + 1), 30) == ("FAILED", 143)
    (tmp_path / "acts/ready-0").unlink()
    (tmp_path / "acts/ready-1").unlink()
    assert visor("resume", *start)[0] == 0
    wait_until_ready(cluster, tmp_path)
    assert "deleted; workdir and logs stay" in visor("delete")[2]
    assert cluster.wait_for_end(str(int(job) + 2), 30)[0] == "CANCELLED"
    status, _, message = visor("up", "--topology=v5e:4x4", "--config=almanac_mini")
    assert status == 2 and message.startswith("visor: --topology=v5e:4x4: target slurm has no TPUs; expected GPUs")
