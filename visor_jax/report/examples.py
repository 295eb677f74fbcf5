"""Builds the cards of example answers: pictures, what the answer depends on, where cross-attention looks.

In: the examples of an evaluation or a benchmark and their pictures. Out: texts and pictures as data URIs.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from visor_jax.report import figures
from visor_jax.report.numbers import data_uri, flops, percent
from visor_jax.report.results import Pictures, Row

PICTURE = 320  # longest side of an embedded picture in pixels
THUMBNAIL = 160  # of a picture with an overlay per layer
MARK = np.array([214, 64, 10], np.float32)  # the color of an overlay
STRONGEST = 0.72  # share of that color at the largest value


def cards(result: Row, pictures: Pictures, tasks: Sequence[tuple[str, str]], colors: Mapping[str, str]) -> list[Row]:
    """Builds the cards of the example answers, easy tasks first.

    Args:
      result: with "examples" and "dense".
      tasks: (task, level) in display order.
      colors: of the budgets.
    """
    order, levels = {task: place for place, (task, _) in enumerate(tasks)}, dict(tasks)
    largest = result["dense"]["decoder_gflops"]
    ordered = sorted(result.get("examples", ()), key=lambda e: order.get(e["task"], len(order)))
    built = []
    for example in ordered:
        picture, color = pictures.get(example["image"]), colors.get(example["budget"], figures.FAINT)
        right = example.get("right")
        built.append(
            {
                **{name: example[name] for name in ("question", "answer", "prediction", "budget", "task")},
                "right": example["prediction"].strip() == example["answer"].strip() if right is None else right,
                "score": None if example.get("score") is None else f"{example['score']:.2f}",
                "level": levels.get(example["task"], ""),
                "color": color,
                "on_dark": figures.is_dark(color),
                "pixelated": picture is not None and max(picture.shape[:2]) <= PICTURE // 2,
                "flops": f"{flops(example['decoder_gflops'], largest)} {figures.flops_unit(largest)[1]}",
                **example_pictures(picture, example),
            }
        )
    return built


def by_level(built: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Groups cards by level, in their order."""
    groups: dict[str, list[Row]] = {}
    for card in built:
        groups.setdefault(card["level"], []).append(card)
    return list(groups.items())


def example_pictures(picture: np.ndarray | None, example: Row) -> Row:
    """Returns a picture and its overlays as data URIs: relevance, attention averaged over layers and of each layer."""
    layers = [layer for layer in example.get("attention") or () if is_map(layer["patches"])]
    shown: Row = {"picture": None, "relevance": None, "attention": None, "layers": []}
    if picture is None:
        return shown
    shown["picture"] = data_uri(*embedded(picture))
    if is_map(relevance := example.get("relevance")):
        shown["relevance"] = overlay(picture, np.array(relevance))
    if layers and len({np.shape(layer["patches"]) for layer in layers}) == 1:
        # Each layer's map has its own maximum 100; the mean is over these, so that no layer drowns another.
        shown["attention"] = overlay(picture, np.mean([layer["patches"] for layer in layers], axis=0))
        if len(layers) > 1:
            shown["layers"] = [
                {
                    "layer": layer["layer"],
                    "on_tile": percent(layer["on_tile"]),
                    "picture": overlay(picture, np.array(layer["patches"]), THUMBNAIL),
                }
                for layer in layers
            ]
    return shown


def is_map(values: Sequence[Sequence[int]] | None) -> bool:
    """Returns whether values by rows and columns are there, with equally long rows."""
    return bool(values) and len({len(row) for row in values}) == 1 and len(values[0]) > 0


def overlay(picture: np.ndarray, percents: np.ndarray, side: int = PICTURE) -> str:
    """Returns a picture in gray, its patches as orange as their values in percent, as a data URI."""
    gray = np.asarray(Image.fromarray(picture).convert("L").convert("RGB"), np.float32)
    patches = np.clip(percents, 0, 100).astype(np.uint8)
    size = picture.shape[1], picture.shape[0]
    mask = np.asarray(Image.fromarray(patches).resize(size, Image.Resampling.NEAREST), np.float32)
    strength = STRONGEST * mask[..., None] / 100
    return data_uri(*embedded((gray * (1 - strength) + MARK * strength).astype(np.uint8), side))


def embedded(picture: np.ndarray, side: int = PICTURE) -> tuple[bytes, str]:
    """Encodes a picture: small ones losslessly as PNG, large ones scaled down as JPEG; returns (bytes, type)."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= side:
        image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), "png"
    image.thumbnail((side, side))
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue(), "jpeg"
