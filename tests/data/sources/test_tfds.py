"""Any data set that TFDS prepared: names, splits, which features hold what, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from PIL import Image

from tests.data.sources.test_hostile_files import damaged, edits, few, read_everything
from visor_jax.config import Config, as_config
from visor_jax.data.sample import SkipSample, Turn
from visor_jax.data.sources.tfds import SOURCE, open_tfds
from visor_jax.data.sources.tfds_features import mapped_record, parse_mapping, plain
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config

TEXT = tfds.features.Text
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 6, 8, 3), np.uint8)


def png(number: int) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return io.BytesIO(buffer.getvalue())


class Catalog(tfds.core.GeneratorBasedBuilder):
    """A locally built data set with features of many kinds, as other people's data sets have them."""

    VERSION = tfds.core.Version("1.2.0")
    SUPPORTED_VERSIONS = [tfds.core.Version("1.10.0")]  # noqa: RUF012 (TFDS adds it to a list)
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="divided"))
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        sequence, image = tfds.features.Sequence, tfds.features.Image()
        features = tfds.features.FeaturesDict(
            {
                "image": image,
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "question_id": np.int64,
                "question": TEXT(),
                "answers": sequence(TEXT()),
                "qa": sequence({"question": TEXT(), "answer": TEXT()}),
                "chat": TEXT(),
                "conversations": sequence({"from": TEXT(), "value": TEXT()}),
                "views": sequence(image),
                "clip": sequence(image),
                "height": np.float32,
                "nested": {"photo": image, "caption": TEXT()},
                "raw": TEXT(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        splits = ("train", "validation", "test") if self.builder_config.name == "divided" else ("train",)
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Any:
        for number in range(20 if split == "train" else 3):
            chat = [{"from": "human", "value": f"{split}?"}, {"from": "gpt", "value": "yes"}]
            yield (
                number,
                {
                    "image": png(number),
                    "label": number % 2,
                    "question_id": 100 + number,
                    "question": f"Which {number}?",
                    "answers": ["red", "blue", "blue"],
                    "qa": [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}],
                    "chat": json.dumps(chat) if number else "[",
                    "conversations": chat,
                    "views": [png(number), png(number + 1)],
                    "clip": [png(number + place) for place in range(5)],
                    "height": 1.5,
                    "nested": {"photo": png(number + 2), "caption": "a caption"},
                    "raw": png(number).getvalue(),
                },
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    for name in ("plain", "divided"):
        Catalog(data_dir=root, config=name, file_format="array_record").download_and_prepare()
    Catalog(data_dir=root, config="plain", version="1.10.0", file_format="array_record").download_and_prepare()
    return root


def config(root: Path | str, path: str = "catalog/plain", **data: Any) -> Config:
    fields = {"source": "tfds", "root": str(root) if str(root) != "." else "", "path": path, "tiles": 8, **data}
    fields.setdefault("max_frames", 3)
    return as_config(tiny_config({f"data.{name}": value for name, value in fields.items()}))


def opened(root: Path, features: str, split: str = "all", **data: Any) -> Any:
    return open_tfds(config(root, features=features, **data), split)


ONE = "image=image, question='What?', answer=label"
MAPPED = {
    "a class label, a literal question": (ONE, [PIXELS[3]], (Turn("What?", "dog"),)),
    "the most frequent of several answers": ("question=question,answer=answers", [], (Turn("Which 3?", "blue"),)),
    "questions and answers in a sequence": (
        'id=question_id, images=views, question=qa/question, answer=qa/answer, data_source="pairs"',
        [PIXELS[3], PIXELS[4]],
        (Turn("<image>\n<image>\na?", "b", "pairs"), Turn("c?", "d", "pairs")),
    ),
    "a conversation as JSON": ("image=image, messages=chat", [PIXELS[3]], (Turn("train?", "yes"),)),
    "a conversation": ("conversations=conversations, system=question", [], (Turn("train?", "yes"),)),
    "by the names of the features": ("", [PIXELS[3]], (Turn("train?", "yes"),)),
    "a video": ("video=clip, question=question, answer=label", [PIXELS[[3, 5, 7]]], (Turn("Which 3?", "dog"),)),
    "a nested feature and a number": (
        "image=nested/photo, question=nested/caption, answer=height",
        [PIXELS[5]],
        (Turn("a caption", "1.5"),),
    ),
    "pictures in a text feature": (
        "image=raw, question=question, answer=label",
        [PIXELS[3]],
        (Turn("Which 3?", "dog"),),
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_features_become_samples(root: Path, name: str) -> None:
    text, images, turns = MAPPED[name]
    source = opened(root, text)
    sample = source[3]
    assert (sample.turns, sample.source) == (turns, "catalog")
    assert sample.id == ("103" if "question_id" in text else "3")
    assert sample.system == ("Which 3?" if "system" in text else "")
    assert len(sample.images) == len(images)
    for image, pixels in zip(sample.images, images, strict=True):
        np.testing.assert_array_equal(image, pixels)
    assert [image.ndim for image in source.outline(3).images] == [image.ndim for image in images]
    again = pickle.loads(pickle.dumps(source))  # Grain's workers are processes
    assert again[3].turns == turns


def test_places_facts_and_records_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    source = opened(root, "messages=chat, image=image")
    assert source.place(3) == "catalog-train[3]" and source.record_facts(3) == ("3", 1) and len(source) == 20
    with pytest.raises(SkipSample, match=r"catalog-train\[0\]: .*messages"):
        source[0]
    assert source.record_facts(0)[1] is None
    with pytest.raises(SkipSample, match="at most 47 pixels"):
        opened(root, ONE, max_image_pixels=47)[0]
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (shard,) = (copy / "catalog" / "plain" / "1.10.0").glob("*.array_record*")
    damaged = bytearray(shard.read_bytes())
    quarter = len(damaged) // 4
    damaged[quarter:-quarter] = bytes(len(damaged) - 2 * quarter)
    shard.write_bytes(bytes(damaged))
    damaged_source = opened(copy, ONE)
    with pytest.raises(SkipSample, match="catalog-train") as caught:
        _ = [damaged_source[index] for index in range(20)]
    assert caught.value.reason == "broken_file"


def test_splits_are_those_of_the_data_set_or_parts_of_train(root: Path) -> None:
    divided = {split: opened(root, "", split, path="catalog/divided") for split in ("train", "validation", "test")}
    assert {split: len(source) for split, source in divided.items()} == {"train": 20, "validation": 3, "test": 3}
    assert divided["test"][0].turns[0].question == "test?"
    parts = [opened(root, "", split, test_fraction=0.25) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 20 and len({source.place(0) for source in parts}) == 3
    whole = config(root)
    assert SOURCE.stored_splits(whole) == ["all"]
    assert list(SOURCE.stored_splits(config(root, "catalog/divided"))) == ["train", "validation", "test"]
    SOURCE.check_splits(config(root, test_fraction=0.25), {"train", "validation", "test"})
    with pytest.raises(RequestError, match="leaves split 'test'"):
        SOURCE.check_splits(config(root, test_fraction=1e-9), {"train", "test"})
    with pytest.raises(RequestError, match="split 'test' has no usable record"):
        SOURCE.check_splits(config(root, "catalog/divided", max_image_pixels=1), {"train", "test"})


def test_a_name_means_the_newest_version_that_fits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(path: str) -> str:
        return open_tfds(config(root, path), "all")._root.name

    assert [version(f"catalog/plain{part}") for part in ("", ":1.2.0", ":1.*.*")] == ["1.10.0", "1.2.0", "1.10.0"]
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert len(open_tfds(config(Path("")), "all")) == 20
    file = root / "catalog" / "divided" / "1.2.0" / "dataset_info.json"
    assert SOURCE.from_file is not None
    expected = {"root": str(root), "path": "catalog/divided:1.2.0", "test_fraction": 0.0}
    assert SOURCE.from_file(file) == expected
    for other in (file.with_name("features.json"), root / "gone" / "dataset_info.json"):
        with pytest.raises(RequestError, match=r"dataset_info\.json"):
            SOURCE.from_file(other)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"path": ""}, "data.path='': expected TFDS's name"),
        ({"path": "../x"}, r"data.path='../x': expected TFDS's name"),
        ({"path": "catalogue"}, "no data set 'catalogue'.*did you mean 'catalog'"),
        ({"path": "mnist"}, "no data set 'mnist'.*tfds build mnist --file_format=array_record"),
        ({"path": "catalog"}, "expected a configuration, one of divided, plain"),
        ({"path": "catalog/other"}, "no such folder"),
        ({"path": "catalog/plain:3.0.0"}, r"no prepared version that fits \(1.2.0, 1.10.0\)"),
        ({"base": "gs://bucket/tfds"}, "ArrayRecord reads no bucket.*mount it"),
        ({"features": "image"}, "cannot be read from 'image' on"),
        ({"features": "image=image, quest=question"}, "'quest' is unknown; expected some of id, image"),
        ({"features": "image=image, image=views"}, "'image' is given twice"),
        ({"features": "image=image, question=question"}, "expected question=... and answer=..., or conversations"),
        (
            {"features": "question=question, answer=answer"},
            "answer=answer: catalog has no such feature.*mean 'answers'",
        ),
        (
            {"features": "question=qa/questions, answer=label"},
            "question=qa/questions: .* expected one of answer, question",
        ),
        ({"features": "question=label/x, answer=label"}, "question=label/x: catalog has no such feature"),
    ],
)
def test_what_does_not_fit_is_refused(root: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        changed = config(data.pop("base", root), **{"path": "catalog/plain", **data})
        SOURCE.check(changed)
        open_tfds(changed, "all")


def test_a_sequence_of_sequences_is_several_videos() -> None:
    """As TFDS reads it; to write one it needs TensorFlow."""
    stored = [np.array([b"\x89a", b"\x89b"], object), np.array([b"\x89c"], object)]
    feature = tfds.features.Sequence(tfds.features.Sequence(tfds.features.Image()))
    videos = plain(stored, feature)
    assert [[frame["bytes"] for frame in video] for video in videos] == [[b"\x89a", b"\x89b"], [b"\x89c"]]
    assert mapped_record(parse_mapping("videos=x,question='?',answer='!'"), lambda _: videos)["videos"] == videos


def test_a_mapping_is_read_as_it_is_written() -> None:
    assert parse_mapping("") == {}
    mapping = parse_mapping(' question = "What, then?" ,answer=a/b-c.d, ')
    assert list(mapping) == ["question", "answer"] and mapping["answer"] == ("a", "b-c.d")


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "features.json",
            lambda text: text.replace("tensorflow_datasets.core.features.text_feature", "canary"),
            "canary",
        ),
        ("features.json", lambda text: "[" * 100_000, "not valid JSON"),
        ("features.json", lambda text: "{}", "cannot be read as a TFDS data set"),
        ("dataset_info.json", lambda text: text[:50], "not valid JSON"),
        ("dataset_info.json", lambda text: text.replace("array_record", "tfrecord"), "expected array_record"),
        ("dataset_info.json", lambda text: json.dumps({**json.loads(text), "splits": []}), "holds no split"),
    ],
)
def test_files_from_outside_run_no_code(root: Path, tmp_path: Path, file: str, change: Any, message: str) -> None:
    """TFDS imports the modules that features.json names."""
    shutil.copytree(root / "catalog" / "plain", tmp_path / "catalog" / "plain")
    path = tmp_path / "catalog" / "plain" / "1.10.0" / file
    path.write_text(change(path.read_text()))
    with pytest.raises(RequestError, match=message):
        open_tfds(config(tmp_path, features=ONE), "all")


def test_a_video_feature_is_read_where_tensorflow_is_installed_and_names_it_elsewhere(
    root: Path, tmp_path: Path
) -> None:
    """The class `tfds.features.Video` imports TensorFlow; what it stores is a sequence of pictures."""
    shutil.copytree(root / "catalog" / "plain", tmp_path / "catalog" / "plain")
    path = tmp_path / "catalog" / "plain" / "1.10.0" / "features.json"
    features = json.loads(path.read_text())
    video = {"pythonClassName": "tensorflow_datasets.core.features.video_feature.Video"}
    features["featuresDict"]["features"]["clip"] = {**video, "video": {"dtype": "uint8", "encodingFormat": "png"}}
    path.write_text(json.dumps(features))
    given = config(tmp_path, features="video=clip, question=question, answer=label")
    if importlib.util.find_spec("tensorflow") is None:
        with pytest.raises(RequestError, match=r"features need TensorFlow.*tfds\.features\.Video"):
            open_tfds(given, "all")
    else:
        np.testing.assert_array_equal(open_tfds(given, "all")[3].images[0], PIXELS[[3, 5, 7]])


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "catalog-train.array_record-00000-of-00001"])
@settings(few, max_examples=6)
@given(changes=edits)
def test_damaged_files(root: Path, file: str, changes: list[tuple[str, float, bytes]]) -> None:
    """One line or skipped records, never another error."""
    damaged_file = root / "catalog" / "plain" / "1.10.0" / file
    content = damaged_file.read_bytes()
    try:
        damaged_file.write_bytes(damaged(content, changes))
        read_everything(config(root, "catalog/plain:1.10.0", features=ONE))
    finally:
        damaged_file.write_bytes(content)
