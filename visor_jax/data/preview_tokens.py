"""Draws samples as the model receives them: tiles in their grid, and tokens colored by kind and by loss mask.

In: a sample and its `Example`. Out: a picture for a preview sheet. Everything is read from the example's arrays: the
tiles are the tower's input, patches that no visual token uses are tinted, and every text token is a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from visor_jax.architecture import Architecture
from visor_jax.data import anyres
from visor_jax.data.chat_template import ASSISTANT, NEWLINE, SYSTEM, USER
from visor_jax.data.collate import Example
from visor_jax.data.preview_text import TextPainter
from visor_jax.data.sample import Sample
from visor_jax.data.tiles import cells, layout_of
from visor_jax.data.tokenizer import ChatTokenizer

WIDTH = 1280  # pixels of a sheet, without its margins
LINE = 22  # height of a line of tokens
PAGE, INK, FAINT, RULE = "#ffffff", "#1c1c1c", "#6a6b70", "#d9dadd"
TARGET = "#0b6b3a"  # underlines tokens that are targets of the loss

# Kind of a token -> (its name in the legend, the color of its box).
KINDS = {
    "template": ("chat template", "#e4e5e9"),
    SYSTEM: ("system text", "#f3e3bf"),
    USER: ("question", "#d3e3f8"),
    ASSISTANT: ("answer", "#cdebd5"),
    "picture": ("visual tokens of a picture", "#e6d4f4"),
}
_UNUSED = np.array([200, 60, 60])  # tint of patches that no visual token uses
_TILES_WIDTH, _GAP = 460, 3
_MOST_TILE = 120  # pixels, the side of a drawn tile
_MOST_HEIGHT = 420  # pixels of a grid of tiles
_MOST_TOKENS = 240  # drawn per sample; beyond that the middle is left out
_MOST_ROWS = 12  # of single tiles (several pictures, frames of a video)
_TOKEN_TEXT = 40  # characters drawn of one token


@dataclass(frozen=True)
class Box:
    """One token of the interleaved sequence, or all visual tokens of a picture.

    `turn` counts independent turns from 1; 0 is what they share.
    """

    text: str
    kind: str
    position: int
    target: bool = False
    turn: int = 0


def draw_sample(
    sample: Sample, example: Example, tokenizer: ChatTokenizer, architecture: Architecture, font: TextPainter
) -> Image.Image:
    """Returns a band of the sheet, `WIDTH` wide: a caption, the tiles on the left, the tokens on the right."""
    size = example.size
    caption = (
        f"{sample.id}: {size.tiles} tiles, {size.visual} visual tokens, {size.text} text tokens, "
        f"{int(example.loss_mask.sum())} of them targets"
    )
    if example.text_turns is not None:
        shared = int((example.text_turns == 0).sum())
        caption += f"; {len(example.tasks)} independent turns, which share {shared} text tokens"
    tiles = _draw_tiles(sample, example, architecture)
    left = tiles.width + 16 if tiles.width else 0
    lengths = layout_of([image.shape[:-1] for image in sample.images], architecture, sample.origin).lengths
    tokens = _draw_tokens([*boxes(example, tokenizer, lengths)], WIDTH - left, font)
    band = Image.new("RGB", (WIDTH, LINE + 4 + max(tiles.height, tokens.height)), PAGE)
    font.draw(ImageDraw.Draw(band), (0, 0), font.readable(" ".join(caption.split()))[:200], INK)
    band.paste(tiles, (0, LINE + 4))
    band.paste(tokens, (left, LINE + 4))
    return band


# --- tiles ------------------------------------------------------------------------------------------------------------


def grids(images: Sequence[np.ndarray], architecture: Architecture) -> list[tuple[int, int]]:
    """Returns (tiles, columns of its grid of crops) of each picture or video; 0 columns: tiles without a grid."""
    single = sum(image.ndim == 3 for image in images)
    found = []
    for image in images:
        tiles = anyres.tile_count(image.shape[:-1], architecture, single)
        columns = 0
        if image.ndim == 3 and tiles > 1:
            height, width = image.shape[:2]
            columns = anyres.best_pinpoint((height, width), architecture.anyres.pinpoints)[1]
            columns //= architecture.vision.tile_size
        found.append((tiles, columns))
    return found


def used_patches(example: Example, architecture: Architecture) -> np.ndarray:
    """Returns which patches some visual token is made of: bool [n, side, side]."""
    patches, side = architecture.vision.patches_per_tile, architecture.vision.patches_per_side
    used = np.zeros(len(example.tiles) * patches + 1, bool)  # the last one is the newline
    used[example.visual_gather[example.visual_weights > 0]] = True
    return used[:-1].reshape(-1, side, side)


def in_its_window(example: Example, architecture: Architecture) -> Example:
    """Returns the example of a small picture with its patches where they stand in the tile, by `tile_positions`."""
    assert example.tile_positions is not None and example.tile_segments is not None
    used, side = example.tile_segments[0] > 0, architecture.vision.patches_per_side
    tiles = np.zeros_like(example.tiles)
    cells(tiles[0], architecture)[np.divmod(example.tile_positions[0][used], side)] = cells(
        example.tiles[0], architecture
    )[np.divmod(np.flatnonzero(used), side)]
    window = np.append(example.tile_positions[0], used.size)  # the newline keeps its index
    return example._replace(tiles=tiles, visual_gather=window[example.visual_gather])


def _tinted(example: Example, architecture: Architecture) -> np.ndarray:
    """Returns the tiles with unused patches tinted: uint8 [n, S, S, 3]."""
    patch = architecture.vision.patch_size
    unused = ~used_patches(example, architecture).repeat(patch, 1).repeat(patch, 2)
    edge = example.tiles.shape[1]
    mask = np.zeros(example.tiles.shape[:3], bool)
    mask[:, : unused.shape[1], : unused.shape[2]] = unused[:, :edge, :edge]
    mixed = (example.tiles.astype(np.int32) + _UNUSED) // 2
    return np.where(mask[..., None], mixed, example.tiles).astype(np.uint8)


def _draw_tiles(sample: Sample, example: Example, architecture: Architecture) -> Image.Image:
    """Draws each picture's stretched tile and beside it the grid of its crops; single tiles flow in lines."""
    tiles = _tinted(example if sample.origin is None else in_its_window(example, architecture), architecture)
    canvas = Image.new("RGB", (_TILES_WIDTH, (_MOST_TILE + _GAP) * _MOST_ROWS), PAGE)
    left = top = bottom = number = width = 0
    for count, columns in grids(sample.images, architecture) if sample.origin is None else [(1, 0)]:
        of_picture, number = tiles[number : number + count], number + count
        if not columns:
            side = _MOST_TILE if len(tiles) <= 3 else _MOST_TILE // 2
            for tile in of_picture:
                if left + side > _TILES_WIDTH:
                    left, top = 0, top + side + _GAP
                canvas.paste(_scaled(tile, side), (left, top))
                left, bottom, width = left + side + _GAP, max(bottom, top + side), max(width, left + side)
            continue
        rows = -(-(count - 1) // columns)
        side = min(_MOST_TILE, (_TILES_WIDTH - 5 * _GAP) // (columns + 1) - _GAP, _MOST_HEIGHT // rows - _GAP)
        canvas.paste(_scaled(of_picture[0], side), (0, bottom))
        for place, tile in enumerate(of_picture[1:]):
            row, column = divmod(place, columns)
            corner = (side + 4 * _GAP + column * (side + _GAP), bottom + row * (side + _GAP))
            canvas.paste(_scaled(tile, side), corner)
        width = max(width, side + 4 * _GAP + columns * (side + _GAP))
        left, top = 0, bottom + rows * (side + _GAP)
        bottom = top
    return canvas.crop((0, 0, width, min(bottom, canvas.height)))


def _scaled(tile: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(tile)
    enlarged = picture.width < side
    return picture.resize((side, side), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


# --- tokens -----------------------------------------------------------------------------------------------------------


def boxes(example: Example, tokenizer: ChatTokenizer, lengths: Sequence[int]) -> Iterator[Box]:
    """Yields the tokens in the order of their positions, independent turns one after the other.

    `lengths` visual tokens of each picture are one box.
    """
    ends = [int(end) for end in np.cumsum(lengths)]
    pictures = [
        Box(f"picture {number}: {length} visual tokens", "picture", int(example.visual_positions[end - length]))
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True), 1)
    ]
    kind, in_header, header = state = "template", False, ""
    turns = np.zeros_like(example.text_tokens) if example.text_turns is None else example.text_turns
    tokens = zip(example.text_tokens, example.text_positions, example.loss_mask, turns, strict=True)
    turn = 0
    for id, position, target, of_turn in tokens:
        if of_turn != turn:  # it continues what the turns share
            (kind, in_header, header), turn = state, int(of_turn)
        while pictures and pictures[0].position < position:
            yield pictures.pop(0)
        text, of_token = tokenizer.decode([int(id)], keep_special=True), kind
        if id == tokenizer.start_token_id:
            of_token, in_header, header = "template", True, ""
        elif id == tokenizer.end_token_id:
            of_token, kind = "template", "template"
        elif in_header:
            of_token, header = "template", header + text
            in_header = NEWLINE not in header
            kind = kind if in_header else header.partition(NEWLINE)[0]
        state = state if turn else (kind, in_header, header)
        yield Box(text, of_token if of_token in KINDS else "template", int(position), bool(target), turn)
    yield from pictures


def _draw_tokens(tokens: list[Box], width: int, font: TextPainter) -> Image.Image:
    """Draws boxes line by line, independent turns on separate lines; lines begin with their first token's position."""
    if len(tokens) > _MOST_TOKENS:
        half = _MOST_TOKENS // 2
        left_out = Box(f"... {len(tokens) - 2 * half} tokens left out ...", "template", tokens[half].position)
        tokens = [*tokens[:half], left_out, *tokens[-half:]]
    canvas = Image.new("RGB", (width, LINE * (len(tokens) + 1)), PAGE)
    draw = ImageDraw.Draw(canvas)
    margin = int(font.getlength("000000 "))
    left, top, turn = width, -LINE, 0
    for token in tokens:
        text = font.readable(token.text.replace("\n", "\u21b5").replace("\t", "\u21e5"))[:_TOKEN_TEXT] or " "
        room = int(font.getlength(text)) + 6
        if left + room > width or token.turn > turn:
            left, top, turn = margin, top + LINE, token.turn
            font.draw(draw, (0, top + 2), str(token.position), FAINT)
        draw.rectangle((left, top, left + room - 2, top + LINE - 4), KINDS[token.kind][1])
        if token.target:
            draw.rectangle((left, top + LINE - 6, left + room - 2, top + LINE - 4), TARGET)
        font.draw(draw, (left + 2, top + 1), text, INK)
        left += room
    return canvas.crop((0, 0, width, top + LINE))


def draw_legend(font: TextPainter) -> Image.Image:
    """Returns a line that explains the colors."""
    legend = Image.new("RGB", (WIDTH, LINE), PAGE)
    draw = ImageDraw.Draw(legend)
    left = 0
    for name, color in [
        *KINDS.values(),
        ("target of the loss", ""),
        ("tinted red: patches that no visual token uses", "#82322f"),
    ]:
        draw.rectangle((left, 2, left + 16, LINE - 6), color or PAGE)
        if not color:
            draw.rectangle((left, LINE - 9, left + 16, LINE - 6), TARGET)
        font.draw(draw, (left + 22, 0), name, FAINT)
        left += 22 + int(font.getlength(name)) + 24
    return legend
