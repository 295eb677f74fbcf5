"""Checkpoints in a bucket, where nothing is renamed: Orbax and tensorstore against a stand-in of the service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.checkpoint.manager import Checkpoints, find_newest
from visor_jax.errors import RunError
from visor_jax.files.bucket import names_below
from visor_jax.testing.bucket import BucketServer, StoredObject

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
