"""Checkpoints of processes that are killed, stopped, out of disk space, or resumed on another mesh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import visor_jax.errors
from visor_jax.checkpoint.manager import Checkpoints, find_newest

ROOT = Path(visor_jax.errors.__file__).parents[1]
COMMITTED = ["arrays", "commit.json", "manifest.json"]


def opened(folder: Path) -> Checkpoints:
    return Checkpoints(folder, identity={"stage": "full"}, keep=1, retry_seconds=0.0)


def newest(folder: Path) -> int:
    """Returns the step from which training would resume."""
    manifest = find_newest(folder).manifest
    assert manifest is not None
    return manifest.step


def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts a Python process that runs `script` after the common imports."""
    head = """
        import os, resource, signal, sys
        from pathlib import Path
        import jax, jax.numpy as jnp, numpy as np
        from visor_jax.errors import RunError
        from visor_jax.checkpoint.manager import Checkpoints, find_newest
        folder = Path(sys.argv[1])
        def opened():
            return Checkpoints(folder, identity={"stage": "full"}, keep=1, retry_seconds=0.0)
    """
    code = textwrap.dedent(head) + textwrap.dedent(script)
    remaining = {name: value for name, value in os.environ.items() if name not in ("VISOR_TEST_KILL_AT", "XLA_FLAGS")}
    remaining.update(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", **environment)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=remaining, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


KILL = """
    with opened() as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, {"params": {"w": jnp.full((64, 64), float(step))}}, wait=True)
"""


def test_kill_9_at_any_point_of_a_save_leaves_the_last_good_step(tmp_path):
    expected = {"save_begin": 1, "arrays_written": 1, "before_manifest": 1, "before_commit": 1, "gc": 2}
    # Step 2 is being saved, or step 1 is being removed by retention.
    points = {name: f"{name}:{1 if name == 'gc' else 2}" for name in expected}
    running = {name: start(KILL, tmp_path / name, VISOR_TEST_KILL_AT=point) for name, point in points.items()}
    for name, process in running.items():
        status, text = finish(process)
        assert status == -9, f"{name}: {text}"
        if name == "gc":
            assert not (tmp_path / "gc" / "1" / "commit.json").exists(), "a partially removed step must not count"
        with opened(tmp_path / name) as checkpoints:
            step = checkpoints.latest()
            assert step is not None and step == expected[name], name
            restored = checkpoints.restore(step, {"params": {"w": jnp.zeros((64, 64))}})
            assert float(restored["params"]["w"][0, 0]) == step
            checkpoints.save(3, restored, wait=True)
            assert checkpoints.latest() == 3
        assert sorted(p.name for p in (tmp_path / name / "3").iterdir()) == COMMITTED


DISK_FULL = """
    big = {"params": {"w": jnp.asarray(np.random.default_rng(0).random((512, 512), np.float32))}}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with opened() as checkpoints:
        checkpoints.save(1, big, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        checkpoints.save(2, big)
        checkpoints._pending[1].exception()
        assert checkpoints.poll(), "the failed save is not reported"
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        checkpoints.save(3, big)
        checkpoints.wait()
        assert not checkpoints.poll()
        assert checkpoints.latest() == 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpoints.save(4, big, wait=True)
        except RunError as error:
            print(error)
            sys.exit(1)
"""


def test_a_full_disk_is_reported_retried_and_ends_in_exit_1(tmp_path):
    status, text = finish(start(DISK_FULL, tmp_path))
    assert status == 1 and "3 in a row" in text, text
    assert "Traceback" not in text.splitlines()[-1]
    assert newest(tmp_path) == 3


MESH = """
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    like = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    abstract = {"params": {"w": like((16, 8), P("fsdp", "tensor")), "b": like((8,), P())}}
    with opened() as checkpoints:
        state = checkpoints.restore(checkpoints.latest(), abstract)
        assert len(state["params"]["w"].sharding.device_set) == 8
        assert state["params"]["w"].addressable_shards[0].data.shape == (4, 4)
        np.testing.assert_array_equal(np.asarray(state["params"]["w"]), np.arange(128.0).reshape(16, 8))
        checkpoints.save(2, state, wait=True)
"""


def test_one_device_eight_devices_and_back(tmp_path):
    state = {"params": {"w": jnp.arange(128.0).reshape(16, 8), "b": jnp.ones(8)}}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, wait=True)
    status, text = finish(start(MESH, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    assert status == 0, text
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        chex.assert_trees_all_equal(checkpoints.restore(2, state), state)


TWO_PROCESSES = """
    import random, time, zlib
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from visor_jax.workdir.supervision import supervised
    port, index, compiling_step = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    data = random.Random(0).randbytes(1 << 25)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, shutdown_timeout_seconds=30)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    sharding = NamedSharding(mesh, P("fsdp"))
    state = jax.make_array_from_callback((8, 4), sharding, lambda i: np.arange(32.0, dtype=np.float32).reshape(8, 4)[i])
    advance = jax.jit(lambda x: x + 1)
    with opened() as checkpoints, supervised() as stop, stop.until_complete("full"):
        start = checkpoints.latest() or 0
        if start:
            like = jax.ShapeDtypeStruct(state.shape, state.dtype, sharding=sharding)
            state = checkpoints.restore(start, {"params": {"w": like}})["params"]["w"]
        for step in range(start + 1, start + 2000):
            if step == compiling_step:  # what XLA does for a minute and a half: no Python runs in the main thread
                print("compiling", flush=True)
                for _ in range(200):
                    zlib.compress(data, 9)
            state = advance(state)
            stop.hold()
            time.sleep(0.02)
            if step == start + 5:
                print("ready", flush=True)
            if stop.should_stop():
                checkpoints.save(step, {"params": {"w": state}}, {"step": step}, wait=True)
                print("stopped at", step, flush=True)
                break
    print("went on")
"""


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_one_step_of_both_and_both_resume(tmp_path):
    steps = [0]
    for signaled in (1, 0):
        for status, text in run_two_processes(tmp_path, signaled):
            assert status == 143 and f"stopped at {newest(tmp_path)}" in text and "went on" not in text, text
        steps.append(newest(tmp_path))
    assert steps[0] < steps[1] < steps[2]
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(steps[2], {"params": {"w": jnp.zeros((8, 4))}})
        np.testing.assert_array_equal(restored["params"]["w"], np.arange(32.0).reshape(8, 4) + steps[2])


@pytest.mark.slow
@pytest.mark.parametrize("signaled", [0, 1])
def test_sigterm_to_one_of_two_processes_that_compile_ends_it_at_once(tmp_path, signaled):
    """JAX's notifier, which would hold the signal until a step is complete, receives it only from the first step on."""
    began = time.monotonic()
    statuses = run_two_processes(tmp_path, signaled, compiling_step=1)
    assert statuses[signaled][0] == 143 and "nothing to save" in statuses[signaled][1]
    assert find_newest(tmp_path).manifest is None and time.monotonic() - began < 100


def run_two_processes(folder: Path, signaled: int, compiling_step: int = 0) -> list[tuple[int, str]]:
    """Starts both, sends SIGTERM to one while they step (or compile), and returns their results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    processes = [start(TWO_PROCESSES, folder, port, index, compiling_step, XLA_FLAGS=flags) for index in (0, 1)]
    try:
        for process in processes:
            ready = "compiling\n" if compiling_step else "ready\n"
            assert process.stdout is not None and ready in process.stdout, "ended before it was ready"
        processes[signaled].send_signal(signal.SIGTERM)
        if not compiling_step:
            return [finish(process) for process in processes]
        ended = finish(processes[signaled])
        processes[1 - signaled].kill()  # it would wait for its peer until the coordinator times out
        other = finish(processes[1 - signaled])
        return [ended, other] if signaled == 0 else [other, ended]
    finally:
        for process in processes:
            process.kill()


SAVE_FOR_EVER = """
    with opened() as checkpoints:
        step = checkpoints.latest() or 0
        while True:
            step += 1
            arrays = {f"w{i}": jnp.full((64, 64), float(step)) for i in range(8)}
            checkpoints.save(step, {"params": arrays}, wait=True)
            print("saved", step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_never_loses_a_finished_save(tmp_path):
    moments = np.random.default_rng(0).uniform(0.0, 1.0, 6)
    for moment in moments:
        process = start(SAVE_FOR_EVER, tmp_path)
        assert process.stdout is not None
        first = next(line for line in process.stdout if line.startswith("saved "))
        time.sleep(moment)
        process.kill()
        status, text = finish(process)
        assert status == -9, text
        last_saved = max(int(line.split()[1]) for line in (first + text).splitlines() if line.startswith("saved "))
        step = newest(tmp_path)
        assert last_saved <= step <= last_saved + 1
        with opened(tmp_path) as checkpoints:
            restored = checkpoints.restore(step, {"params": {f"w{i}": jnp.zeros((64, 64)) for i in range(8)}})
        assert all(bool((leaf == step).all()) for leaf in jax.tree.leaves(restored))


SHARES = """
    import logging
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from visor_jax.checkpoint import manager
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
    of_share = manager.checksums
    def checksums(place, names):
        if sys.argv[3] == "1" and place.name == "2":
            raise OSError(5, "cannot be read here")
        print("reads", len(names), flush=True)
        return of_share(place, names)
    manager.checksums = checksums
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    state = jax.make_array_from_callback((8, 4), sharding, lambda i: np.zeros((8, 4), np.float32)[i])
    with opened() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": {"w": state}}, wait=True)
        assert checkpoints.latest() == 2
    jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_each_process_reads_a_share_of_a_save_back(tmp_path):
    """Process 0 reads what another one cannot."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    texts = [text for _, text in map(finish, [start(SHARES, tmp_path, port, index) for index in (0, 1)])]
    shares = [[int(line.split()[1]) for line in text.splitlines() if line.startswith("reads")] for text in texts]
    assert len(shares[0]) == 2 and len(shares[1]) == 1 and shares[0][0] - shares[1][0] in (0, 1), texts
    assert "process 0 reads what this one cannot" in texts[1]
    assert newest(tmp_path) == 2
