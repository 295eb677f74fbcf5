"""Pictures: everything is inside, levels differ without color, text of data sets is not parsed, files are equal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from visor_jax.analysis.api import LAYER_ANALYSES, RUN_ANALYSES, chosen
from visor_jax.analysis.base import LayerTable
from visor_jax.analysis.drawing import Curve, layer_curves
from visor_jax.analysis.write import pictures, write
from visor_jax.errors import RequestError

LEVELS = {"color": "easy", "count": "middle", "$x_1^$<b>": "hard", "cell": "hard"}


@pytest.fixture
def measured(table: Callable[..., LayerTable]) -> LayerTable:
    columns = [column for analysis in LAYER_ANALYSES for column in analysis.columns]
    rng = np.random.default_rng(0)
    of_tasks = {task: rng.random(5) for task in LEVELS}
    return table(dict.fromkeys(LEVELS, 0.8), LEVELS, **dict.fromkeys(columns, of_tasks))


def fits(drawing: Figure) -> bool:
    """Returns whether all that is drawn lies inside the picture."""
    width, height = drawing.get_size_inches()
    box = drawing.get_tightbbox()
    return box.x0 >= -0.02 and box.y0 >= -0.02 and box.x1 <= width + 0.02 and box.y1 <= height + 0.02


@pytest.mark.parametrize("analysis", LAYER_ANALYSES, ids=lambda analysis: analysis.name)
def test_pictures_of_layers(analysis: object, measured: LayerTable, tmp_path: Path) -> None:
    drawing = analysis.draw(measured)  # type: ignore[attr-defined]
    png, svg = pictures(drawing)
    assert fits(drawing)
    with Image.open(io.BytesIO(png)) as image:
        corner = image.convert("RGBA").getpixel((0, 0))
    assert corner == (255, 255, 255, 255), "a background of its own, for dark pages"
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert "decoder layer" in text, "text stays text, and axes have labels"
    assert pictures(analysis.draw(measured)) == (png, svg)  # type: ignore[attr-defined]
    rows = list(analysis.rows(measured))  # type: ignore[attr-defined]
    assert len(rows) == len(LEVELS) * 5 and rows[0].keys() >= {"task", "level", "samples", "accuracy", "layer"}
    assert [path.suffix for path in write(tmp_path, "x", rows, drawing)] == [".csv", ".png", ".svg"]


def test_lines_of_levels_differ_without_color(measured: LayerTable) -> None:
    [axes] = layer_curves(measured, [Curve("cka_first", "Change", "CKA", 100)]).axes
    thick = [line for line in axes.lines if line.get_linewidth() > 1]
    assert len({(line.get_linestyle(), line.get_marker()) for line in thick}) == len(thick) == 3
    expected = 100 * measured.measures["cka_first"]["color"]
    np.testing.assert_allclose(np.asarray(thick[0].get_ydata(), float), expected)


def test_only_names_analyses() -> None:
    assert chosen([], RUN_ANALYSES) == [*RUN_ANALYSES]
    names = [analysis.name for analysis in chosen(["contribution", "cka"], LAYER_ANALYSES)]
    assert names == ["cka", "contribution"], "in the order of the table"
    with pytest.raises(RequestError, match=r"--only=contributoin: did you mean 'contribution'"):
        chosen(["contributoin"], LAYER_ANALYSES)
    with pytest.raises(RequestError, match=r"--only=cka: expected some of budgets, routes, costs, lengths"):
        chosen(["cka"], RUN_ANALYSES)
