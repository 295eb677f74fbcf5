"""Checkpoints: saved steps are restored, damaged ones never, and a failed save is always reported."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.checkpoint import manager as module
from visor_jax.checkpoint.manager import Checkpoints, find_newest
from visor_jax.checkpoint.manifest import Manifest
from visor_jax.checkpoint.restoring import restore_complete
from visor_jax.errors import RequestError, RunError
from visor_jax.workdir.folder import Workdir

IDENTITY = {"stage": "full", "config": {"model.text.num_layers": 6}, "data": ""}


class Adam(NamedTuple):
    """A container that is not registered with Orbax."""

    steps: jax.Array
    mu: dict


def make_state(value: float = 0.0) -> dict:
    params = {
        "blocks": {
            "text": {"kernel": jnp.arange(24.0).reshape(4, 6) + value},
            "gate": jnp.full((2,), value, jnp.bfloat16),
        },
        "norm": {"scale": jnp.ones((6,)) * value},
    }
    return {
        "params": params,
        "opt_state": (Adam(jnp.int32(value), {"blocks/text/kernel": jnp.ones((4, 6)) * value}), ()),
    }


def assert_trees_equal(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def opened(folder: Path, **changes) -> Checkpoints:
    return Checkpoints(folder, **{"identity": IDENTITY, "keep": 2, "retry_seconds": 0.0, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with valid steps 1 and 2; tests must not change it (`copied` is a copy that they may change)."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with opened(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"position": 10 * step})
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


# --- saved steps are restored -----------------------------------------------------------------------------------------


def test_state_and_meta_come_back_exactly(saved):
    with opened(saved) as checkpoints:
        assert checkpoints.latest() == 2
        assert checkpoints.skipped == []
        assert checkpoints.meta(2) == {"position": 20}
        assert_trees_equal(checkpoints.restore(2, jax.eval_shape(make_state)), make_state(2))


def test_names_on_disk_are_those_of_the_parameters(saved):
    tree = newest(saved).tree
    assert tree["params/blocks/text/kernel"] == [[4, 6], "float32"]
    assert tree["params/blocks/gate"] == [[2], "bfloat16"]
    assert tree["opt_state/0/mu/blocks/text/kernel"] == [[4, 6], "float32"]


def test_a_save_in_the_background_holds_its_own_step_though_the_next_overwrites_the_arrays(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 512))}}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(20):
            state = advance(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert float(checkpoints.restore(1, state)["params"]["w"].sum()) == 0.0


def test_an_empty_folder_has_no_latest_step(tmp_path):
    with opened(tmp_path / "none" / "yet") as checkpoints:
        assert checkpoints.latest() is None


def test_keeps_the_last_good_steps(tmp_path):
    with opened(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, {"params": {"w": jnp.ones(3)}}, wait=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "15"]


def test_a_damaged_step_does_not_count_as_kept(copied):
    flip(copied / "2" / "manifest.json")
    with opened(copied, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(3, make_state(3), wait=True)
    assert (copied / "1").exists(), "steps 3 and 1 are the two valid ones"


def test_saving_a_step_again_replaces_a_damaged_one(copied):
    flip(copied / "2" / "manifest.json")
    with opened(copied) as checkpoints:
        checkpoints.save(2, make_state(7), wait=True)
        assert checkpoints.latest() == 2
        assert_trees_equal(checkpoints.restore(2, make_state()), make_state(7))


def test_parameters_are_restored_alone(saved):
    with opened(saved) as checkpoints:
        restored = checkpoints.restore(2, {"params": make_state()["params"]})
    assert_trees_equal(restored, {"params": make_state(2)["params"]})


def test_a_stage_that_never_ran_is_not_complete(tmp_path):
    with pytest.raises(RequestError, match="stage 'base' is not complete; run it first"):
        restore_complete(Workdir(tmp_path), "base", make_state()["params"])


# --- damaged steps are never restored ---------------------------------------------------------------------------------


def newest(folder: Path) -> Manifest:
    manifest = find_newest(folder).manifest
    assert manifest is not None
    return manifest


def flip(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["bit flipped", "truncated", "removed"])
def test_damage_to_any_file_is_noticed_and_the_older_step_used(saved, tmp_path, caplog, damage):
    names = [path.relative_to(saved) for path in files_of(saved / "2")]
    assert len(names) > 5
    for number, name in enumerate(names):
        folder = shutil.copytree(saved, tmp_path / str(number))
        damage(folder / name)
        caplog.clear()
        restored = find_newest(folder)
        assert restored.manifest is not None and restored.manifest.step == 1, f"{name} was damaged"
        assert [step for step, _ in restored.skipped] == [2]
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1 and "skipped" in warnings[0], warnings


def test_a_flipped_bit_in_the_arrays_is_named(copied):
    largest = max(files_of(copied / "2" / "arrays"), key=lambda path: path.stat().st_size)
    flip(largest)
    with opened(copied) as checkpoints:
        assert checkpoints.latest() == 1
        ((step, reason),) = checkpoints.skipped
        assert step == 2 and largest.name in reason and "checksum" in reason
        assert_trees_equal(checkpoints.restore(1, make_state()), make_state(1))


def test_what_only_looks_like_a_step_is_ignored(copied, tmp_path):
    (copied / "3").mkdir()
    (copied / "99999999999").mkdir()
    (copied / "4").symlink_to(copied / "2")
    (copied / "5").write_text("a file")
    (copied / "007").mkdir()
    (copied / "notes").mkdir()
    with opened(copied) as checkpoints:
        assert checkpoints.latest() == 2
        assert [step for step, _ in checkpoints.skipped] == [99999999999, 5, 4, 3]


def test_a_step_under_another_number_is_not_believed(copied):
    shutil.copytree(copied / "1", copied / "9")
    assert newest(copied).step == 2


def test_a_step_that_is_a_link_is_not_followed(copied, tmp_path):
    (copied / "2").rename(tmp_path / "2")
    (copied / "2").symlink_to(tmp_path / "2")
    assert newest(copied).step == 1


def test_a_link_in_a_step_is_not_followed(copied, tmp_path):
    target = files_of(copied / "2" / "arrays")[0]
    outside = tmp_path / "outside"
    shutil.copy(target, outside)
    target.unlink()
    target.symlink_to(outside)
    restored = find_newest(copied)
    assert restored.manifest and restored.manifest.step == 1 and "symbolic link" in restored.skipped[0][1]


def test_saves_cut_short_are_cleaned_up_at_the_start(copied):
    (copied / "3" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    with opened(copied) as checkpoints:
        assert not (copied / "3").exists()
        assert checkpoints.latest() == 2


def test_all_steps_damaged_is_an_error_and_nothing_restarts(copied):
    for step in ("1", "2"):
        flip(copied / step / "manifest.json")
    with opened(copied) as checkpoints, pytest.raises(RunError, match=r"no step can be trusted \(step 2.*step 1"):
        checkpoints.latest()


def test_an_interrupted_first_save_starts_again(tmp_path):
    (tmp_path / "10" / "arrays").mkdir(parents=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None


# --- another state, configuration, format -----------------------------------------------------------------------------


def test_another_dtype_is_refused_not_cast(saved):
    wanted = make_state()
    wanted["params"]["norm"]["scale"] = jnp.ones((6,), jnp.bfloat16)
    with (
        opened(saved) as checkpoints,
        pytest.raises(RequestError, match=r"params/norm/scale is float32, expected bfloat16"),
    ):
        checkpoints.restore(2, wanted)


def test_other_names_and_shapes_are_named(saved):
    wanted = make_state()
    wanted["params"]["blocks"]["text"] = {"weight": jnp.ones((4, 6))}
    wanted["params"]["norm"]["scale"] = jnp.ones((7,))
    with opened(saved) as checkpoints, pytest.raises(RequestError) as error:
        checkpoints.restore(2, wanted)
    for part in ("text/weight is missing", "text/kernel is not expected", "norm/scale has shape (6,), expected (7,)"):
        assert part in str(error.value)


def test_another_configuration_is_refused_by_field(saved):
    other = {**IDENTITY, "config": {"model.text.num_layers": 8}}
    with opened(saved, identity=other) as checkpoints:
        with pytest.raises(RequestError, match=r"model\.text\.num_layers is 6 there and 8 here"):
            checkpoints.latest()
        with pytest.raises(RequestError, match=r"model\.text\.num_layers"):
            checkpoints.restore(2, make_state())


def test_a_step_of_a_version_without_a_field_has_its_default(tmp_path):
    fields = {"train.steps": 4, "model.text.num_layers": 6}
    with opened(
        tmp_path, identity={"stage": "full", "config": fields, "config_hash": "old", "data": ""}
    ) as checkpoints:
        checkpoints.save(1, make_state(), wait=True)
    for decay in (0.0, 0.9):
        now = {"stage": "full", "config": {**fields, "train.ema_decay": decay}, "config_hash": "new", "data": ""}
        with opened(tmp_path, identity=now) as checkpoints:
            if not decay:
                assert checkpoints.latest() == 1
                continue
            with pytest.raises(RequestError, match=r"dataset: train.ema_decay is 0.0 there and 0.9 here; expected"):
                checkpoints.latest()


def test_a_step_is_resumed_where_the_tokenizer_lies_elsewhere(tmp_path):
    for place, file in (("a", "tokenizer.json"), ("b", "tokenizer.json"), ("b", "other.json")):
        fields = {"tokenizer.path": f"/{place}/{file}"}
        with opened(tmp_path, identity={"stage": "full", "config": fields, "tokenizer": "sha"}) as checkpoints:
            if place == "a":
                checkpoints.save(1, make_state(), wait=True)
            elif file == "tokenizer.json":
                assert checkpoints.latest() == 1
            else:
                with pytest.raises(RequestError, match=r"tokenizer.path is \"/a/tokenizer.json\" there"):
                    checkpoints.latest()


def test_another_dataset_is_refused(saved):
    with (
        opened(saved, identity={**IDENTITY, "data": "abc"}) as checkpoints,
        pytest.raises(RequestError, match="data is"),
    ):
        checkpoints.latest()


def test_another_format_is_refused_not_skipped(copied, monkeypatch):
    monkeypatch.setattr("visor_jax.checkpoint.manifest.READS", (3,))
    with opened(copied) as checkpoints, pytest.raises(RequestError, match="format 2; this version reads 3"):
        checkpoints.latest()


def test_little_is_copied_at_once_and_nothing_changes(tmp_path):
    """With memory limited to the largest array, as in an import, restored arrays equal the saved ones."""
    state = {"params": {"a": jnp.arange(70_000.0).reshape(100, 700), "b": [jnp.ones(3), jnp.zeros((5, 70))]}}
    with Checkpoints(tmp_path, identity=IDENTITY, keep=1, copied_bytes=280_000) as checkpoints:
        checkpoints.save(0, state, wait=True)
    with opened(tmp_path, keep=1) as checkpoints:
        assert_trees_equal(checkpoints.restore(0, state), state)


def test_of_a_step_that_is_a_link_only_the_link_is_removed(tmp_path):
    """Whether it is too old to be kept, or where a step is saved: what it leads to keeps its commit marker."""
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    with opened(elsewhere, keep=1) as checkpoints:
        checkpoints.save(9, make_state(9), wait=True)
    with opened(folder, keep=1) as checkpoints:
        checkpoints.save(2, make_state(2), wait=True)
        for name, target in {"0": folder / "2", "1": elsewhere / "9", "3": elsewhere / "9", "4": "/nowhere"}.items():
            (folder / name).symlink_to(target)
        (folder / "5").write_text("x")
        for step in (3, 4, 5):
            checkpoints.save(step, make_state(step), wait=True)
    assert sorted(path.name for path in folder.iterdir()) == ["5"] and newest(folder).step == 5
    assert newest(elsewhere).step == 9


# --- failed saves -----------------------------------------------------------------------------------------------------


class Unwritable:
    """A saver whose next `left` saves fail because the disk is full."""

    left = 0

    def __init__(self, copied_bytes: int | None = None) -> None:
        self.inner = module_saver(copied_bytes)

    def start(self, place, tree):
        self.inner.start(place, tree)

    def wait(self):
        self.inner.wait()
        if Unwritable.left:
            Unwritable.left -= 1
            raise OSError(28, "No space left on device")

    def close(self):
        self.inner.close()


module_saver = module.ArraySaver


@pytest.fixture
def unwritable(monkeypatch):
    monkeypatch.setattr(module, "ArraySaver", Unwritable)
    yield Unwritable
    Unwritable.left = 0


def settled(checkpoints: Checkpoints) -> bool:
    """Waits for the pending save, then calls `poll`."""
    pending = checkpoints._pending
    assert pending is not None
    pending[1].exception()
    return checkpoints.poll()


def test_a_failed_save_is_reported_at_the_next_step_and_retried(tmp_path, unwritable, caplog):
    unwritable.left = 1
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        assert settled(checkpoints) is True
        assert "No space left" in caplog.text
        assert not (tmp_path / "1").exists(), "files of a failed save are removed"
        checkpoints.save(2, make_state(2))
        assert settled(checkpoints) is False
        assert checkpoints.latest() == 2


def test_the_systems_reason_is_said_also_at_the_end_of_a_long_message():
    """tensorstore puts it behind names and specifications of hundreds of characters."""
    error = ValueError(f"RESOURCE_EXHAUSTED: Error writing {'x' * 400} [OS error 28: ENOSPC No space left on device]")
    assert module._one_line(error).startswith("ValueError: No space left on device: RESOURCE_EXHAUSTED: Error")
    assert len(module._one_line(error)) < 300
    assert module._one_line(ValueError("short\n text")) == "ValueError: short text"


def test_a_save_that_is_waited_for_is_retried_until_it_succeeds(tmp_path, unwritable):
    unwritable.left = module.SAVE_ATTEMPTS - 1
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        assert checkpoints.latest() == 1


def test_too_many_failures_in_a_row_end_the_run_and_keep_the_older_step(copied, unwritable):
    unwritable.left = 99
    with pytest.raises(RunError, match=r"3 in a row.*No space left"), opened(copied) as checkpoints:
        checkpoints.save(3, make_state(3), wait=True)
    assert newest(copied).step == 2


def test_a_save_that_could_not_be_read_is_never_committed(tmp_path):
    folder = tmp_path / "run[1]"  # Orbax looks for the files that it has written by a pattern, and finds none here
    with pytest.raises(RunError, match=r"written no arrays/opt_state/manifest.ocdbt"), opened(folder) as checkpoints:
        checkpoints.save(1, make_state(), wait=True)
    assert find_newest(folder).manifest is None


def test_a_failed_last_save_is_no_clean_end(tmp_path, unwritable):
    unwritable.left = 1
    with pytest.raises(RunError, match="could not be saved"), opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))


def test_an_error_in_the_block_is_not_hidden_by_a_failed_save(tmp_path, unwritable):
    unwritable.left = 1
    with pytest.raises(KeyError), opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        raise KeyError
