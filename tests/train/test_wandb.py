"""The package wandb itself, offline: what it stores is what `metrics.jsonl` holds, from one process, also after a stop.

Its files are logs of LevelDB's format around its own protocol buffers; the package brings no reader for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.whole_run import environment
from visor_jax.errors import STOPPED
from visor_jax.testing.processes import Processes
from visor_jax.train.metrics import numbers_of
from visor_jax.workdir.metrics_log import read_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed"),
]

CONFIG = """
from visor_jax.testing import tiny_config
def get_config():
    return tiny_config({"stages": ("full",), "stage_overrides.full.init_from": "", "train.checkpoint_every": 1,
                        "train.wandb_project": "visor"}, steps=4)
"""
FILE_HEADER, BLOCK, CHUNK_HEADER = 7, 2**15, 7
COMPLETE = (1, 4)  # kinds of chunks that end a record: whole, last


def records(path: Path) -> Iterator[Any]:
    """Yields the records of a file that wandb has written offline."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, parts = path.read_bytes(), FILE_HEADER, b""
    assert data[:4] == b":W&B"
    while place + CHUNK_HEADER <= len(data):
        if (left := BLOCK - place % BLOCK) < CHUNK_HEADER:  # the end of a block that is too short for a chunk
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + CHUNK_HEADER : place + CHUNK_HEADER + size]
        place += CHUNK_HEADER + size
        if kind in COMPLETE:
            record = messages.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of one file, by the names that were logged."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def train(folder: Path, compiled: str, **more: str) -> list[int]:
    """Runs the stage in two processes; returns their exit statuses."""
    arguments = ["train", f"--config={folder}/tiny.py", "--config.stage=full", f"--workdir={folder}/run"]
    variables = environment(compiled, WANDB_MODE="offline", **more)
    variables.pop("WANDB_DIR", None)
    with Processes(arguments, environment=variables) as processes:
        ended = processes.wait(500)
    print(*(process.output[-1500:] for process in ended), sep="\n")
    return [process.status for process in ended]


def test_offline_files_hold_the_rows_of_process_0_under_one_id(tmp_path: Path, compiled: str) -> None:
    (tmp_path / "tiny.py").write_text(CONFIG)
    stopped = train(tmp_path, compiled, VISOR_TEST_KILL_AT="dispatched:2", VISOR_TEST_SIGNAL="SIGTERM")
    assert stopped == [STOPPED, STOPPED]
    assert train(tmp_path, compiled) == [0, 0]

    files = sorted((tmp_path / "run" / "full" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one of each start, both of process 0"
    starts = [next(r.run for r in records(file) if r.WhichOneof("record_type") == "run") for file in files]
    assert {(run.run_id, run.project, run.display_name) for run in starts} == {
        (files[0].stem.removeprefix("run-"), "visor", "tiny/full")
    }
    assert [next(r.exit.exit_code for r in records(f) if r.WhichOneof("record_type") == "exit") for f in files] == [
        1,
        0,
    ]

    rows = read_rows(tmp_path / "run" / "full" / "metrics.jsonl")
    parts = [history(file) for file in files]
    assert all(parts) and [row["_step"] for part in parts for row in part] == [1, 2, 3, 4]
    for row, logged in zip(rows, parts[0] + parts[1], strict=True):
        assert logged["_step"] == row["step"]
        own = {name: value for name, value in logged.items() if not name.startswith("_")}
        assert own == pytest.approx(numbers_of(row))
        print(row["step"], len(own), own["loss"], row["loss"])
