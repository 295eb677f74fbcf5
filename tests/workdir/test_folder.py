"""The workdir: complete files, one run at a time, one configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import visor_jax.errors
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json
from visor_jax.workdir.folder import RANDOM_NUMBERS, Workdir
from visor_jax.workdir.lock import WorkdirLock, this_process

ROOT = Path(visor_jax.errors.__file__).parents[1]


def make_config(**changes) -> dict:
    config = {
        "name": "mini",
        "stage": "",
        "seed": 0,
        "tokenizer": {"path": "almanac"},
        "model": {"text": {"num_layers": 6}, "pinpoints": ((1, 1), (2, 2))},
        "data": {"source": "almanac", "root": "", "path": "", "batch_size": 8},
        "mesh": {"fsdp": -1},
        "train": {"learning_rate": 1e-3, "checkpoint_every": 100},
        "stage_overrides": {"full": {"steps": 10}, "policy": {"steps": 5}},
        "search": {"samples": 64},
    }
    tree = ConfigDict(config)
    tree.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return tree.to_dict()


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "a\nb", "a\0b", "gs:/bucket/run", "gs:run"])
def test_unusable_paths_are_refused(path):
    with pytest.raises(RequestError, match="--workdir"):
        Workdir(path)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written: File exists"):
        Workdir(tmp_path / "file").create()
    with pytest.raises(RequestError, match="cannot be written: Not a directory"):
        Workdir(tmp_path / "file" / "below").create()


@pytest.mark.parametrize("name", ["run[1]", "a*", "what?", "a\\b"])
def test_a_folder_whose_checkpoints_would_lack_files_is_refused(tmp_path, name):
    for path in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(RequestError, match=r"--workdir=.*checkpoints cannot be saved below a folder with '.*' in"):
            Workdir(path).create()
    assert not any(tmp_path.iterdir())


def test_create_leaves_nothing_behind(tmp_path):
    Workdir(tmp_path / "new" / "run").create()
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_stage_is_complete_when_marked(tmp_path):
    stage = Workdir(tmp_path).stage("full")
    assert not stage.is_complete()
    stage.mark_complete({"step": 10})
    assert stage.is_complete() and read_json(tmp_path / "full" / "complete.json") == {"step": 10}


# --- the configuration ------------------------------------------------------------------------------------------------


def test_config_json_holds_configuration_versions_and_revision(tmp_path):
    Workdir(tmp_path).claim(make_config())
    record = read_json(tmp_path / "config.json")
    assert record.keys() == {"config", "versions", "git_revision", "format", "random_numbers"}
    assert record["config"]["model"] == {"text": {"num_layers": 6}, "pinpoints": [[1, 1], [2, 2]]}
    assert "jax" in record["versions"] and isinstance(record["git_revision"], str)
    assert Workdir(tmp_path).config() == record["config"]


def test_the_same_configuration_may_come_back_and_free_fields_may_change(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim(make_config())
    workdir.claim(make_config())
    workdir.claim(make_config(stage="policy", mesh__fsdp=8, train__checkpoint_every=5, data__workers=2))
    assert workdir.config()["mesh"] == {"fsdp": 8}


def test_a_workdir_keeps_the_random_numbers_that_it_was_begun_with(tmp_path):
    """A workdir of an older version stays valid: its checkpoints keep their identity."""
    workdir, config = Workdir(tmp_path / "old"), make_config()
    workdir.claim(config)
    record = read_json(workdir.path / "config.json")
    assert workdir.identity(config, "full")["random_numbers"] == record.pop("random_numbers") == RANDOM_NUMBERS
    workdir.check_random_numbers()
    write_json(workdir.path / "config.json", record)  # written by the first version
    workdir.claim(config)
    assert workdir.random_numbers() == 1 and "random_numbers" not in workdir.identity(config, "full")
    with pytest.raises(RequestError, match=r"other random numbers \(random_numbers is 1 there and") as error:
        workdir.check_random_numbers()
    assert "\n" not in str(error.value)
    assert Workdir(tmp_path / "new").random_numbers() == RANDOM_NUMBERS


def test_another_configuration_is_refused_by_field(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim(make_config())
    with pytest.raises(RequestError) as error:
        workdir.claim(make_config(model__text__num_layers=8, seed=1))
    assert "model.text.num_layers is 6 there and 8 here" in str(error.value)
    assert "seed is 0 there and 1 here" in str(error.value)
    assert "\n" not in str(error.value)
    assert workdir.config()["seed"] == 0


def test_many_differences_stay_one_short_line(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.claim({**make_config(), "more": {f"field{i}": i for i in range(40)}})
    with pytest.raises(RequestError, match="and 35 more") as error:
        workdir.claim(make_config())
    assert len(str(error.value)) < 700


def test_a_damaged_or_missing_config_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        Workdir(tmp_path).config()
    write_json(tmp_path / "config.json", {"config": {}, "format": 99})
    with pytest.raises(RequestError, match="format 99, expected 1"):
        Workdir(tmp_path).config()
    write_json(tmp_path / "config.json", [])
    with pytest.raises(RequestError, match="expected an object"):
        Workdir(tmp_path).claim(make_config())


def test_identity_follows_what_shapes_a_stage_and_nothing_else(tmp_path):
    workdir = Workdir(tmp_path)
    identity = workdir.identity(make_config(), "full")
    for same in (
        make_config(stage="full"),
        make_config(mesh__fsdp=4),
        make_config(stage_overrides__policy__steps=9),
        make_config(search__samples=1),
        make_config(train__checkpoint_every=1),
    ):
        assert workdir.identity(same, "full") == identity
    for other in (
        make_config(seed=1),
        make_config(model__text__num_layers=8),
        make_config(data__batch_size=4),
        make_config(stage_overrides__full__steps=11),
        make_config(train__learning_rate=1e-4),
    ):
        assert workdir.identity(other, "full")["config_hash"] != identity["config_hash"]
    assert workdir.identity(make_config(), "policy") != identity


def test_identity_notices_that_the_data_changed(tmp_path):
    (tmp_path / "train.json").write_text("[1]")
    (tmp_path / "tokenizer.json").write_text("{}")
    config = make_config(data__source="llava", data__root=str(tmp_path), data__path="{split}.json")
    config["tokenizer"] = {"path": str(tmp_path / "tokenizer.json")}
    first = Workdir(tmp_path).identity(config, "full")
    for file in ("train.json", "tokenizer.json"):
        (tmp_path / file).write_text("[2]")
        second = Workdir(tmp_path).identity(config, "full")
        key = file.removesuffix(".json").replace("train", "data")
        assert first["config"] == second["config"] and first[key] != second[key]


def test_a_workdir_goes_on_where_the_tokenizer_lies_elsewhere(tmp_path):
    """As on a machine of a pod, after `import` on a workstation."""
    workdir, configs = Workdir(tmp_path / "run"), {}
    for place, text in (("here", "{}"), ("there", "{}"), ("changed", "{ }")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tokenizer.json").write_text(text)
        configs[place] = make_config(data__source="llava", tokenizer__path=str(tmp_path / place / "tokenizer.json"))
    workdir.create()
    workdir.claim(configs["here"])
    workdir.claim_data(configs["here"])
    identity = workdir.identity(configs["here"], "full")
    workdir.claim(configs["there"])
    workdir.claim_data(configs["there"])
    assert workdir.differences("full", identity) == []
    assert workdir.config()["tokenizer"]["path"] == str(tmp_path / "there" / "tokenizer.json")
    with pytest.raises(RequestError, match="tokenizer is "):
        workdir.claim_data(configs["changed"])
    with pytest.raises(RequestError, match=r"tokenizer\.path is .* there and .almanac. here"):
        workdir.claim(make_config(data__source="llava", tokenizer__path="almanac"))


# --- the lock ---------------------------------------------------------------------------------------------------------


def lock_at(path: Path, **changes) -> WorkdirLock:
    return WorkdirLock(path / "lock.json", **{"beat_seconds": 0.05, "watch_seconds": 0.3, **changes})


def test_two_runs_cannot_share_a_workdir(tmp_path):
    with lock_at(tmp_path):
        with pytest.raises(RequestError, match=rf"in use by another run \(host .*, process {os.getpid()}\)"):
            lock_at(tmp_path).__enter__()
        assert (tmp_path / "lock.json").exists()
    assert not (tmp_path / "lock.json").exists()
    with lock_at(tmp_path):
        pass


def test_a_killed_run_does_not_keep_the_lock(tmp_path, caplog):
    script = """
        import os, signal, sys
        from pathlib import Path
        from visor_jax.workdir.lock import WorkdirLock
        with WorkdirLock(Path(sys.argv[1]) / "lock.json"):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -9
    assert (tmp_path / "lock.json").exists()
    with lock_at(tmp_path):
        assert "taken over from a dead run" in caplog.text


def leave(path: Path, **changes) -> None:
    (path / "lock.json").write_text(json.dumps({**this_process(), "token": "x", "beat": 0, **changes}))


def test_a_process_id_given_out_again_is_not_taken_for_the_dead_run(tmp_path):
    leave(tmp_path, started="1")
    with lock_at(tmp_path):
        pass


def test_a_lock_of_another_machine_without_a_heartbeat_is_taken_over(tmp_path):
    leave(tmp_path, host="elsewhere")
    with lock_at(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_with_a_heartbeat_is_respected(tmp_path):
    leave(tmp_path, host="elsewhere")
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            write_json(tmp_path / "lock.json", {**this_process(), "host": "elsewhere", "token": "x", "beat": number})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RequestError, match="host elsewhere"):
            lock_at(tmp_path).__enter__()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_no_run_wrote_is_no_obstacle(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    with lock_at(tmp_path):
        pass


def test_only_one_of_many_takes_over(tmp_path, race):
    leave(tmp_path, pid=2**22 + 1)
    got, refused = race(lambda: lock_at(tmp_path), 8)
    assert (len(got), len(refused)) == (1, 7)
    got[0].__exit__(None, None, None)
