"""What a sample is: pictures and a conversation about them. Every data source yields `Sample`s.

Ground floor of `visor_jax.data`: no image decoding, no tokens. A source that meets a bad record raises `SkipSample`;
whoever drives it counts the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Turn:
    """One question and its answer. The question may hold `<image>` markers; `task` is "" where there are no tasks."""

    question: str
    answer: str
    task: str = ""


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more pictures.

    Attributes:
      id: unique within its source, and enough to find the sample again.
      images: uint8 arrays of shape [height, width, 3], RGB.
      turns: the conversation, in order.
      source: name of the source it came from.
      level: "easy", "hard" or "" (unknown): whether all its questions are of one level.
      system: the record's own system text; "" leaves the configured one (`tokenizer.system`) in force.
    """

    id: str
    images: tuple[np.ndarray, ...]
    turns: tuple[Turn, ...]
    source: str
    level: str = ""
    system: str = ""


class Source(Protocol):
    """Random access to samples: `source[i]` is a pure function of the source's own settings and `i`."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Returns sample `index`; raises `SkipSample` for a bad record and `IndexError` outside `0..len-1`."""
        ...


# Stands for a picture in samples whose pictures are not opened.
NO_PICTURE = np.zeros((0, 0, 3), np.uint8)


def outline(source: Source, index: int) -> Sample:
    """Sample `index` with `NO_PICTURE` in place of each picture, where the source can say that much without opening any
    (by a method `outline`); else the whole sample.

    Raises: as `source[index]`, but for what is wrong with pictures.
    """
    known = getattr(source, "outline", None)
    return source[index] if known is None else known(index)


class SkipSample(Exception):
    """A record that cannot be used.

    Attributes:
      reason: a short slug under which skipped samples are counted, such as "broken_image" or "image_count".
      detail: what exactly is wrong, for the log.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
