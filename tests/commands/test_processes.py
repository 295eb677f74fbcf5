"""Every command as two processes: what is done once is done by process 0, and both end with the same status."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.whole_run import environment
from visor_jax.testing.processes import Ended, Processes

CONFIG = "from visor_jax.testing import tiny_config\n\n\ndef get_config():\n    return tiny_config()\n"
# Commands that process 0 alone does; {run}: a whole run, {out}: a new path.
ONCE = {
    "plan --config={config} --image=1700x2200": "",
    "plan --config={config} --topology=h100x4": "",
    "data check --config={config} --samples=8": "",
    "data stats --config={config} --samples=8": "",
    "data preview --config={config} --samples=2 --out={out}.png": "{out}.png",
    "data build --config={config} --samples=4 --out={out}": "{out}/train.json",
    "report --workdir={run}": "{run}/report/index.html",
    "export --workdir={run} --out={out}": "{out}/parity.json",
    "bench --workdir={run} --rounds=1": "",
    "generate --workdir={run} --image={picture} --question=what": "",
    "generate --workdir={run} --image={picture} --chat": "",
}
QUICK = "data preview"  # the others are slow tests


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    paths = {"config": tmp_path / "tiny.py", "out": tmp_path / "out", "picture": tmp_path / "picture.png"}
    paths["config"].write_text(CONFIG)
    Image.new("RGB", (24, 24)).save(paths["picture"])
    return paths


def run_both(command: str, paths: dict[str, Path], compiled: str, **more: str) -> list[Ended]:
    with Processes(command.format(**paths).split(), environment=environment(compiled, **more)) as processes:
        return processes.wait(400)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[] if name.startswith(QUICK) else pytest.mark.slow) for name in ONCE]
)
def test_process_0_does_what_is_done_once(
    command: str, request: pytest.FixtureRequest, paths: dict[str, Path], compiled: str
) -> None:
    if "{run}" in command:
        paths["run"] = request.getfixturevalue("tiny_copy")
    ended = run_both(f"{command} --json", paths, compiled)
    assert [process.status for process in ended] == [0, 0], ended
    results = [line for line in ended[0].output.splitlines() if line.startswith("{")]
    assert len(results) == (0 if "--chat" in command else 1), ended[0].output
    assert all(isinstance(json.loads(result), dict) for result in results)
    assert [line.partition(":")[0] for line in ended[1].output.splitlines()] == ["visor"], ended[1].output
    if file := ONCE[command].format(**paths):
        assert Path(file).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "send", "statuses"),
    [
        ({"VISOR_TEST_SIGNAL": "hang"}, "SIGTERM", [143, 143]),
        ({"VISOR_TEST_SIGNAL": "hang"}, "", [134, 134]),
        ({"VISOR_TEST_SIGNAL": "SIGINT"}, "", [130, 130]),
    ],
    ids=["stopped", "hangs", "interrupted"],
)
def test_a_process_that_is_complete_waits_for_the_other_in_bounded_time(
    paths: dict[str, Path], compiled: str, at: dict[str, str], send: str, statuses: list[int]
) -> None:
    of_each = [{}, {"VISOR_TEST_KILL_AT": "imported", **at}]
    command = "data check --config={config} --samples=1".format(**paths).split()
    settings = environment(compiled, VISOR_CONNECT_SECONDS="15")
    with Processes(command, environment=settings, of_each=of_each) as processes:
        while send and "samples can be used" not in processes.output(0):
            time.sleep(0.1)
        if send:
            processes.send(1, signal.Signals[send])
        ended = processes.wait(120)
    assert [process.status for process in ended] == statuses, ended
    assert not any("***" in process.output for process in ended), ended
