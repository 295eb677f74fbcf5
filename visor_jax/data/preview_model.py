"""Draws a preview sheet of what the model will see: samples as tiles and tokens, and the rows that a step receives.

In: samples, the samples that wait at a pool, and a configuration. Out: one PNG. The rows are filled as in training
(`packing.fill_pool`, or one sample per row).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from PIL import Image

from visor_jax.config import Config, architecture
from visor_jax.data.collate import Example, RowShape, make_batch
from visor_jax.data.from_config import make_tokenizer, training_row_shape
from visor_jax.data.packing import PoolShape, fill_pool
from visor_jax.data.preview_rows import caption, draw_rows, stacked
from visor_jax.data.preview_text import TextPainter
from visor_jax.data.preview_tokens import FAINT, PAGE, WIDTH, draw_legend, draw_sample
from visor_jax.data.sample import Sample
from visor_jax.files.read_write import write_bytes

_MARGIN, _TEXT = 16, 13
UNPACKED_ROWS = 3  # rows drawn without packing


def model_sheet(
    pairs: Sequence[tuple[Sample, Example]],
    waiting: Sequence[Example],
    title: str,
    config: Config,
    path: str | os.PathLike[str],
) -> set[str]:
    """Draws samples, then rows, and writes the sheet atomically.

    Args:
      pairs: samples and their examples.
      waiting: examples from which the rows are filled, at least one.
      title: of the rows.
      config: its row shape, packing, tokenizer and architecture.
      path: the PNG file to write.

    Returns:
      The characters that no installed font has; the sheet shows their names or numbers.
    """
    font, tokenizer, arch = TextPainter(_TEXT), make_tokenizer(config), architecture(config)
    parts = [draw_legend(font)]
    for sample, example in pairs:
        parts += [_rule(), draw_sample(sample, example, tokenizer, arch, font)]
    rows, shape, rows_per_pool = fill_rows(waiting, config)
    batch = make_batch(rows, shape, arch, rows_per_pool, independent_turns=config.data.independent_turns)
    parts += [_rule(), caption(title, font), draw_rows(batch, rows_per_pool, font)]
    body = stacked(parts, 10)
    sheet = Image.new("RGB", (WIDTH + 2 * _MARGIN, body.height + 2 * _MARGIN), PAGE)
    sheet.paste(body, (_MARGIN, _MARGIN))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
    return font.missing


def fill_rows(examples: Sequence[Example], config: Config) -> tuple[list[list[Example]], RowShape, int]:
    """Returns the rows of one pool, or the first rows without packing; their shape, and the rows of a pool."""
    data = config.data
    if not data.pack_window:
        rows = [[example] for example in examples[: min(UNPACKED_ROWS, data.batch_size)]]
        return rows, training_row_shape(config), 1
    shape = PoolShape(data.pool_rows, data.pool_tiles, data.visual_length, data.text_length)
    chosen = fill_pool([example.size for example in examples[: data.pack_window]], shape)
    return [[examples[index] for index in row] for row in chosen], shape.largest, data.pool_rows


def _rule() -> Image.Image:
    return Image.new("RGB", (WIDTH, 1), FAINT)
