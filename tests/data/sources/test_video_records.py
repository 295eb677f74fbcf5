"""Videos in training: records in LLaVA's and the messages layout become the examples that asking makes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.config import architecture, as_config
from visor_jax.data.collate import encode_prompt, make_batch
from visor_jax.data.fingerprint import picture_fingerprint
from visor_jax.data.from_config import (
    agreed_taps,
    make_source,
    make_tokenizer,
    sample_encoder,
    training_row_shape,
)
from visor_jax.data.sample import NO_PICTURE, NO_VIDEO, SkipSample, Source
from visor_jax.data.source_kind import RecordSource
from visor_jax.testing import tiny_config

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), np.uint8)
ASK = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "red"}]
OPENAI = [{"role": "user", "content": "<video>What happens?"}, {"role": "assistant", "content": "red"}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the same five frames as a folder, an animated WebP and an array, and one picture."""
    (tmp_path / "clips" / "a").mkdir(parents=True)
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    for number, picture in enumerate(pictures, start=8):
        picture.save(tmp_path / "clips" / "a" / f"{number}.png")
    pictures[0].save(tmp_path / "clips" / "a.webp", save_all=True, append_images=pictures[1:], lossless=True)
    np.save(tmp_path / "clips" / "a.npy", FRAMES)
    pictures[0].save(tmp_path / "still.png")
    return tmp_path


def config(root: Path, records: list[Any], **data: Any) -> Any:
    (root / "train.json").write_text(json.dumps(records))
    fields = {"source": "llava", "root": str(root), "path": "train.json", "test_fraction": 0.0, "tiles": 6}
    fields |= {"visual_length": 256, "max_frames": 3} | data
    return as_config(tiny_config({f"data.{name}": value for name, value in fields.items()}))


def opened(root: Path, records: list[Any], **data: Any) -> Source:
    return make_source(config(root, records, **data), "train")


@pytest.mark.parametrize("name", ["clips/a", "clips/a.webp", "clips/a.npy"])
@pytest.mark.parametrize("layout", ["LLaVA", "messages", "parts"])
def test_a_video_is_trained_on_as_it_is_asked_about(root: Path, name: str, layout: str) -> None:
    parts = [{"type": "video", "video": name}, {"type": "text", "text": "What happens?"}]
    record = {
        "LLaVA": {"id": "v", "video": name, "conversations": ASK},
        "messages": {"id": "v", "videos": [name], "messages": OPENAI},
        "parts": {"id": "v", "messages": [{"role": "user", "content": parts}, OPENAI[1]]},
    }[layout]
    conf = config(root, [record])
    sample = make_source(conf, "train")[0]
    np.testing.assert_array_equal(sample.images[0], FRAMES[[0, 2, 4]])
    tokenizer = make_tokenizer(conf)
    example = sample_encoder(conf, tokenizer, training_row_shape(conf))(sample)
    prompt = encode_prompt([FRAMES[[0, 2, 4]]], "What happens?", tokenizer, architecture(conf))
    for field in ("tiles", "visual_gather", "visual_weights", "visual_positions"):
        np.testing.assert_array_equal(getattr(example, field), getattr(prompt, field))
    np.testing.assert_array_equal(example.text_tokens[: len(prompt.text_tokens)], prompt.text_tokens)
    assert len(example.tiles) == 3 and example.loss_mask.any()


def test_videos_and_pictures_of_one_record_keep_their_order(root: Path) -> None:
    text = "<image> before <video>, then <video>?"
    turns = [{"from": "human", "value": text}, ASK[1]]
    frames = ["clips/a/9.png", "clips/a/8.png"]
    source = opened(root, [{"image": "still.png", "videos": ["clips/a.npy", frames], "conversations": turns}])
    sample = source[0]
    assert [image.shape for image in sample.images] == [(12, 10, 3), (3, 12, 10, 3), (2, 12, 10, 3)]
    np.testing.assert_array_equal(sample.images[2], FRAMES[[1, 0]])
    assert sample.turns[0].question == "<image> before <image>, then <image>?"
    assert isinstance(source, RecordSource)
    shapes = [image.shape for image in source.outline(0).images]  # pyright: ignore[reportAttributeAccessIssue]
    assert shapes == [NO_PICTURE.shape, NO_VIDEO.shape, NO_VIDEO.shape]
    assert source.record_facts(0) == ("0", 3)
    assert [path and Path(str(path)).name for _, path in source.picture_files(0)] == ["still.png", "a.npy", "9.png"]


def test_records_about_one_video_are_in_one_split_and_its_frames_are_in_the_fingerprint(root: Path) -> None:
    records = [
        {"id": number, "video": f"{place}{number}.mp4", "conversations": ASK}
        for number in range(40)
        for place in ("", "./")
    ]
    source = opened(root, records, test_fraction=0.3)
    assert isinstance(source, RecordSource)
    ids = [source.record_facts(index)[0] for index in range(len(source))]
    assert 0 < len(ids) < 80 and all(ids.count(one) == 2 for one in ids)
    before = picture_fingerprint(opened(root, [{"video": "clips/a", "conversations": ASK}]))  # pyright: ignore
    (root / "clips" / "a" / "12.png").unlink()
    after = picture_fingerprint(opened(root, [{"video": "clips/a", "conversations": ASK}]))  # pyright: ignore
    assert before != after


@pytest.mark.parametrize(
    "reason, record, data",
    [
        ("too_long", {"video": "clips/a.npy"}, {"tiles": 2}),
        ("too_many_pixels", {"video": "clips/a.npy"}, {"max_image_pixels": 119}),
        ("missing_file", {"video": "gone.mp4"}, {}),
        ("unsafe_path", {"video": "../a.mp4"}, {}),
        ("unsafe_path", {"video": ["/etc/a.png", "/etc/b.png"]}, {}),
        ("video_format", {"video": "train.json"}, {}),
        ("video_format", {"video": "still.png"}, {}),
        ("missing_file", {"video": ["still.png", "gone.png"]}, {}),
    ],
)
def test_videos_that_cannot_be_used_are_skipped(root: Path, reason: str, record: Any, data: Any) -> None:
    with pytest.raises(SkipSample, match=r"train.json\[0\]: ") as caught:
        opened(root, [{**record, "conversations": ASK}], **data)[0]
    assert caught.value.reason == reason


def test_all_frames_of_a_record_share_one_bound_on_pixels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visor_jax.data.sources.stored.DEFAULT_MAX_PIXELS", 6 * 120)
    one = {"video": ["clips/a.npy"], "conversations": ASK}
    turns = [{"from": "human", "value": "<video><video><video>"}, ASK[1]]
    source = opened(root, [one, {"videos": ["clips/a.npy"] * 3, "conversations": turns}], tiles=9, max_image_pixels=300)
    assert source[0].images[0].shape == (3, 12, 10, 3)
    with pytest.raises(SkipSample, match=r"at most 0 pixels .*after the record") as caught:
        source[1]
    assert caught.value.reason == "too_many_pixels"


def test_a_record_may_hold_its_video() -> None:
    from visor_jax.data.sources.stored import Reading, RecordList, StoredSource

    buffer = io.BytesIO()
    np.save(buffer, FRAMES)
    frames = [{"bytes": _png(frame), "path": None} for frame in FRAMES]
    turns = [{"from": "human", "value": "<video> and <video>"}, ASK[1]]
    record = {"videos": [{"bytes": buffer.getvalue(), "path": "x.npy"}, frames], "conversations": turns}
    source = StoredSource("set", [RecordList(Path("set"), [record])], Path("."), Reading(max_frames=2))
    for video in source[0].images:
        np.testing.assert_array_equal(video, FRAMES[[0, 4]])
    assert [type(content) for _, content in source.picture_files(0)] == [bytes, bytes]


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def test_processes_agree_on_the_shape_of_a_batch_whether_or_not_it_has_videos(root: Path) -> None:
    """Without pinpoints that are shrunk, pictures take one feature per position and frames of videos four."""
    records = [{"id": "v", "video": "clips/a.npy", "conversations": ASK}, {"image": "still.png", "conversations": ASK}]
    conf = config(root, records)
    arch, row_shape, source = architecture(conf), training_row_shape(conf), make_source(conf, "train")
    encode = sample_encoder(conf, make_tokenizer(conf), row_shape)
    rows = [[encode(source[index])] for index in range(2)]
    assert [agreed_taps(conf, count) for count in (1, 2)] == [0, 4]
    assert agreed_taps(as_config(tiny_config()), 2) == 0
    apart = [make_batch([row], row_shape, arch).arrays for row in rows]
    assert [arrays["visual_gather"].shape[-1] for arrays in apart] == [4, 1]
    agreed = [make_batch([row], row_shape, arch, min_taps=agreed_taps(conf, 2)).arrays for row in rows]
    assert agreed[0]["visual_gather"].shape == agreed[1]["visual_gather"].shape
    np.testing.assert_array_equal(agreed[1]["visual_weights"][..., :1], apart[1]["visual_weights"])
    assert not agreed[1]["visual_weights"][..., 1:].any()
