"""Hostile and damaged files of every stored layout: one line or a skipped record, never another error, no code run.

Whole files are damaged at random, and values of every kind stand where texts and pictures belong. A pickle that writes
a file when it is loaded, the canary, is put wherever a format holds bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.sources.layouts import LAYOUTS
from visor_jax.config import Config, as_config
from visor_jax.data.check import check
from visor_jax.data.from_config import make_source, make_tokenizer, sample_encoder, training_row_shape
from visor_jax.data.sample import SkipSample, outline
from visor_jax.data.source_kind import RecordSource
from visor_jax.data.sources.stored import Reading, RecordList, StoredSource
from visor_jax.errors import RequestError, one_line
from visor_jax.testing import tiny_config

MOST_RECORDS = 20
few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def config_of(source: str, root: Path, path: str, **fields: Any) -> Config:
    given = {"source": source, "root": str(root), "path": path, "tiles": 8, "text_length": 300, **fields}
    changes = {"stages": ("full",)} | {f"data.{name}": value for name, value in given.items()}
    return as_config(tiny_config(changes))


def read_everything(config: Config) -> list[str]:
    """Returns what became of each record: "used", or the reason why it is skipped; ["2"] if the file is refused."""
    try:
        source = make_source(config, "all")
    except RequestError as error:
        assert one_line(str(error)).startswith(("data.", config.data.root)) and len(str(error)) < 1000
        return ["2"]
    assert isinstance(source, RecordSource)
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    try:
        source.duplicate_ids()
        [*map(source.splits_of, range(len(source)))]
    except RequestError as error:
        assert "ids cannot be read" in one_line(str(error))
        return ["2"]
    outcomes = []
    for index in range(min(len(source), MOST_RECORDS)):
        source.record_facts(index)
        [*source.picture_files(index)]
        with contextlib.suppress(SkipSample):
            outline(source, index)
        try:
            encode(source[index])
            outcomes.append("used")
        except SkipSample as why:
            assert why.reason
            outcomes.append(why.reason)
    return outcomes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path, str, list[Path]]]:
    """Every layout: its source, root, path and files of records."""
    made = {}
    for name, (source, write) in LAYOUTS.items():
        root = tmp_path_factory.mktemp("sound") / "data"
        path = write(root)
        files = sorted(file for file in root.rglob("*") if file.is_file() and file.parent.name != "images")
        made[name] = (source, root, path, files)
    return made


# --- damage -----------------------------------------------------------------------------------------------------------

places = st.floats(0, 1, exclude_max=True)
edits = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat", "drop"]), places, st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes: Sequence[tuple[str, float, bytes]]) -> bytes:
    for kind, where, data in changes:
        place = int(where * len(content))
        before, after = content[:place], content[place:]
        if kind == "flip":
            content = before + data[: len(after)] + after[len(data) :]
        elif kind == "cut":
            content = before
        elif kind == "insert":
            content = before + data + after
        elif kind == "repeat":
            content = before + after[: 8 * len(data)] + after
        else:
            content = before + after[len(data) :]
    return content


@pytest.mark.parametrize("name", [*LAYOUTS])
@few
@given(changes=edits)
@example(changes=[("cut", 0.0, b"x")])
@example(changes=[("cut", 0.999, b"x")])
@example(changes=[("flip", 0.0, b"\x80\x04")])
def test_damaged_files(name: str, sound: dict[str, Any], changes: list[tuple[str, float, bytes]]) -> None:
    source, root, path, files = sound[name]
    assert "used" in read_everything(config_of(source, root, path))
    content = files[0].read_bytes()
    times = files[0].stat()
    try:
        files[0].write_bytes(damaged(content, changes))
        read_everything(config_of(source, root, path))
    finally:
        files[0].write_bytes(content)
        os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "animated GIF", "array"])
@few
@given(changes=edits)
def test_damaged_pictures_and_videos(format: str, changes: list[tuple[str, float, bytes]], tmp_path: Path) -> None:
    """A record that holds the file, as Parquet and ArrayRecord do; what decodes is a picture of bounded size."""
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (24, 16), color) for color in ("red", "green", "blue")]
    if format == "array":
        np.save(buffer, np.zeros((3, 16, 24, 3), np.uint8))
    else:
        more = {"save_all": True, "append_images": pictures[1:]} if format.startswith("animated") else {}
        pictures[0].save(buffer, format.split()[-1], **more)
    key, marker = ("video", "<video>") if format in ("animated GIF", "array") else ("image", "<image>")
    talk = [{"from": "human", "value": f"{marker}What?"}, {"from": "gpt", "value": "x"}]
    held = {"bytes": damaged(buffer.getvalue(), changes), "path": "a"}
    reading = Reading(max_image_pixels=10_000, split="all")
    source = StoredSource(
        "held", [RecordList(tmp_path / "held", [{key: held, "conversations": talk}])], tmp_path, reading
    )
    try:
        (image,) = source[0].images
    except SkipSample as why:
        assert why.reason and why.detail
    else:
        assert image.dtype == np.uint8 and image.shape[-1] == 3 and 0 < image[..., 0].size <= 20_000


def test_a_damaged_page_of_a_table_without_pictures_costs_its_rows_only(tmp_path: Path) -> None:
    """Ids of such a table are read with the whole row."""
    rows = [
        {"id": f"r{n}", "conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "x" * 40}]}
        for n in range(8)
    ]
    file = tmp_path / "text.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4, compression="none")
    content = file.read_bytes()
    place = pq.ParquetFile(file).metadata.row_group(1).column(1).data_page_offset
    file.write_bytes(content[:place] + bytes(16) + content[place + 16 :])
    assert read_everything(config_of("parquet", tmp_path, file.name)) == ["used"] * 4 + ["broken_file"] * 4
    config = config_of("parquet", tmp_path, file.name, max_skipped_fraction=0.5, test_fraction=0.0)
    result = check(config, {"all": make_source(config, "all")}, None, whole=True)
    assert result["skipped"] == {"broken_file": 4} and "text.parquet[4]" in result["first"]["broken_file"]


# --- values of every kind ---------------------------------------------------------------------------------------------

ROLES = ["human", "gpt", "user", "assistant", "system", "tool", ""]
TEXTS = ["<image>", "<image>\nx", "yes", "", " ", "\0", "<|im_end|>", "images/0.png", "../../etc/passwd", "<video>"]
texts = st.sampled_from(TEXTS) | st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image", "path", "bytes", "from", "value", "url"]), inner)
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(ROLES), "value": texts | json_values})
    | st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts | json_values})
    | json_values,
    max_size=4,
)
records = json_values | st.dictionaries(
    st.sampled_from(["id", "image", "images", "video", "system", "data_source", "conversations", "messages"]),
    json_values | messages,
)


@pytest.mark.parametrize("source", ["llava", "messages"])
@few
@given(values=st.lists(records, min_size=1, max_size=4), as_lines=st.booleans())
def test_json_of_any_values(
    source: str, sound: dict[str, Any], tmp_path: Path, values: list[Any], as_lines: bool
) -> None:
    """NaN and Infinity are written as Python writes them, which is not JSON."""
    text = "\n".join(map(json.dumps, values)) if as_lines else json.dumps(values)
    file = tmp_path / "any.json"
    file.write_text(text)
    read_everything(config_of(source, sound["llava"][1], str(file)))


columns = st.sampled_from(
    [
        pa.string(), pa.binary(), pa.int64(), pa.float64(), pa.bool_(), pa.null(), pa.timestamp("s"), pa.date32(),
        pa.large_string(), pa.list_(pa.string()), pa.list_(pa.int8()), pa.map_(pa.string(), pa.string()),
        pa.decimal128(5, 2), pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        pa.struct({"bytes": pa.string(), "path": pa.int32()}), pa.list_(pa.struct({"bytes": pa.binary()})),
        pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})),
        pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(pa.string())})),
        pa.list_(pa.list_(pa.string())), pa.dictionary(pa.int8(), pa.string()), pa.duration("ms"),
    ]
)  # fmt: skip
KEYS = ["id", "image", "images", "video", "system", "data_source", "conversations", "messages", "x.y", "text"]


@few
@given(schema=st.dictionaries(st.sampled_from(KEYS), columns, min_size=1), rows=st.integers(0, 3), data=st.data())
def test_parquet_of_any_columns(
    sound: dict[str, Any], tmp_path: Path, schema: dict[str, pa.DataType], rows: int, data: Any
) -> None:
    arrays = {name: pa.array([data.draw(value_of(kind)) for _ in range(rows)], kind) for name, kind in schema.items()}
    file = tmp_path / "any.parquet"
    pq.write_table(pa.table(arrays), file)
    for source in ("parquet", "messages"):
        read_everything(config_of(source, sound["llava"][1], str(file)))


def value_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Returns values of an Arrow type, nulls among them."""
    if pa.types.is_struct(kind):
        fields = {kind.field(place).name: value_of(kind.field(place).type) for place in range(kind.num_fields)}
        return st.none() | st.fixed_dictionaries(fields)
    if pa.types.is_map(kind):
        return st.none() | st.lists(st.tuples(st.sampled_from(TEXTS), texts), max_size=2)
    if pa.types.is_list(kind):
        return st.none() | st.lists(value_of(kind.value_type), max_size=3)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return st.none() | st.sampled_from(list(TEXTS))
    if pa.types.is_binary(kind):
        return st.none() | st.binary(max_size=8)
    if pa.types.is_boolean(kind):
        return st.none() | st.booleans()
    if pa.types.is_floating(kind):
        return st.none() | st.floats()
    return st.none() if pa.types.is_null(kind) or pa.types.is_decimal(kind) else st.none() | st.integers(0, 100)


# --- no code is run ---------------------------------------------------------------------------------------------------


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def object_array(payload: Canary) -> bytes:
    """Returns a NumPy file whose only element is an object."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], object), allow_pickle=True)
    return buffer.getvalue()


def table_with_python_type(payload: bytes) -> pa.Table:
    """Returns a table whose column claims to be of a Python class that Arrow would unpickle (CVE-2023-47248)."""
    claim = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    return pa.table(
        {"conversations": pa.array([b"x"])}, pa.schema([pa.field("conversations", pa.binary(), True, claim)])
    )


def write_parquet_canaries(root: Path, payload: bytes, array: bytes) -> list[tuple[str, str]]:
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]
    held = [{"bytes": content, "path": "a.npy"} for content in (payload, array)]
    pq.write_table(pa.Table.from_pylist([{"image": one, "conversations": talk} for one in held]), root / "held.parquet")
    pq.write_table(pa.table({"conversations": [payload, array]}), root / "binary.parquet")
    pq.write_table(table_with_python_type(payload), root / "type.parquet")
    (root / "pickle.parquet").write_bytes(payload)
    videos = [{"video": one, "conversations": [{**talk[0], "value": "<video>What?"}, talk[1]]} for one in held]
    pq.write_table(pa.Table.from_pylist(videos), root / "videos.parquet")
    return [("parquet", f"{name}.parquet") for name in ("held", "binary", "type", "pickle", "videos")]


def write_array_record_canaries(root: Path, payload: bytes, array: bytes) -> list[tuple[str, str]]:
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]
    index = {"format": "visor_jax.conversations", "version": 1, "index": [["0", []], ["1", []]]}
    blocks = {
        "foreign": [payload, array],
        "ending": [payload, array, block(index, b"")],
        "held": [
            *(block({"image": [{"path": "a.npy", "bytes": len(content)}], "conversations": talk}, content)
              for content in (payload, array)),
            block(index, b""),
        ],
    }  # fmt: skip
    for name, contents in blocks.items():
        writer = array_record_module.ArrayRecordWriter(str(root / f"{name}.array_record"), "group_size:1")
        for content in contents:
            writer.write(content)
        writer.close()
    (root / "pickle.array_record").write_bytes(payload)
    return [("array_record", f"{name}.array_record") for name in (*blocks, "pickle")]


def block(header: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + content


def write_json_canaries(root: Path, payload: bytes, array: bytes) -> list[tuple[str, str]]:
    (root / "frames.npy").write_bytes(array)
    (root / "frames.pkl").write_bytes(payload)
    talk = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "x"}]
    named = [{"video": name, "conversations": talk} for name in ("frames.npy", "frames.pkl")]
    named += [{"image": name, "conversations": [{**talk[0], "value": "What?"}, talk[1]]} for name in ("frames.npy",)]
    (root / "named.json").write_text(json.dumps(named))
    (root / "pickle.json").write_bytes(payload)
    return [("llava", "named.json"), ("llava", "pickle.json"), ("messages", "named.json"), ("messages", "pickle.json")]


@pytest.mark.parametrize("write", [write_json_canaries, write_parquet_canaries, write_array_record_canaries])
def test_no_file_runs_code(tmp_path: Path, write: Callable[[Path, bytes, bytes], list[tuple[str, str]]]) -> None:
    canary = tmp_path / "canary"
    payload, array = pickle.dumps(Canary(canary)), object_array(Canary(canary))
    for content in (payload, array):  # the canary is alive
        pickle.loads(content) if content is payload else np.load(io.BytesIO(content), allow_pickle=True)
        canary.rmdir()
    written = write(tmp_path, payload, array)
    assert written
    for source, path in written:
        outcomes = read_everything(config_of(source, tmp_path, path))
        assert outcomes and "used" not in outcomes, path
        assert not canary.exists(), path
