"""JSON values of every process, joined: texts of different lengths are padded on the way and come back whole."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from visor_jax.scale.gather import merged

PARTS = [{"0": {"drawn": 12, "waiting": "3 5 11"}}, {"1": {"drawn": 7, "waiting": ""}}, {}]


def test_one_process_keeps_its_part() -> None:
    assert merged(PARTS[0]) == PARTS[0]


@pytest.mark.parametrize("own", range(3))
def test_the_parts_of_all_processes_are_joined(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process contributes what it would; the collective is replaced by one that computes the others' parts."""
    texts = [json.dumps(part).encode() for part in PARTS]

    def gathered(value: np.ndarray) -> np.ndarray:
        if value.ndim == 0:
            assert value == len(texts[own])
            return np.array([len(text) for text in texts])
        assert value.tobytes().rstrip(b"\0") == texts[own]
        return np.stack([np.frombuffer(text.ljust(len(value), b"\0"), np.uint8) for text in texts])

    monkeypatch.setattr(jax, "process_count", lambda: len(PARTS))
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    assert merged(PARTS[own]) == {**PARTS[0], **PARTS[1]}
