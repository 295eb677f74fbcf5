"""Pages of the second renderer: reproducible, and with the facts that their questions need."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from visor_jax.data.almanac.source import Almanac, Row
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError

INSTALLED = importlib.util.find_spec("vl_convert") is not None


def vega_pages(**settings) -> Almanac:
    row = Row(text=128, visual=72, grid=8, patch=12)
    return Almanac("test", 0, load_tokenizer("almanac"), row, exercise="pages_vega", **settings)


@pytest.mark.skipif(INSTALLED, reason="the renderer is installed")
def test_without_the_renderer_the_message_says_what_to_install():
    with pytest.raises(RequestError, match=r"pages_vega.*pip install 'visor-jax\[vega\]'"):
        _ = vega_pages()[0]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="vl-convert-python is not installed")
def test_pages_are_reproducible_and_have_ink_of_every_line():
    pages = vega_pages(tasks=("read", "value", "cell2", "bars"), turns=1)
    for index in range(24):
        first, again = pages[index], pages[index]
        assert np.array_equal(first.images[0], again.images[0]) and first.turns == again.turns
        pixels = first.images[0].astype(int)
        assert pixels.shape == (96, 96, 3)
        paper = pixels[0, 0]
        assert (np.abs(pixels - paper).sum(-1) > 90).mean() > 0.02
        if first.turns[0].task == "read":
            assert len(first.turns[0].answer.split("\n")) >= 2
