"""The preview of what the model sees: it agrees with the arrays of examples and batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.config import architecture, as_config
from visor_jax.data import anyres
from visor_jax.data.collate import RowShape, encode_example, make_batch
from visor_jax.data.preview_model import fill_rows, model_sheet
from visor_jax.data.preview_rows import color_of, draw_rows, tile_owners
from visor_jax.data.preview_text import TextPainter
from visor_jax.data.preview_tokens import KINDS, TARGET, boxes, draw_sample, grids, used_patches
from visor_jax.data.sample import Sample, Turn
from visor_jax.testing import almanac_tokenizer, random_picture, tiny_config

PACKING = {"data.pack_window": 8, "data.pool_rows": 2, "data.pool_tiles": 12, "data.visual_length": 300,
           "data.text_length": 300, "data.batch_size": 2, "data.tiles": 12}  # fmt: skip
FONT = TextPainter(13)


@pytest.fixture(scope="module")
def config() -> Any:
    tiles = {"model.vision.tile_size": 48, "model.vision.patch_size": 8, "model.anyres.pinpoints": "(1x1),...,(2x2)"}
    return as_config(tiny_config({**PACKING, **tiles}))


def make_sample(name: str, *shapes: tuple[int, ...]) -> Sample:
    images = tuple(
        random_picture(shape[0], shape[1], seed) if len(shape) == 2 else np.zeros((*shape, 3), np.uint8)
        for seed, shape in enumerate(shapes)
    )
    turns = (Turn("<image>" * len(shapes) + "What is it?", "a dog"), Turn("Which color?", "red"))
    return Sample(name, images, turns, "test", system="Be terse.")


def encoded(sample: Sample, config: Any) -> Any:
    return encode_example(sample, almanac_tokenizer(), architecture(config))


@pytest.mark.parametrize("shapes", [(), ((60, 20),), ((20, 20), (20, 30), (3, 20, 20)), ((2, 20, 20),)])
def test_boxes_are_the_sequence_that_the_model_sees(config: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    sample, tokenizer = make_sample("x", *shapes), almanac_tokenizer()
    example = encoded(sample, config)
    lengths = anyres.visual_layout([image.shape[:-1] for image in sample.images], architecture(config)).lengths
    shown = [*boxes(example, tokenizer, lengths)]
    positions = [box.position for box in shown]
    assert positions == sorted(positions) and len(shown) == example.size.text + len(shapes)
    assert [box.kind for box in shown].count("picture") == len(shapes)
    assert sum(box.target for box in shown) == example.loss_mask.sum()
    by_kind = {kind: "".join(box.text for box in shown if box.kind == kind) for kind in KINDS}
    assert by_kind["system"] == "Be terse."
    assert by_kind["user"].split() == ["What", "is", "it?Which", "color?"]
    assert by_kind["assistant"].split() == ["a", "dogred"]
    assert {box.text for box in shown if box.target and box.kind != "assistant"} == {"<|im_end|>"}


def test_boxes_of_independent_turns_continue_what_the_turns_share(config: Any) -> None:
    tokenizer, arch, images = almanac_tokenizer(), architecture(config), (random_picture(20, 20, 0),)
    sample = Sample("x", images, (Turn("What is it?", "a dog"), Turn("What color?", "red")), "test", system="Be terse.")
    example = encode_example(sample, tokenizer, arch, independent_turns=True)
    shown = [*boxes(example, tokenizer, [len(example.visual_positions)])]
    assert [box.kind for box in shown].count("picture") == 1 and len(shown) == example.size.text + 1
    for number, turn in enumerate(sample.turns, start=1):
        alone = encode_example(dataclasses.replace(sample, turns=(turn,)), tokenizer, arch)
        expected = [*boxes(alone, tokenizer, [len(alone.visual_positions)])][:-1]  # without the last line break
        found = [dataclasses.replace(box, turn=0) for box in shown if box.turn in (0, number)]
        assert found == expected
    band = draw_sample(sample, example, tokenizer, arch, FONT)
    plain = draw_sample(sample, encoded(sample, config), tokenizer, arch, FONT)
    assert band.height >= plain.height
    batch = make_batch([[example]], RowShape(2, 80, 90), arch, independent_turns=True)
    without = {name: array for name, array in batch.arrays.items() if name != "text_turns"}
    lines = [np.asarray(draw_rows(x, 1, FONT)) for x in (batch, batch._replace(arrays=without))]
    assert (lines[0] != lines[1]).any(axis=(0, 2)).sum() == 2, "a line before each turn"


def test_the_grid_and_the_unused_patches(config: Any) -> None:
    arch: Architecture = architecture(config)
    assert grids([np.zeros((20, 60, 3), np.uint8)], arch) == [(3, 2)]
    assert grids([np.zeros((60, 20, 3), np.uint8)], arch) == [(3, 1)]
    assert grids([np.zeros((9, 9, 3), np.uint8)] * 2 + [np.zeros((4, 9, 9, 3), np.uint8)], arch) == [
        (1, 0), (1, 0), (4, 0)]  # fmt: skip
    used = used_patches(encoded(make_sample("x", (10, 60)), config), arch)
    assert used[0].all() and not used[1:].all() and used[1:].any()  # the crops have padding above and below
    video = used_patches(encoded(make_sample("x", (2, 20, 20)), config), arch)
    assert video.all()


def test_tinted_patches_and_targets_are_in_the_picture(config: Any) -> None:
    sample = make_sample("x", (10, 60))
    band = np.asarray(
        draw_sample(sample, encoded(sample, config), almanac_tokenizer(), architecture(config), FONT), np.int32
    )
    padding = [100, 30, 30]
    assert (band == padding).all(-1).sum() > 100
    for color in (TARGET, *(KINDS[kind][1] for kind in ("system", "user", "assistant", "picture", "template"))):
        rgb = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
        assert (band == rgb).all(-1).sum() > 20, color


def test_rows_show_every_sample_and_the_tiles_it_reads(config: Any) -> None:
    arch = architecture(config)
    shapes = [((20, 60),), (), ((20, 20), (30, 30)), ((20, 20),), ((60, 20),), ()]
    examples = [encoded(make_sample(f"s{n}", *shape), config) for n, shape in enumerate(shapes)]
    rows, shape, per_pool = fill_rows(examples, config)
    assert per_pool == 2 and {example.id for row in rows for example in row} == {f"s{n}" for n in range(6)}
    assert max(map(len, rows)) > 1
    batch = make_batch(rows, shape, arch, per_pool)
    owners = tile_owners(batch, 0, per_pool)
    expected = [
        (number, segment)
        for number, row in enumerate(rows)
        for segment, example in enumerate(row, 1)
        for _ in range(example.size.tiles)
    ]
    assert [tuple(owner) for owner in owners if owner[0] >= 0] == expected
    picture = np.asarray(draw_rows(batch, per_pool, FONT))
    for segment in range(1, max(map(len, rows)) + 1):
        rgb = [int(color_of(segment)[place : place + 2], 16) for place in (1, 3, 5)]
        assert (picture == rgb).all(-1).sum() > 100
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, pack_window=0))
    rows, shape, per_pool = fill_rows(examples, plain)
    assert [len(row) for row in rows] == [1, 1] and per_pool == 1


def test_long_and_unusual_samples_are_drawn(config: Any, tmp_path: Path) -> None:
    odd = Sample("o\n\u202e" * 200, (), (Turn("日本 \u202e" * 300, "wörd\t\n" * 200),), "test")
    many = make_sample("frames", (12, 20, 20))
    pairs = [(sample, encoded(sample, config)) for sample in (odd, many)]
    small = dataclasses.replace(config.data, pack_window=0, text_length=8192, visual_length=500)
    waiting = [example for _, example in pairs]
    missing = model_sheet(pairs, waiting, "rows\n", dataclasses.replace(config, data=small), tmp_path / "sheet.png")
    assert missing is not None
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 4000
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
