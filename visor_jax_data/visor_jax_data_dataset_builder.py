"""Stores the samples of any source of visor_jax as a TFDS data set, on one machine or with Beam.

In: a configuration of visor_jax, or fields of its `data` section. Out: a data set that `data.source=tfds` reads back as
the same samples in the same order, without TensorFlow:

    tfds build visor_jax_data --imports=visor_jax_data --file_format=array_record --data_dir=OUT \\
        --config='{"name": "mine", "data": {"source": "llava", "root": "DATA", "path": "train.json"}}'

Pictures are stored as they are encoded; nothing is decoded and no pixel changes. Of a video the frames that
`data.max_frames` selects are stored, as PNG. A record that cannot be used is left out and counted; past
`data.max_skipped_fraction` the build stops.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from visor_jax.config import Config, apply_overrides, default_config, load_config
from visor_jax.config.data_fields import PILLOW_MAX_PIXELS
from visor_jax.data.build import check_storable
from visor_jax.data.images import byte_limit
from visor_jax.data.media import mark_videos
from visor_jax.data.sample import Sample, Sheet, SkipSample, Source, outline, samples_of
from visor_jax.data.skips import SkipLog
from visor_jax.data.source_kind import SPLITS, RecordSource
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_regular

_BLOCK = 64  # samples that one step of a Beam pipeline reads
_ANY_NUMBER = 1_000_000  # data.tiles: how much a row holds does not matter here, it limits who reads the data set
_SHOWN = 20  # records that are left out and logged, per process
EXPECTED = """--config='{"name": "mine", "data": {"source": "llava", "root": "DATA", "path": "train.json"}}'"""


@dataclasses.dataclass
class VisorDataConfig(tfds.core.BuilderConfig):
    """What is stored: `tfds build --config='{...}'` gives these fields as JSON, `name` among them.

    Attributes:
        visor_config: a Python file that defines `get_config()`; "" for the defaults.
        data: fields of `config.data` that differ from it, such as {"source": "llava", "root": "DATA"}.
        splits: which of "train", "validation" and "test" are stored; empty: all that hold records.
        samples: of each split at most so many; an endless source needs it, 0 stores all of the others.
        beam: whether the samples are read and encoded by a Beam pipeline (`--beam_pipeline_options`).
    """

    visor_config: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    splits: Sequence[str] = ()
    samples: int = 0
    beam: bool = False


class Builder(tfds.core.GeneratorBasedBuilder):
    """The builder; TFDS names the data set after its package."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (VisorDataConfig(name="needs_config", description=f"A placeholder: give {EXPECTED}"),)
    builder_config_cls = VisorDataConfig
    url_infos = None  # nothing is downloaded, so there are no checksums to look for

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = tfds.features.FeaturesDict(
            {
                "id": text(doc="of the sample, unique within its split"),
                "system": text(doc="the sample's own system text"),
                "turns": tfds.features.Sequence({"question": text(), "answer": text(), "task": text()}),
                "images": tfds.features.Sequence(
                    tfds.features.Image(shape=(None, None, 3)), doc="encoded pictures and frames of videos, in order"
                ),
                "frames": tfds.features.Sequence(
                    np.int32,
                    doc="for each <image> or <video>: 0 for a picture, else how many of `images` are its frames",
                ),
            }
        )
        description = "Conversations about pictures and videos, stored by visor_jax."
        return tfds.core.DatasetInfo(builder=self, description=description, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        wanted = checked(self.builder_config)
        _visor_config.cache_clear()  # files may have changed since another build of this process
        _opened.cache_clear()
        request = (wanted.visor_config, json.dumps(dict(wanted.data)))
        counts = _counts(_visor_config(request), wanted)
        print("visor_jax_data: " + ", ".join(f"{split} {count} records" for split, count in counts.items()))
        make = _beam_examples if wanted.beam else _examples
        return {split: make(request, split, count) for split, count in counts.items()}

    def _generate_examples(self, **_: Any) -> Any:
        raise AssertionError("_split_generators gives the examples of each split")


# --- what is stored ---------------------------------------------------------------------------------------------------

Request = tuple[str, str]  # a file of a configuration, and as JSON the fields of `config.data` that differ from it


def checked(config: tfds.core.BuilderConfig | None) -> VisorDataConfig:
    """Returns the request itself.

    Raises:
      RequestError: it is the placeholder that stands for no request.
    """
    if not isinstance(config, VisorDataConfig) or config.name == Builder.BUILDER_CONFIGS[0].name:
        raise RequestError(f"visor_jax_data: which records are stored is not said; expected {EXPECTED}")
    return config


@functools.lru_cache(maxsize=1)
def _visor_config(request: Request) -> Config:
    """Returns the checked configuration that a request names."""
    file, fields = request
    overrides = [f"--config.data.{name}={value}" for name, value in json.loads(fields).items()]
    config = load_config(file, overrides) if file else apply_overrides(default_config(), overrides)
    source_kind(config).check(config)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tiles=_ANY_NUMBER))


@functools.lru_cache(maxsize=len(SPLITS))
def _opened(request: Request, split: str) -> tuple[Source, SkipLog]:
    """Returns the source of a split, opened once per process, and the count of what was left out of it."""
    config = _visor_config(request)
    return source_kind(config).open(config, split), SkipLog(max_fraction=config.data.max_skipped_fraction)


def _counts(config: Config, wanted: VisorDataConfig) -> dict[str, int]:
    """Returns how many records of each split are read."""
    kind = source_kind(config)
    if unknown := set(wanted.splits) - set(SPLITS):
        raise RequestError(f"splits: {sorted(unknown)}; expected some of {', '.join(SPLITS)}")
    if kind.endless and wanted.samples < 1:
        raise RequestError(
            f'samples={wanted.samples}: data.source={config.data.source!r} never ends; expected "samples"'
        )
    separate = [split for split in kind.stored_splits(config) if split in SPLITS]
    splits = wanted.splits or separate or (SPLITS if config.data.test_fraction else ("train",))
    if kind.endless:
        return dict.fromkeys(splits, wanted.samples)
    lengths = {split: len(kind.open(config, split)) for split in splits}
    return {split: min(length, wanted.samples or length) for split, length in lengths.items()}


def _examples(request: Request, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, example) of each usable record."""
    yield from _encoded_block(0, request, split, count, count)
    _, skips = _opened(request, split)
    if skips.skipped:
        print(f"visor_jax_data: {split}: {skips.skipped} of {skips.tried} records are left out: {skips.by_reason()}")


def _beam_examples(request: Request, split: str, count: int) -> Any:
    """Returns a Beam transform that makes the same examples; workers open the source themselves."""
    if importlib.util.find_spec("apache_beam") is None:
        raise RequestError("beam=true: needs the package apache-beam; install it with: pip install 'visor_jax[tfds]'")
    beam: Any = importlib.import_module("apache_beam")
    size = _BLOCK
    return (
        beam.Create(range(0, count, size))
        | f"Spread {split}" >> beam.Reshuffle()
        | f"Encode {split}" >> beam.FlatMap(_encoded_block, request, split, size, count)
    )


def _encoded_block(
    start: int, request: Request, split: str, size: int, end: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, example) of the usable ones among `size` records from `start` on, before `end`."""
    source, skips = _opened(request, split)
    for index in range(start, min(start + size, end)):
        skips.count_tried()
        try:
            yield index, encode_sample(source, index)
        except SkipSample as why:
            skips.count_skipped(source.name, index, why)
            logging.log_first_n(logging.WARNING, "visor_jax_data: %s is left out: %s", _SHOWN, f"{split}[{index}]", why)


# --- one example ------------------------------------------------------------------------------------------------------


def encode_sample(source: Source, index: int) -> dict[str, Any]:
    """Returns sample `index` as the builder's features; pictures are files as they are encoded.

    Raises:
      SkipSample: the record cannot be used, or a picture's file cannot be read.
      RequestError: the record is a sheet of small pictures, which files cannot keep.
    """
    sample = _only_sample(source, outline(source, index))
    files: Sequence[tuple[str, Path | bytes | None]] = []
    if isinstance(source, RecordSource):
        files = list(source.picture_files(index))
    is_video = [image.ndim == 4 for image in sample.images]
    if any(is_video) or len(files) != len(sample.images) or any(content is None for _, content in files):
        sample = _only_sample(source, source[index])  # raises for a picture without a file
    images: list[io.BytesIO] = []
    for place, image in enumerate(sample.images):
        if image.ndim == 4:
            images += [io.BytesIO(_png(frame)) for frame in image]
        else:
            content = files[place][1] if place < len(files) else None
            images.append(io.BytesIO(_content(content, files[place][0]) if content is not None else _png(image)))
    return {
        "id": sample.id,
        "system": sample.system,
        "turns": _turns(sample),
        "images": images,
        "frames": [len(image) if image.ndim == 4 else 0 for image in sample.images],
    }


def _only_sample(source: Source, record: Sample | Sheet) -> Sample:
    """Returns the sample that a record is, or the only one of a sheet."""
    *others, sample = samples_of(record)
    for each in (*others, sample):
        check_storable(source, each)
    if others:
        raise RequestError(f"data.source={source.name}: a record holds {len(others) + 1} samples; expected one each")
    return sample


def _turns(sample: Sample) -> list[dict[str, str]]:
    """Returns the turns, with <video> in place of <image> where a video belongs."""
    questions = mark_videos([turn.question for turn in sample.turns], [image.ndim == 4 for image in sample.images])
    return [
        {"question": question, "answer": turn.answer, "task": turn.task}
        for question, turn in zip(questions, sample.turns, strict=True)
    ]


def _content(content: Path | bytes, name: str) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        return read_regular(content, byte_limit(PILLOW_MAX_PIXELS))
    except OSError as error:
        raise SkipSample("missing_file", f"{name[:200]!r}: {error.strerror or error}") from None


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
