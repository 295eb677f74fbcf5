"""The base of stored sources: shards that a pattern names, and pictures that records hold themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visor_jax.data.fingerprint import picture_fingerprint
from visor_jax.data.sample import NO_PICTURE, SkipSample
from visor_jax.data.source_kind import RecordSource
from visor_jax.data.sources import source_kind
from visor_jax.data.sources.files import source_name
from visor_jax.data.sources.stored import Reading, RecordList, StoredSource
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config


def encoded(gray: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (gray, gray, gray)).save(file, kind)
    return file.getvalue()


def record(id: str, image: Any, question: str = "<image>\nWhat?") -> dict[str, Any]:
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {id}."}]
    return {"id": id, "image": image, "conversations": conversations}


def in_memory(root: Path, *shards: list[Any], **options: Any) -> StoredSource:
    files = [RecordList(root / f"{number}.json", records) for number, records in enumerate(shards)]
    return StoredSource("set", files, root, Reading(**options))


def test_pictures_are_named_or_held_by_the_record(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(encoded(1))
    held = {"bytes": encoded(2), "path": "other.png"}
    both = [held, "1.png", encoded(3)]
    source = in_memory(
        tmp_path, [record("a", "1.png"), record("b", held)], [record("c", both, "<image><image><image>")]
    )
    assert isinstance(source, RecordSource) and len(source) == 3
    assert [int(image[0, 0, 0]) for index in range(3) for image in source[index].images] == [1, 2, 2, 1, 3]
    assert [source.place(index) for index in range(3)] == ["0.json[0]", "0.json[1]", "1.json[0]"]
    assert source.outline(2).images == (NO_PICTURE,) * 3 and source.record_facts(2) == ("c", 3)
    assert source.picture_files(1) == [("other.png", held["bytes"])]
    before = picture_fingerprint(source)
    changed = in_memory(tmp_path, [record("a", "1.png"), record("b", {**held, "bytes": encoded(4)})])
    assert picture_fingerprint(changed) != before


@pytest.mark.parametrize(
    ("image", "reason", "detail"),
    [
        ({"bytes": b"", "path": "x.png"}, "image_format", "'x.png' is not a JPEG"),
        ({"bytes": encoded(1)[:-30], "path": None}, "broken_image", "the record's picture"),
        ({"bytes": None, "path": "../x.png"}, "unsafe_path", "leads out"),
        ({"bytes": None, "path": None}, "image_count", "1 <image> markers, 0 pictures"),
        ({"bytes": "aGVsbG8=", "path": None}, "bad_record", "an object without a `path`"),
        ([encoded(1), 3], "bad_record", "neither a name nor a list"),
    ],
)
def test_bad_pictures_in_records_are_skipped(tmp_path: Path, image: Any, reason: str, detail: str) -> None:
    with pytest.raises(SkipSample, match=detail) as caught:
        in_memory(tmp_path, [record("a", image)])[0]
    assert caught.value.reason == reason


def test_ids_places_and_splits_span_the_shards(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(300)]
    first, second = [record("a", name) for name in names], [record("b", name) for name in names]
    whole = in_memory(tmp_path, first, second, split="all", test_fraction=0.2)
    assert [whole.splits_of(index) for index in range(300)] == [whole.splits_of(300 + index) for index in range(300)]
    sizes = [len(in_memory(tmp_path, first, second, split=name, test_fraction=0.2)) for name in ("train", "test")]
    assert sizes[1] > 60 and sizes[0] > 2 * sizes[1] and whole.duplicate_ids() == 598
    without_ids = in_memory(
        tmp_path, [{"conversations": record("a", None, "Hi")["conversations"]}] * 2, [record("", "x")]
    )
    assert [without_ids.record_facts(index)[0] for index in range(3)] == ["0", "1", ""]
    with pytest.raises(RequestError, match="has no record; expected at least one"):
        in_memory(tmp_path, [])


@pytest.mark.parametrize(
    ("path", "ids", "name"),
    [
        ("a-*.jsonl", "0123", "a"),
        ("**/*.jsonl", "67012345", None),
        ("{a-1,sub/b}.jsonl", "2345", None),
        ("a-0.jsonl", "01", "a-0"),
        ("[x].jsonl", "67", "x"),
    ],
)
def test_a_pattern_names_shards_in_order(tmp_path: Path, path: str, ids: str, name: str | None) -> None:
    (tmp_path / "sub").mkdir()
    for number, shard in enumerate(("a-0", "a-1", "sub/b", "[x]")):
        lines = [record(str(2 * number + place), None, "Hi") for place in range(2)]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny_config({"data.source": "llava", "data.root": str(tmp_path), "data.path": path, "stages": ("full",)})
    config.data.test_fraction = 0.0
    source = source_kind(config).open(config, "train")
    found = [source[index].id for index in range(len(source))]
    assert found == list(ids) and name in (source.name, None)


def test_a_pattern_without_matches_is_a_wrong_request(tmp_path: Path) -> None:
    config = tiny_config(
        {"data.source": "llava", "data.root": str(tmp_path), "data.path": "*.jsonl", "stages": ("full",)}
    )
    with pytest.raises(RequestError, match=r"data\.path='\*\.jsonl': matches no file below data\.root="):
        source_kind(config).open(config, "train")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.json", "a"),
        ("set-?.jsonl", "set"),
        ("train-*-of-*.parquet", "train"),
        ("ai2d/*.parquet", "ai2d"),
        ("*/*.parquet", "records"),
        ("*.parquet", "records"),
    ],
)
def test_a_source_has_the_name_of_its_files_or_of_their_folder(path: str, name: str) -> None:
    assert source_name(path) == name
