"""Defines a sample: pictures and a conversation about them. Every data source yields `Sample`s.

Lowest layer of `visor_jax.data`: no image decoding, no tokens. A source raises `SkipSample` for a bad record; the
caller counts the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Turn:
    """One question and its answer. The question may hold `<image>` markers; `task` is "" if the source has no tasks."""

    question: str
    answer: str
    task: str = ""


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more pictures and videos.

    Attributes:
      id: unique within its source; identifies the sample's record.
      images: uint8 arrays, RGB: a picture is [height, width, 3], a video [frames, height, width, 3].
      turns: the conversation, in order.
      source: name of its source.
      level: "easy", "middle" or "hard" if all its questions are of that level; "" if unknown.
      system: the record's system text; "" selects the configured one (`tokenizer.system`).
      kind: kind of its pictures by which results are also reported, such as "table"; "" if the source has no kinds.
      origin: row and column, in the tile's grid of patches, of the picture's first patch. With `data.small_pictures`
        the sample's one picture then keeps its size, gives only its own patches and shares its tile with others.
    """

    id: str
    images: tuple[np.ndarray, ...]
    turns: tuple[Turn, ...]
    source: str
    level: str = ""
    system: str = ""
    kind: str = ""
    origin: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sheet:
    """Several samples that fill one row of a batch together, as its segments 1, 2, ...; none sees another."""

    samples: tuple[Sample, ...]


def samples_of(record: Sample | Sheet) -> tuple[Sample, ...]:
    """Returns the samples of what a source yields: those of a sheet, or the one sample itself."""
    return record.samples if isinstance(record, Sheet) else (record,)


@runtime_checkable
class Source(Protocol):
    """Random access to samples: `source[i]` is a pure function of the source's settings and `i`."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample | Sheet:
        """Returns sample or sheet `index`; raises `SkipSample` for a bad record, `IndexError` outside `0..len-1`."""
        ...


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
      weight: its share of the stream relative to the other parts.
      shuffle: whether its epochs are shuffled; generated sources are read in order.
      path: the path by which a curriculum names the part (`train.curriculum`); "" if the data have no parts.
    """

    source: Source
    weight: float = 1.0
    shuffle: bool = True
    path: str = ""


# Replaces a picture or a video in samples whose pictures are not opened.
NO_PICTURE = np.zeros((0, 0, 3), np.uint8)
NO_VIDEO = np.zeros((0, 0, 0, 3), np.uint8)


def still(image: np.ndarray) -> np.ndarray:
    """Returns a picture itself, and of a video its first frame: uint8 [H, W, 3]."""
    return image if image.ndim == 3 else image[0]


def outline(source: Source, index: int) -> Sample | Sheet:
    """Returns sample or sheet `index` with `NO_PICTURE` in place of each picture if the source has a method `outline`.

    Otherwise it returns it whole. Raises what `source[index]` raises, except errors about pictures.
    """
    make_outline = getattr(source, "outline", None)
    return source[index] if make_outline is None else make_outline(index)


class SkipSample(Exception):
    """A record that cannot be used.

    Attributes:
      reason: a short slug by which skipped samples are counted, such as "broken_image" or "image_count".
      detail: the exact defect, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
