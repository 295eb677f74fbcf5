"""Small values and texts from every process, known to all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from visor_jax.scale.distributed import meet


def merged(part: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the entries of all processes' mappings of JSON values. Every process must call it at the same point."""
    whole: dict[str, Any] = {}
    for (text,) in gathered([json.dumps(part).encode("ascii")]):
        whole |= json.loads(text)
    return whole


def gathered(texts: Sequence[bytes]) -> list[list[bytes]]:
    """Returns the texts of every process, in the order of the processes. All must call it at the same point."""
    if jax.process_count() == 1:
        return [list(texts)]
    meet()
    header = json.dumps([len(text) for text in texts]).encode("ascii")
    return [_split(joined) for joined in _all_bytes(b"\n".join([header, b"".join(texts)]))]


def _split(joined: bytes) -> list[bytes]:
    """Returns the texts that one process has joined behind the list of their lengths."""
    header, _, rest = joined.partition(b"\n")
    texts, start = [], 0
    for length in json.loads(header):
        texts.append(rest[start : start + length])
        start += length
    return texts


def _all_bytes(mine: bytes) -> list[bytes]:
    """Returns the bytes of every process."""
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(mine)))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(every, lengths, strict=True)]
