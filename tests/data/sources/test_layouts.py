"""Every stored layout gives the same samples, splits and facts; what is wrong with a file is told in one line."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visor_jax.data.sample import SkipSample
from visor_jax.data.sources import parquet, source_kind
from visor_jax.data.sources.array_record import ArrayRecordShard
from visor_jax.data.sources.messages import with_markers
from visor_jax.data.sources.parquet import ParquetShard
from visor_jax.data.sources.stored import StoredSource
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config

_spec = importlib.util.spec_from_file_location("layouts", Path(__file__).with_name("layouts.py"))
assert _spec is not None and _spec.loader is not None
layouts: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


def opened(source: str, root: Path, path: str, split: str = "all", **data: Any) -> StoredSource:
    fields = {"source": source, "root": str(root), "path": path, "tiles": 4, "visual_length": 4 * 90, **data}
    config = tiny_config({"stages": ("full",), **{f"data.{name}": value for name, value in fields.items()}})
    result = source_kind(config).open(config, split)
    assert isinstance(result, StoredSource)
    return result


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_layout_gives_the_samples_of_llava_json(layout: str, tmp_path: Path) -> None:
    reference = opened("llava", tmp_path / "a", layouts.write_llava(tmp_path / "a"), test_fraction=0.25)
    source, write = layouts.LAYOUTS[layout]
    path = write(tmp_path / "b")
    other = opened(source, tmp_path / "b", path, test_fraction=0.25)
    assert len(other) == len(reference) == layouts.COUNT and other.duplicate_ids() == 0
    for index in range(len(reference)):
        mine, theirs = other[index], reference[index]
        assert (mine.id, mine.turns, mine.system) == (theirs.id, theirs.turns, theirs.system)
        assert len(mine.images) == len(theirs.images) == len(other.outline(index).images)
        assert all(np.array_equal(a, b) for a, b in zip(mine.images, theirs.images, strict=True))
        assert other.outline(index).turns == mine.turns
        assert other.record_facts(index) == reference.record_facts(index)
        assert other.splits_of(index) == reference.splits_of(index)
        assert other.encoded(index) == reference.encoded(index)
    copy = pickle.loads(pickle.dumps(other))  # as a worker process gets it
    assert np.array_equal(copy[0].images[0], other[0].images[0])


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("parquet", b"", "as Parquet: "),
        ("parquet", b"PAR1" + bytes(100), "as Parquet: "),
        ("parquet", b"[]", "as Parquet: "),
        ("parquet", {"id": ["a"], "caption": ["x"]}, "has the columns 'id', 'caption'; expected `conversations` or"),
        ("array_record", b"", "as ArrayRecord: it is not an ArrayRecord file, or it is cut off"),
        ("array_record", b"x" * 100_000, "it is not an ArrayRecord file"),
        ("messages", b"PAR1" + bytes(100), "as Parquet: "),
        ("messages", b"messages: []", "not JSON: expected"),
        ("llava", b"PAR1", "is a Parquet file; expected JSON: read it with data.source=parquet"),
    ],
)
def test_a_file_of_another_kind_is_a_wrong_request(source: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(pa.table(content), path)
    with pytest.raises(RequestError, match=message) as caught:
        opened(source, tmp_path, "file")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(RequestError, match=r"none|No such file"):
        opened(source, tmp_path, "none")


def test_a_damaged_part_costs_its_own_records(tmp_path: Path) -> None:
    path = tmp_path / layouts.write_parquet(tmp_path).replace("*", "00000-of-00002")
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    shard = ParquetShard(path)
    with pytest.raises(SkipSample, match="row group 0: ") as caught:
        shard.record(0)
    assert caught.value.reason == "broken_file" and shard.record(3)["id"] == "r3"


def test_a_cut_array_record_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a" / layouts.write_array_records(tmp_path / "a").replace("*", "00000-of-00002")
    assert len(ArrayRecordShard(path)) == 6
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 70_000])
    with pytest.raises(RequestError, match="as ArrayRecord: "):
        ArrayRecordShard(path)


def test_an_array_record_file_of_another_program_is_refused(tmp_path: Path) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "x"), "group_size:1")
    writer.write(pickle.dumps({"a": 1}))
    writer.close()
    with pytest.raises(RequestError, match=r"expected a file that visor data build --format=array_record wrote"):
        ArrayRecordShard(tmp_path / "x")


def test_row_groups_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = parquet._GroupCache(5000)
    monkeypatch.setattr(parquet, "_CACHE", cache)
    source = opened("parquet", tmp_path, layouts.write_parquet(tmp_path))
    for index in (*range(len(source)), 0, 11):
        source[index]
        assert len(cache._groups) == 1 or sum(table.nbytes for table in cache._groups.values()) <= 5000
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(RequestError, match=r"a row group of [\d,]+ bytes; expected at most 1,000: .* row_group_size"):
        opened("parquet", tmp_path, "*/train-*.parquet")


def test_ids_are_read_without_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layouts.write_parquet(tmp_path)
    read: Callable[..., pa.Table] = ParquetShard._read
    columns: list[str] = []

    def counted(self: ParquetShard, groups: Any, leaves: Any) -> pa.Table:
        columns.extend(leaves)
        return read(self, groups, leaves)

    monkeypatch.setattr(ParquetShard, "_read", counted)
    source = opened("parquet", tmp_path, path, "train", test_fraction=0.25)
    source.duplicate_ids()
    source.outline(0)
    assert set(columns) >= {"id", "image.path"} and not any("bytes" in column for column in columns)


@pytest.mark.parametrize(
    ("record", "markers"),
    [
        ({"images": ["a", "b"], "messages": [{"role": "user", "content": "Q"}]}, 2),
        ({"images": ["a", "b"], "messages": [{"role": "user", "content": "<image>Q"}]}, 1),
        ({"images": ["a"], "messages": [{"role": "user", "content": "Q"}]}, 0),
        ({"images": ["a", "b"], "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}, 2),
        ({"images": ["a", "b"], "messages": ["Q"]}, None),
        ({"images": ["a", 3], "messages": [{"role": "user", "content": "Q"}]}, 0),
        ("text", None),
    ],
)
def test_pictures_without_markers_come_before_the_first_question(record: Any, markers: int | None) -> None:
    changed = with_markers(record)
    if markers is None:
        assert changed == record
    else:
        assert changed["messages"][-1]["content"].count("<image>") == markers
