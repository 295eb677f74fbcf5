"""JSON values of every process, joined: texts of different lengths are padded on the way and come back whole."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from visor_jax.scale import gather
from visor_jax.scale.gather import gathered, merged

PARTS = [{"0": {"drawn": 12, "waiting": "3 5 11"}}, {"1": {"drawn": 7, "waiting": ""}}, {}]


def test_one_process_keeps_its_part() -> None:
    assert merged(PARTS[0]) == PARTS[0]


def in_three_processes(monkeypatch: pytest.MonkeyPatch, own: int, texts: Sequence[Sequence[bytes]]) -> None:
    """Makes this process one of three that gather `texts`; the collective computes what the others contribute."""
    framed = [json.dumps([*map(len, part)]).encode() + b"\n" + b"".join(part) for part in texts]

    met: list[None] = []

    def allgather(value: np.ndarray) -> np.ndarray:
        assert met, "a process that comes early waits where it reports progress, not in the collective"
        if value.ndim == 0:
            assert value == len(framed[own])
            return np.array([len(text) for text in framed])
        assert value.tobytes()[: len(framed[own])] == framed[own]
        return np.stack([np.frombuffer(text.ljust(len(value), b"\0"), np.uint8) for text in framed])

    monkeypatch.setattr(jax, "process_count", lambda: len(texts))
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    monkeypatch.setattr(gather, "meet", lambda: met.append(None))


@pytest.mark.parametrize("own", range(3))
def test_the_parts_of_all_processes_are_joined(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_three_processes(monkeypatch, own, [[json.dumps(part).encode()] for part in PARTS])
    assert merged(PARTS[own]) == {**PARTS[0], **PARTS[1]}


@pytest.mark.parametrize("own", range(3))
def test_texts_of_every_process_come_back_whole(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[b"a\nb", b"", b"\0\0"], [], [b"[1]\n"]]
    in_three_processes(monkeypatch, own, texts)
    assert gathered(texts[own]) == texts
