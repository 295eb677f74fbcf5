"""Computes a fingerprint of a split's pictures, to detect pictures that changed under the same names.

In: the split that a run trains or evaluates on. Out: a sha256 over the names, sizes and first megabyte of the pictures
of `RECORDS` evenly spaced records (of all if there are fewer). Changes of other pictures are not detected: reading all
pictures would cost as much as training on them. Where no single file holds the records (shards, TFDS), whose checksum a
workdir would keep, the fingerprint covers the text of these records too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from visor_jax.config import ConfigLike, as_config
from visor_jax.data.from_config import make_source
from visor_jax.data.sample import SkipSample, outline, samples_of
from visor_jax.data.source_kind import RecordSource
from visor_jax.files.read_write import open_regular
from visor_jax.workdir.provenance import annotations_checksum, plain

RECORDS = 256
MAX_BYTES = 2**20  # per picture


def fingerprint_of_split(config: ConfigLike, split: str) -> str:
    """Returns `picture_fingerprint` of a split of the configured data; "" for a source without records.

    Raises:
      RequestError: the data cannot be read.
    """
    config = as_config(config)
    source = make_source(config, split)
    if not isinstance(source, RecordSource):
        return ""
    return picture_fingerprint(source, with_text=not annotations_checksum(plain(config), split))


def picture_fingerprint(source: RecordSource, with_text: bool = False) -> str:
    """Returns the sha256 over a sample of the pictures; a picture that cannot be read counts as empty.

    Args:
      source: the records.
      with_text: whether ids, questions and answers of the sample are covered too.
    """
    digest = hashlib.sha256()
    for index in sampled(len(source)):
        if with_text:
            digest.update(_text_of(source, index).encode("utf-8", "surrogatepass"))
        for name, content in source.picture_files(index):
            digest.update(f"{name}\0".encode("utf-8", "surrogatepass"))
            digest.update(picture_digest(content))
    return digest.hexdigest()


def _text_of(source: RecordSource, index: int) -> str:
    """Returns what a record says, or why it cannot be used."""
    try:
        samples = samples_of(outline(source, index))
    except SkipSample as why:
        return f"{why}\0"
    said = []
    for sample in samples:
        said += [sample.id, sample.system, [(turn.question, turn.answer, turn.task) for turn in sample.turns]]
    return json.dumps(said)


def sampled(count: int) -> list[int]:
    """Returns `RECORDS` of `count` positions, evenly spaced, including the first and the last."""
    if count <= RECORDS:
        return list(range(count))
    return [position * (count - 1) // (RECORDS - 1) for position in range(RECORDS)]


def picture_digest(content: Path | bytes | None) -> bytes:
    """Returns the sha256 of a picture's size and first megabyte; of no bytes if it cannot be read.

    Of a folder, which holds the frames of a video, the names of its files are used.
    """
    if content is None:
        return hashlib.sha256().digest()
    if isinstance(content, bytes):
        return _digest(content[:MAX_BYTES], len(content))
    try:
        if content.is_dir():  # a video's frames
            names = "\0".join(sorted(os.listdir(content))).encode("utf-8", "surrogatepass")
            return _digest(names[:MAX_BYTES], len(names))
        with open_regular(content) as file:
            beginning = file.read(MAX_BYTES)
            size = file.seek(0, 2)
    except (OSError, ValueError):
        return hashlib.sha256().digest()
    return _digest(beginning, size)


def _digest(beginning: bytes, size: int) -> bytes:
    return hashlib.sha256(f"{size}\0".encode() + beginning).digest()
