"""Checkpoints in a bucket, where nothing is renamed: Orbax and tensorstore against a stand-in of the service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import visor_jax.errors
from visor_jax.checkpoint.manager import Checkpoints, find_newest
from visor_jax.errors import RunError
from visor_jax.files.bucket import names_below
from visor_jax.testing.bucket import BucketServer, StoredObject

ROOT = Path(visor_jax.errors.__file__).parents[1]
Objects = dict[tuple[str, str], StoredObject]


def state(value: float) -> dict:
    return {
        "params": {"a": jnp.arange(24.0).reshape(4, 6) + value},
        "opt_state": (jnp.full((2,), value, jnp.bfloat16),),
    }


def opened(folder: Path, **changes) -> Checkpoints:
    return Checkpoints(folder, **{"identity": {"stage": "full"}, "keep": 2, "retry_seconds": 0.0, **changes})


def restored(folder: Path) -> tuple[int | None, dict | None]:
    with opened(folder) as checkpoints:
        step = checkpoints.latest()
        return step, None if step is None else checkpoints.restore(step, jax.eval_shape(lambda: state(0)))


def assert_holds(folder: Path, step: int) -> None:
    newest, tree = restored(folder)
    assert newest == step
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(state(step)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def saved(bucket_server: BucketServer) -> tuple[Path, Objects]:
    """A folder with steps 1 and 2, and its objects; `folder` brings them back for each test."""
    from visor_jax.files.read_write import as_path

    folder = as_path("gs://runs/saved/checkpoints")
    with opened(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"position": step})
    return folder, {name: stored for name, stored in bucket_server.objects.items() if name[1].startswith("saved/")}


@pytest.fixture
def folder(saved, bucket_server) -> Iterator[Path]:
    yield saved[0]
    put(bucket_server, saved[1])
    bucket_server.refused = None


def put(server: BucketServer, objects: Objects) -> None:
    with server.lock:
        for name in [name for name in server.objects if name[1].startswith("saved/")]:
            del server.objects[name]
        server.objects.update(objects)


def test_the_commit_is_the_last_object(folder, saved):
    assert_holds(folder, 2)
    order = sorted(saved[1], key=lambda name: saved[1][name].generation)
    steps = [[name for _, name in order if name.startswith(f"saved/checkpoints/{step}/")] for step in (1, 2)]
    for names in steps:
        assert names[-3].endswith("commit_success.txt") and names[-2].endswith("/manifest.json")
        assert names[-1].endswith("/commit.json")
    assert steps[0] + steps[1] == [name for _, name in order]


def test_a_save_cut_short_anywhere_is_not_used(folder, saved, bucket_server):
    objects = saved[1]
    order = sorted(objects, key=lambda name: objects[name].generation)
    first = sum("/checkpoints/1/" in name for _, name in order)
    for written in range(first, len(order)):
        put(bucket_server, {name: objects[name] for name in order[:written]})
        newest = find_newest(folder).manifest
        assert newest is not None and newest.step == 1, order[written]
        if written in (first + 1, len(order) - 2, len(order) - 1):
            with opened(folder) as checkpoints:
                assert checkpoints.latest() == 1
                checkpoints.save(2, state(2))
            assert_holds(folder, 2)
            assert {name for name in names_below(folder) if "_METADATA" in name}


def test_interrupted_saves_are_removed_at_the_start(folder, bucket_server):
    bucket_server.remove("runs", "saved/checkpoints/2/commit.json", {})
    bucket_server.remove("runs", "saved/checkpoints/2/arrays/commit_success.txt", {})
    bucket_server.write("runs", "saved/checkpoints/7/notes.txt", b"not a save")
    assert_holds(folder, 1)
    assert {name.partition("/")[0] for name in names_below(folder)} == {"1", "7"}


@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_damage_to_any_object_is_noticed_and_the_older_step_used(folder, saved, bucket_server, damage):
    names = [name for name in saved[1] if "/checkpoints/2/" in name[1]]
    for name in names[:: 1 if damage == "flipped" else 3]:
        put(bucket_server, saved[1])
        if damage == "removed":
            bucket_server.remove(*name, {})
        else:
            data = bytearray(bucket_server.read(*name))
            data[len(data) // 2] ^= 4
            bucket_server.write(*name, bytes(data))
        newest = find_newest(folder)
        assert newest.manifest is not None and newest.manifest.step == 1, name


def test_keeps_the_last_good_steps(bucket):
    with opened(bucket) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), wait=True)
    assert {name.partition("/")[0] for name in names_below(bucket)} == {"2", "3"}
    assert_holds(bucket, 3)


@pytest.mark.parametrize("answer", [(401, "no credentials"), (403, "denied")])
def test_a_failed_save_is_reported_and_retried(bucket, bucket_server, answer, caplog):
    checkpoints = opened(bucket)
    bucket_server.refused = answer
    checkpoints.save(1, state(1))
    with pytest.raises(RunError, match="the last checkpoint could not be saved"):
        checkpoints.wait()
    assert "saving failed (1 in a row)" in caplog.text
    bucket_server.refused = None
    assert checkpoints.poll()
    checkpoints.save(1, state(1), wait=True)
    checkpoints.close()
    assert_holds(bucket, 1)


TWO_PROCESSES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from visor_jax.checkpoint.manager import Checkpoints
    from visor_jax.commands.recipe import held
    from visor_jax.config import as_config
    from visor_jax.errors import RequestError
    from visor_jax.testing import tiny_config
    from visor_jax.workdir.folder import Workdir
    workdir, port, index = Workdir(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = as_config(tiny_config())
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, shutdown_timeout_seconds=30)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    value = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    make = lambda x: jax.make_array_from_callback((8, 4), sharding, lambda i: value[i] + x)
    with held(workdir, config), Checkpoints(workdir.path / "checkpoints", identity={}, keep=1) as checkpoints:
        try:
            with held(workdir, config):
                pass
        except RequestError as error:
            print("refused:", error)
        for step in (1, 2):
            checkpoints.save(step, {"params": {"w": make(step)}}, wait=True)
        assert checkpoints.latest() == 2
        like = {"params": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}}
        loaded = checkpoints.restore(2, like)["params"]["w"]
        for shard in loaded.addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index] + 2)
"""


@pytest.mark.slow
def test_two_processes_share_one_lock_and_save_one_step(bucket):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(bucket), str(port)]
    running = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True)
        for i in (0, 1)
    ]
    texts = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], texts
    assert all("refused:" in text and "is in use by another run" in text for text in texts), texts
    assert names_below(bucket)[-1] == "config.json"
    assert {name.partition("/")[0] for name in names_below(bucket / "checkpoints")} == {"2"}
    with opened(bucket / "checkpoints", identity={}) as checkpoints:  # in one process
        assert checkpoints.latest() == 2
        restored = checkpoints.restore(2, {"params": {"w": jnp.zeros((8, 4))}})["params"]["w"]
        np.testing.assert_array_equal(restored, np.arange(32.0).reshape(8, 4) + 2)
