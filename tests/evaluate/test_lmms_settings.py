"""Settings of lmms-eval's tasks, and the names by which it finds our models; tests/export/test_lmms_eval.py runs it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.errors import RequestError
from visor_jax.evaluate import lmms_manifests
from visor_jax.evaluate.lmms_settings import NO_STOP, Settings, cut, read_settings

ROOT = Path(__file__).parents[2]


def test_settings_of_a_task() -> None:
    assert read_settings({"until": [NO_STOP]}, 1024, 3) == Settings(1024)
    greedy = {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "do_sample": False, "num_beams": 1}
    assert read_settings(greedy, 1024, 3) == Settings(16)
    sampled = {"temperature": 0.7, "top_p": 0.9, "until": "\n", "image_aspect_ratio": "original", "top_k": None}
    assert read_settings(sampled, 64, 3) == Settings(64, 0.7, 0.9, ("\n",), 3)
    with pytest.raises(RequestError, match="num_beams=4: expected 1"):
        read_settings({"num_beams": 4}, 64, 0)
    with pytest.raises(RequestError, match="top_k=50: expected top_p"):
        read_settings({"temperature": 1.0, "top_k": 50}, 64, 0)


@given(st.text("abc"), st.lists(st.text("ab", min_size=1), max_size=3))
def test_a_cut_text_ends_before_the_first_stop(text: str, until: list[str]) -> None:
    whole = cut(text, until)
    assert text.startswith(whole) and not any(stop in whole for stop in until)
    assert whole == text or any(text[len(whole) :].startswith(stop) for stop in until)


def test_entry_point_and_manifests_name_what_exists() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"visor": f"{lmms_manifests.__name__}:{lmms_manifests.manifests.__name__}"}
    for path in lmms_manifests.CLASSES.values():
        module, _, name = path.rpartition(".")
        assert f"class {name}(" in (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()
