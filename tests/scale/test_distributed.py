"""What process 0 does for all, and how processes learn of each other's failures; two real processes, no devices."""

from __future__ import annotations

import socket
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.whole_run import environment
from visor_jax.errors import RequestError
from visor_jax.scale.distributed import Reports, divided, is_lost_peer, once
from visor_jax.testing.processes import Ended, Processes, free_port

START = """
    import os, sys, time
    from visor_jax.errors import RequestError, RunError
    from visor_jax.scale import distributed
    from visor_jax.scale.distributed import Reports, finish, is_main, once, start
    from visor_jax.scale.environment import process_settings
    start(process_settings(os.environ), 10, 60)
"""


def run_both(body: str, folder: Path) -> list[Ended]:
    file = folder / "both.py"
    file.write_text(textwrap.dedent(START) + textwrap.dedent(body))
    with Processes([], devices=1, environment=environment(str(folder)), program=[str(file)]) as processes:
        return processes.wait(120)


def test_one_process_does_everything_itself() -> None:
    assert once(lambda: {"a": 1}) == {"a": 1}
    assert Reports("steps").exchange(1, [2]) == [[2]]
    assert divided("a", lambda: ["x"], lambda names: dict.fromkeys(names, 0)) == {"x": 0}
    with pytest.raises(RequestError, match="wrong"):
        once(lambda: (_ for _ in ()).throw(RequestError("wrong")))
    assert not is_lost_peer(RuntimeError("gloo: connection reset by peer"))


def test_results_errors_and_reports_reach_the_others(tmp_path: Path) -> None:
    ended = run_both(
        """
        print("once", once(lambda: {"from": distributed.process_index(), "values": [1, None]}))
        for error in (RequestError("field: wrong"), RunError("disk: full"), FileNotFoundError(2, "none", "a/file")):
            def fail():
                raise error
            try:
                once(fail)
            except Exception as caught:
                print(type(caught).__name__, caught)
        reports = Reports("steps")
        for step in range(3):
            print("reports", reports.exchange(step, [distributed.process_index(), step]))
        who = lambda names: dict.fromkeys(names, distributed.process_index())
        print("divided", [distributed.divided(name, lambda: ["x", "y", "z"], who) for name in ("first", "second")])
        finish(0)
        """,
        tmp_path,
    )
    assert [process.status for process in ended] == [0, 0], ended
    for process in ended:
        assert "once {'from': 0, 'values': [1, None]}" in process.output
        assert "RequestError field: wrong" in process.output and "RunError disk: full" in process.output
    assert "FileNotFoundError" in ended[0].output and "RequestError a/file:" in ended[1].output
    assert f"divided {[{'x': 0, 'z': 0, 'y': 1}] * 2}" in ended[0].output and "divided [{}, {}]" in ended[1].output
    assert "reports [[0, 2], [1, 2]]" in ended[0].output and "reports [[1, 2]]" in ended[1].output


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_failure_of_one_ends_the_other_in_seconds(tmp_path: Path, failing: int) -> None:
    began = time.monotonic()
    ended = run_both(
        f"""
        if distributed.process_index() == {failing}:
            finish(1, "ran out of disk")
        once(lambda: time.sleep(100))  # the other one waits in it, or waits for it
        """,
        tmp_path,
    )
    assert [process.status for process in ended] == [1, 1], ended
    assert f"process {failing}: ran out of disk; stopping" in ended[1 - failing].output
    print(f"{time.monotonic() - began:.0f} s")


def test_a_process_with_other_values_is_named_in_all(tmp_path: Path) -> None:
    ended = run_both(
        """
        from visor_jax.scale.distributed import check_equal
        check_equal({"command": "train", "mesh.fsdp": -1, "stages": ("base",)})
        try:
            check_equal({"command": "train", "seed": distributed.process_index()})
        except RequestError as error:
            print(error)
        try:  # the command comes first, not the flags that the other one lacks
            check_equal([{"command": "train", "--a": "x"}, {"command": "report"}][distributed.process_index()])
        except RequestError as error:
            print(error)
        finish(0)
        """,
        tmp_path,
    )
    assert [process.status for process in ended] == [0, 0], ended
    for process in ended:
        assert "command=report in process 1, train in process 0: expected" in process.output
        assert "seed=1 in process 1, 0 in process 0: expected the same command, configuration" in process.output


LATE = "not all of the 2 processes have connected within 5 s; expected the same address and number in all of them"
SAME = "another process on this machine has this number and JAX_COORDINATOR_ADDRESS="
OTHER_PORT, TAKEN_PORT = "other port", "taken port"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("of_each", "messages"),
    [
        pytest.param([{}, {"JAX_PROCESS_ID": "0"}], {SAME: 1, LATE: 1}, id="two with number 0"),
        pytest.param(
            [{"JAX_PROCESS_ID": "1"}, {}], {SAME: 1, "does not answer": 1}, id="two with number 1", marks=SLOW
        ),
        pytest.param([{}, OTHER_PORT], {LATE: 1, "process 0 does not answer within 5 s": 1}, id=OTHER_PORT, marks=SLOW),
        pytest.param([TAKEN_PORT] * 2, {"process 0 cannot listen on port": 1, LATE: 1}, id=TAKEN_PORT, marks=SLOW),
        pytest.param([{}, TAKEN_PORT], {LATE: 2}, id="another server's port", marks=SLOW),
        pytest.param(
            [{}, {"JAX_NUM_PROCESSES": "3"}],
            {"JAX_NUM_PROCESSES=3: process 0 was started with 2; expected the same number": 1},
            id="other number",
            marks=SLOW,
        ),
    ],
)
def test_processes_that_do_not_find_each_other_say_so(
    tmp_path: Path, of_each: list[Any], messages: dict[str, int]
) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        ports = {OTHER_PORT: free_port(), TAKEN_PORT: server.getsockname()[1]}
        given = [
            {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{ports[what]}"} if isinstance(what, str) else what
            for what in of_each
        ]
        settings = {**environment(str(tmp_path)), "VISOR_CONNECT_SECONDS": "5"}
        with Processes(["data", "check"], environment=settings, of_each=given) as processes:
            ended = processes.wait(60)
    assert [process.status for process in ended] == [2, 2], ended
    for message, count in messages.items():
        assert sum(message in process.output for process in ended) == count, ended
    assert not any("***" in process.output or "Traceback" in process.output for process in ended), ended


def test_a_process_waits_for_the_others_in_bounded_time(tmp_path: Path) -> None:
    alone = "import sys; from visor_jax.__main__ import main; sys.exit(main(['data', 'check']))"
    settings = {**environment(str(tmp_path)), "VISOR_CONNECT_SECONDS": "2", "JAX_PROCESS_ID": "0"}
    of_each = ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"},)
    with Processes([], count=1, environment=settings, of_each=of_each, program=["-c", alone]) as processes:
        (ended,) = processes.wait(60)
    assert ended.status == 2, ended
    assert "not all of the 2 processes have connected within 2 s" in ended.output and "***" not in ended.output
