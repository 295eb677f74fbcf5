"""LLaVA files and records: valid ones, wrong requests, and skipped records with their reasons."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.config import Config, as_config
from visor_jax.data.sample import SkipSample, Turn
from visor_jax.data.sources.llava import LlavaSource, check_splits
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config

HELLO = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A box."}]
Open = Callable[..., LlavaSource]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.fixture
def open_source(tmp_path: Path) -> Open:
    """Writes the content to a file next to two pictures, and opens it."""
    for number in (1, 2):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")

    def make(content: Any, name: str = "set.json", **options: Any) -> LlavaSource:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / name).write_bytes(data)
        return LlavaSource(tmp_path / name, tmp_path, **{"max_image_pixels": 1000, **options})

    return make


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": "1.png", "conversations": HELLO, **changes}


def test_a_record_becomes_a_sample(open_source: Open) -> None:
    sample = open_source([record(data_source="boxes")])[0]
    assert (sample.id, sample.source) == ("a", "set")
    assert sample.turns == (Turn("<image>\nWhat is it?", "A box.", "boxes"),)
    np.testing.assert_array_equal(sample.images[0], np.full((4, 6, 3), (1, 0, 0)))


def test_several_pictures_or_none(open_source: Open) -> None:
    several = [human("Is <image> like <image>?"), gpt("Yes.")]
    source = open_source([
        record(image=["1.png", "2.png"], conversations=several),
        {"id": 7, "conversations": [human("Hi"), gpt("Ho")]},
        {"image": None, "conversations": [human("Hi"), gpt("Ho")]},
    ])  # fmt: skip
    assert [image[0, 0, 0] for image in source[0].images] == [1, 2]
    assert source[0].turns[0].question == "Is <image> like <image>?"
    assert source[1].images == () and source[1].id == "7"
    assert source[2].id == "2"  # its index in the file
    with pytest.raises(IndexError):
        source[3]


def test_turns_in_order_without_a_leading_answer_or_a_last_question(open_source: Open) -> None:
    conversation = [gpt("Welcome"), *HELLO, {"from": "user", "value": "Sure?"}, {"from": "assistant", "value": "Yes"}]
    sample = open_source([record(conversations=[*conversation, human("And?")])])[0]
    assert [(turn.question, turn.answer) for turn in sample.turns] == [
        ("<image>\nWhat is it?", "A box."),
        ("Sure?", "Yes"),
    ]


@pytest.mark.parametrize(
    "reason, bad",
    [
        ("bad_record", "text"),
        ("bad_record", record(image=3)),
        ("bad_record", record(image=["1.png", None])),
        ("bad_record", record(conversations=["hi"])),
        ("bad_record", record(conversations=[{"from": "human", "value": None}])),
        ("empty_conversation", {"id": "a", "image": "1.png"}),
        ("empty_conversation", record(conversations=[])),
        ("empty_conversation", record(conversations=[gpt("only an answer")])),
        ("empty_conversation", record(conversations=[human("<image> only a question")])),
        ("turn_order", record(conversations=[human("<image>"), human("again"), gpt("x")])),
        ("turn_order", record(conversations=[human("<image>"), gpt("x"), gpt("y")])),
        ("unknown_role", record(conversations=[{"from": "tool", "value": "x"}, *HELLO])),
        ("unknown_role", record(conversations=[{"from": ["human"], "value": "x"}, *HELLO])),
        ("empty_answer", record(conversations=[human("<image>"), gpt(" \n")])),
        ("empty_question", record(conversations=[human(""), gpt("x")])),
        ("image_count", record(image=None)),
        ("image_count", record(image=["1.png", "2.png"])),
        ("image_count", record(image=["1.png", "2.png"], conversations=[human("no marker"), gpt("x")])),
        ("bad_text", record(conversations=[human("<image> \ud800"), gpt("x")])),
        ("bad_text", record(conversations=[human("<image>"), gpt("a\0b")])),
        ("too_long", record(conversations=[human("<image>"), gpt("x" * 10_000_000)])),
        ("missing_file", {"video": "a.mp4", "conversations": HELLO}),
        ("audio", {"audio": "a.wav", "conversations": HELLO}),
        ("missing_file", record(image="3.png")),
        ("unsafe_path", record(image="../1.png")),
        ("unsafe_path", record(image="/etc/passwd")),
        ("image_format", record(image="set.json")),
    ],
)
def test_bad_records_are_skipped_by_reason(open_source: Open, reason: str, bad: Any) -> None:
    source = open_source([record(), bad])
    with pytest.raises(SkipSample, match=r"set.json\[1\]: ") as caught:
        source[1]
    assert caught.value.reason == reason
    assert source[0].id == "a"


@pytest.mark.parametrize(
    "content, message",
    [
        (json.dumps([record()], indent=1).encode()[:-20], r"set.json line \d+ column \d+: not JSON"),
        (json.dumps([record()]).encode()[:-20], r"line 1 column \d{2,3}: not JSON.*cut off"),
        (json.dumps([record()]).encode()[:-1] + b", ]", r"line 1 column \d+: not JSON.*comma"),
        (json.dumps([record()]).encode() + b"\0\0", r"line 1 column \d+: not JSON: a NUL byte"),
        (b"[\n" + bytes(100_000), "NUL bytes from byte 3 on"),
        (json.dumps([record()]).encode("utf-16"), "UTF-16"),
        (json.dumps([record()]).encode("utf-16-le"), "UTF-16"),
        (json.dumps([record()]).encode("utf-16-be"), "UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PAR1", "Parquet"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"SQLite format 3\0", "SQLite"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"[] []", "a second value; expected one list"),
        (b"datasets:\n  - json_path: a.json", "YAML mixture"),
        (b'[\n{"id": "\xff"}]', "line 2 column 9: not UTF-8"),
        (b"{}", "holds one object with the keys .none.; expected a list"),
        (b'{"data": [1], "version": 2}', "holds one object with a list under 'data'; expected a list"),
        (b"[]", "empty list"),
        (b" \n", "is empty; expected a JSON list"),
        (b"\n id,image", r"line 2 column 2: not JSON: expected '\['"),
        (b"\xc0\xc1", "line 1 column 1: not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[" + b"1" * 10_000 + b"]", "not JSON: Exceeds the limit"),
    ],
)
def test_files_that_cannot_be_read_are_a_wrong_request(open_source: Open, content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_source(content)


def test_missing_file_or_folder_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data\.path: cannot read .*none.json: No such file"):
        LlavaSource(tmp_path / "none.json", tmp_path, max_image_pixels=1)
    with pytest.raises(RequestError, match=r"data\.root"):
        LlavaSource(tmp_path / "none.json", tmp_path / "none", max_image_pixels=1)
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in (("pipe.json", "Not a regular file"), ("/dev/zero", "Not a regular file"), (".", "a folder")):
        with pytest.raises(RequestError, match=message):
            LlavaSource(tmp_path / name, tmp_path, max_image_pixels=1)


def test_bom_and_crlf_are_accepted(open_source: Open) -> None:
    text = json.dumps([record()], indent=1).replace("\n", "\r\n")
    assert open_source(b"\xef\xbb\xbf" + text.encode())[0].turns[0].answer == "A box."
    lines = "\r\n".join(json.dumps(record(id=i)) for i in range(3))
    source = open_source(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n", "set.jsonl")
    assert [source[i].id for i in range(len(source))] == ["0", "1", "2"]


def test_a_bad_line_is_one_skipped_record(open_source: Open) -> None:
    lines = [json.dumps(record()), '{"id": "cut', "[" * 100_000, json.dumps(record(id="b"))]
    source = open_source("\n".join(lines).encode(), "set.jsonl")
    assert len(source) == 4 and source[3].id == "b"
    for index in (1, 2):
        with pytest.raises(SkipSample, match=f"line {index + 1}") as caught:
            source[index]
        assert caught.value.reason == "bad_json"
    with pytest.raises(RequestError, match="line 3 column 1: not JSON"):
        open_source(b"\n{\n[1]\n", "bad.jsonl")


def test_splits_are_disjoint_complete_and_stable(open_source: Open, tmp_path: Path) -> None:
    records = [record(id=i, image=f"{i // 2}.png") for i in range(1000)]  # two records per picture

    def ids(count: int, split: str) -> set[str]:
        source = open_source(records[:count], split=split, test_fraction=0.1)
        return {source.record_facts(index)[0] for index in range(len(source))}

    parts = {split: ids(1000, split) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 1000 == len(set.union(*parts.values()))
    assert 60 < len(parts["test"]) < 140 and 60 < len(parts["validation"]) < 140
    for part in parts.values():
        assert all(str(int(i) ^ 1) in part for i in part)  # the picture's other record is in the same split
    assert ids(500, "test") == {i for i in parts["test"] if int(i) < 500}
    asking = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]
    openai = [{"role": "user", "content": asking}, {"role": "assistant", "content": "A box."}]
    one_picture = [{"messages": openai}] * 10  # named in the messages
    spelled = ["1.png", "./1.png", "gone/..\\1.png", str(tmp_path / "1.png"), f"{tmp_path}//gone/../1.png"]
    one_picture += [record(id=name, image=name) for name in spelled]
    source = open_source(one_picture, split="all", test_fraction=0.3)
    assert len({source.splits_of(index) for index in range(len(source))}) == 1
    with pytest.raises(RequestError, match="test_fraction"):
        open_source(records[:1], split="test", test_fraction=1e-9)


def configured(root: Path | str, **fields: Any) -> Config:
    """A configuration of records below `root`, a tenth of them in each of validation and test."""
    given = {"source": "llava", "root": str(root), "path": "set.json", "test_fraction": 0.1, **fields}
    return as_config(tiny_config({"stages": ("full",)} | {f"data.{name}": value for name, value in given.items()}))


def test_a_configuration_names_one_file_or_one_for_each_split(open_source: Open, tmp_path: Path) -> None:
    open_source([record(id="t")], "train.json")
    open_source([record(id="v")] * 2, "test.json")
    config = configured(tmp_path, path="{split}.json", max_image_pixels=24)
    assert [LlavaSource.from_config(config, split)[0].id for split in ("train", "test")] == ["t", "v"]
    with pytest.raises(RequestError, match=r"validation\.json"):
        LlavaSource.from_config(config, "validation")
    config = configured(tmp_path, path="test.json", max_image_pixels=24)  # all with the same picture
    splits = [split for split in ("train", "validation", "test") if has_records(config, split)]
    assert len(splits) == 1 and len(LlavaSource.from_config(config, "all")) == 2
    with pytest.raises(SkipSample, match="too_many_pixels"):
        LlavaSource.from_config(configured(tmp_path, path="test.json", max_image_pixels=23), splits[0])[0]
    config = configured("", path=str(tmp_path / "train.json"), max_image_pixels=24)
    assert LlavaSource.from_config(config, "all")[0].images[0].shape == (4, 6, 3)  # next to the file


def has_records(config: Any, split: str) -> bool:
    try:
        return len(LlavaSource.from_config(config, split)) > 0
    except RequestError:
        return False


def test_duplicate_ids_are_kept_and_counted(open_source: Open) -> None:
    source = open_source([record(), record(), record(id="b")])
    assert len(source) == 3 and source.duplicate_ids() == 1


@pytest.mark.parametrize("name", ["lines.json", "LINES.JSONL", "lines.ndjson", "lines.jsonl", "lines"])
def test_the_content_decides_not_the_files_name(open_source: Open, name: str) -> None:
    lines = "\n".join(json.dumps(record(id=number)) for number in range(3)).encode()
    for content in (lines, b"\xef\xbb\xbf\n" + lines + b"\n", json.dumps([record(id=n) for n in range(3)]).encode()):
        source = open_source(content, name)
        assert [source[index].id for index in range(len(source))] == ["0", "1", "2"]
    for indent in (None, 1):
        assert len(open_source(json.dumps(record(), indent=indent).encode(), name)) == 1


def test_a_first_line_that_is_cut_costs_only_itself(open_source: Open) -> None:
    source = open_source(b'{"id": \n' + json.dumps(record()).encode())
    assert len(source) == 2 and source[1].id == "a"
    with pytest.raises(SkipSample, match="line 1 column 8"):
        source[0]


def test_too_many_pictures_are_refused_before_any_is_opened(
    open_source: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = record(image=["1.png"] * 3, conversations=[human("<image>" * 3), gpt("x")])
    source = open_source([bad], max_pictures=3)
    assert len(source[0].images) == 3
    monkeypatch.setattr("visor_jax.data.sources.stored.open_under", lambda *_: pytest.fail("opened"))
    with pytest.raises(SkipSample, match=r"3 pictures; data\.tiles=2") as caught:
        open_source([bad], max_pictures=2)[0]
    assert caught.value.reason == "too_long"


def test_the_pictures_of_a_record_share_one_bound_on_pixels(open_source: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visor_jax.data.sources.stored.DEFAULT_MAX_PIXELS", 60)  # each has 24
    two, three = (record(image=["1.png"] * n, conversations=[human("<image>" * n), gpt("x")]) for n in (2, 3))
    source = open_source([two, three], max_image_pixels=30)
    assert len(source[0].images) == 2
    with pytest.raises(SkipSample, match="after the record's other pictures") as caught:
        source[1]
    assert caught.value.reason == "too_many_pixels"


def test_system_texts_and_links_reach_the_sample(open_source: Open, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (6, 4)).save(outside / "1.png")
    (root / "coco").symlink_to(outside)
    (root / "set.json").write_text(json.dumps([record(image="coco/1.png", system="Be terse.")]))
    for follow in (True, False):
        source = LlavaSource.from_config(configured(root, max_image_pixels=24, follow_links=follow), "all")
        if follow:
            assert source[0].system == "Be terse." and source[0].images[0].shape == (4, 6, 3)
        else:
            with pytest.raises(SkipSample, match="follow_links"):
                source[0]


def test_splits_that_would_be_empty_are_reported(open_source: Open, tmp_path: Path) -> None:
    open_source([record(id=str(number)) for number in range(30)])  # all with the same picture
    config = configured(tmp_path)
    with pytest.raises(RequestError, match="leaves split 'validation' and 'test' without any of the 30 records"):
        check_splits(config, {"train", "validation", "test"})
    check_splits(config, {"train"})
    config = configured(tmp_path, test_fraction=0.0)
    check_splits(config, {"train", "validation", "test"})
    config = configured(tmp_path, path="{split}.json")
    open_source([record()], "validation.json")
    check_splits(config, {"train", "validation"})  # that of "train" is always read immediately
    with pytest.raises(RequestError, match=r"test\.json: No such file"):
        check_splits(config, {"validation", "test"})
    open_source([record(image="gone.png"), record(image="../1.png")], "test.json")
    with pytest.raises(RequestError, match=r"split 'test' has no usable record.*unsafe_path: test.json\[1\]"):
        check_splits(config, {"validation", "test"})
    config = configured(tmp_path, path="test.json", test_fraction=0.0)
    check_splits(config, {"train"})
    with pytest.raises(RequestError, match="split 'validation' has no usable record"):
        check_splits(config, {"train", "validation"})
