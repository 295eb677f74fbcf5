"""A Slurm cluster of one machine: `munged`, `slurmctld` and two `slurmd` in a folder, with GPUs that do not exist.

It runs as the current user, on ports of 127.0.0.1, without cgroups, systemd or the system's configuration. Of Slurm
itself nothing is replaced: jobs wait, start, get signals and go back into the queue as on a real cluster.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from visor_jax.testing.processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
MUNGE_FILES = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munge.seed",
}
SBIN = "/usr/sbin:/sbin"  # where Debian has the daemons
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, "second")  # JAX connects to the first node of a job by its name; a small job gets the first one
GPUS = 8
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=1000"
    f" Gres=gpu:{GPUS} Weight={{weight}}"
)
CONFIGURATION = """\
ClusterName=visor
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=off
"""


def missing() -> list[str]:
    """Returns the programs of Slurm and munge that this machine lacks."""
    return [program for program in PROGRAMS if _find(program) is None]


class Cluster:
    """A running cluster; a context manager that ends its daemons, by their process ids, and with them all jobs."""

    def __init__(self, folder: Path) -> None:
        """Writes the configuration and a new key into `folder`."""
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for gpu in range(GPUS):
            (folder / f"gpu{gpu}").touch()  # Slurm complains that these are no devices, and counts them
        gpus = f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}\n")
        text = CONFIGURATION.format(
            folder=folder,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            nodes="\n".join(
                NODE.format(name=name, port=free_port(), weight=1 + index) for index, name in enumerate(NODES)
            ),
            host=HOST,
            controller_port=free_port(),
            first_job=random.randrange(1, 4000),  # JAX derives the coordinator's port from it
        )
        (folder / "slurm.conf").write_text(text)

    def __enter__(self) -> Self:
        munge = [f"--{option}={self.folder}/{file}" for option, file in MUNGE_FILES.items()]
        try:
            self._start("munged", "--foreground", "--force", *munge)
            self.wait_for(lambda: (self.folder / "munge.socket").exists(), 30, "munged listens")
            self._start("slurmctld", "-D", "-f", self.folder / "slurm.conf")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name, "-f", self.folder / "slurm.conf", log=f"slurmd-{name}.out.log")
            self.wait_for(self._idle, 60, "all nodes are idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def cancel(self) -> None:
        """Cancels all jobs and waits until they are gone."""
        self.run("scancel", f"--user={pwd.getpwuid(os.geteuid()).pw_name}", check=False)
        deadline = time.monotonic() + 30
        while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancels all jobs and ends the daemons."""
        if len(self._daemons) == 2 + len(NODES):
            self.cancel()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(self, *command: object, check: bool = True, **more: str) -> str:
        """Runs a command of Slurm; returns its output."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **more},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str) -> Mapping[str, str]:
        """Returns what Slurm knows of a job, such as `JobState`, `Restarts`, `ExitCode` and Reason."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until a condition holds.

        Raises:
          TimeoutError: it does not within `seconds`; the message has the ends of the daemons' logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                ends = (f"--- {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("*.log")))
                raise TimeoutError(f"not within {seconds:g} s: {what}\n" + "\n".join(ends))
            time.sleep(0.2)

    def wait_for_end(self, number: str, seconds: float) -> tuple[str, int]:
        """Waits for a job's end; returns Slurm's word for it and the exit status of its script."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.job(number)["JobState"] in ended, seconds, f"job {number} ends")
        shown = self.job(number)
        return shown["JobState"], int(shown["ExitCode"].partition(":")[0])

    def _idle(self) -> bool:
        shown = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False).split()
        return shown == ["idle"] * len(NODES)

    def _start(self, program: str, *arguments: object, log: str = "") -> None:
        command = [_find(program) or program, *map(str, arguments)]
        with (self.folder / (log or f"{program}.out.log")).open("wb") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
            )


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SBIN}")
