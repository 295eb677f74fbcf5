"""Writes the samples of sources to a new folder: as PNG files with LLaVA JSON, or as ArrayRecord files.

In: sources by split. Out: a folder that `data.source=llava` or `data.source=array_record` reads, and counts. The folder
appears whole or not at all; samples that cannot be used are skipped and counted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visor_jax.data.chat_template import IMAGE_MARKER, images_before
from visor_jax.data.media import EmbeddedPicture, mark_videos
from visor_jax.data.mixture import MixedSource
from visor_jax.data.records import Record
from visor_jax.data.sample import Sample, SkipSample, Source, Turn, samples_of
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources.array_record import SUFFIX, write_array_record
from visor_jax.data.sources.stored import StoredSource
from visor_jax.errors import RequestError
from visor_jax.files.read_write import folder_beside

FORMATS = ("llava", "array_record")

Built = dict[str, int]  # file name -> number of conversations


def build(
    sources: Mapping[str, Source], out: Path, *, format: str = "llava", shards: int = 1, limit: int | None = None
) -> dict[str, Any]:
    """Writes at most `limit` samples of each source to the new folder `out`.

    Args:
        sources: by split, which names the files.
        out: the folder; must not exist.
        format: "llava" (pictures as PNG, one JSON file per split) or "array_record" (pictures as they are stored).
        shards: number of files per split, of about as many samples each; "llava" writes one.
        limit: of samples that are tried; None for all.

    Returns:
        {"out", "samples": {split: count}, "skipped": {"source/reason": count}}.

    Raises:
        RequestError: the folder exists, or the format has no shards.
        OSError: the folder cannot be written.
    """
    if out.exists():
        raise RequestError(f"--out={out}: exists already; expected a new folder")
    if shards > 1 and format != "array_record":
        raise RequestError(f"--shards={shards}: belongs to --format=array_record; expected it, or one shard")
    skips, counts = SkipLog(), dict[str, int]()
    with folder_beside(out) as folder:
        for split, source in sources.items():
            size = min(len(source), limit or len(source))
            if format == "llava":
                written = _write_llava(folder, split, source, range(size), skips)
            else:
                written = _write_array_records(folder, split, source, size, shards, skips)
            counts[split] = sum(written.values())
            for name, count in written.items():
                print(f"{out / name}: {count} conversations")
    return {"out": str(out), "samples": counts, "skipped": skips.by_reason()}


def _usable(source: Source, indices: range, skips: SkipLog) -> Iterator[tuple[int, Sample]]:
    """Yields (index, sample) of the samples that can be read, also those of sheets; counts the others.

    Raises:
        RequestError: a sample holds a small picture.
    """
    for index in indices:
        skips.count_tried()
        try:
            samples = samples_of(source[index])
        except SkipSample as why:
            skips.count_skipped(source.name, index, why)
            continue
        for sample in samples:
            check_storable(source, sample)
            yield index, sample


def check_storable(source: Source, sample: Sample) -> None:
    """Raises RequestError if files cannot keep the sample, because it holds a small picture."""
    if sample.origin is not None:
        raise RequestError(
            f"data.source={source.name}: sample {sample.id!r} holds a small picture with a place in its tile,"
            " which files cannot keep; expected a source or an exercise of whole pictures"
        )


# --- ArrayRecord ------------------------------------------------------------------------------------------------------


def _write_array_records(folder: Path, split: str, source: Source, size: int, shards: int, skips: SkipLog) -> Built:
    written: Built = {}
    for shard in range(shards):
        name = f"{split}{SUFFIX}" if shards == 1 else f"{split}-{shard:05d}-of-{shards:05d}{SUFFIX}"
        indices = range(size * shard // shards, size * (shard + 1) // shards)
        items = (_encoded(source, index, sample) for index, sample in _usable(source, indices, skips))
        written[name] = write_array_record(folder / name, items)
    return written


def _encoded(source: Source, index: int, sample: Sample) -> tuple[Record, list[str]]:
    """Returns a sample's record with its pictures: the stored files, or PNG files of pictures that are generated."""
    if isinstance(source, StoredSource | MixedSource):
        return source.encoded(index)
    pictures = tuple(EmbeddedPicture(_png(image)) for image in sample.images)
    task = _task(sample)
    turns = tuple(
        Turn(question, turn.answer, task) for question, turn in zip(_questions(sample), sample.turns, strict=True)
    )
    return Record(sample.id, pictures, turns, sample.system), []


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


# --- LLaVA JSON -------------------------------------------------------------------------------------------------------


def _write_llava(folder: Path, split: str, source: Source, indices: range, skips: SkipLog) -> Built:
    (folder / "images").mkdir(exist_ok=True)
    records = [
        _record(sample, f"{split}-{number:07d}", folder)
        for number, (_, sample) in enumerate(_usable(source, indices, skips))
    ]
    (folder / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return {f"{split}.json": len(records)}


def _record(sample: Sample, name: str, folder: Path) -> dict[str, Any]:
    """Writes a sample's pictures to `folder`/images, videos to `folder`/videos; returns its record for LLaVA JSON."""
    images, videos = [], []
    for number, pixels in enumerate(sample.images):
        if pixels.ndim == 4:
            videos.append(f"videos/{name}-{number}.npy")
            (folder / "videos").mkdir(exist_ok=True)
            np.save(folder / videos[-1], pixels)
        else:
            images.append(f"images/{name}-{number}.png")
            Image.fromarray(pixels).save(folder / images[-1])
    conversation = []
    questions = mark_videos(_questions(sample), [pixels.ndim == 4 for pixels in sample.images])
    for question, turn in zip(questions, sample.turns, strict=True):
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    record: dict[str, Any] = {"id": sample.id, "conversations": conversation}
    if sample.system:
        record["system"] = sample.system
    if images:
        record["image"] = images if len(images) > 1 else images[0]
    if videos:
        record["video"] = videos if len(videos) > 1 else videos[0]
    if task := _task(sample):
        record["data_source"] = task
    return record


def _questions(sample: Sample) -> list[str]:
    """Returns a sample's questions with a marker for each picture."""
    questions = [turn.question for turn in sample.turns]
    if not any(IMAGE_MARKER in question for question in questions):
        questions[0] = images_before(questions[0], len(sample.images))
    return questions


def _task(sample: Sample) -> str:
    """Returns the task of all turns; "" if they differ, because a record has one task."""
    tasks = {turn.task for turn in sample.turns}
    return tasks.pop() if len(tasks) == 1 else ""
