"""Sheets: several samples with small pictures as one example, which fills a row of a batch together.

In: what a source yields, a `Sample` or a `Sheet`. Out: an `Example`; of a sheet with one segment per sample. Small
pictures share tiles: each goes into the first tile that has enough places left, in the order of the samples. A picture
never lies in two tiles, and no text or visual token sees another sample's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data.candidates import candidate_arrays, moved
from visor_jax.data.collate import Content, Example, RowShape, check_fits, encode_example
from visor_jax.data.sample import Sample, Sheet, SkipSample, samples_of
from visor_jax.data.tile_pools import moved_gather
from visor_jax.data.tiles import patches_at, place_patches, tile_shapes
from visor_jax.data.tokenizer import ChatTokenizer


def encode_record(
    record: Sample | Sheet,
    tokenizer: ChatTokenizer,
    architecture: Architecture,
    *,
    system: str | None = None,
    targets: str = "answer",
    row_shape: RowShape | None = None,
    independent_turns: bool = False,
    all_scales: bool = False,
) -> Example:
    """Encodes a sample or a sheet as a training example; arguments as of `collate.encode_example`.

    Raises:
        SkipSample: as `collate.encode_example`, for any sample of a sheet; "empty_sheet"; "too_long": the samples of a
            sheet do not fit the row shape together.
    """
    encode = partial(
        encode_example,
        tokenizer=tokenizer,
        architecture=architecture,
        system=system,
        targets=targets,
        row_shape=row_shape,
        independent_turns=independent_turns,
        all_scales=all_scales,
    )
    examples = [*map(encode, samples_of(record))]
    if not isinstance(record, Sheet):
        return examples[0]
    if not examples:
        raise SkipSample("empty_sheet", "the sheet has no sample")
    joined = join(examples, architecture)
    check_fits(joined.id, joined.size, row_shape)
    return joined


# Arrays of an example that are those of its samples, one after the other.
_CHAINED = ("visual_positions", "text_tokens", "text_positions", "loss_mask")


@dataclass(frozen=True)
class Place:
    """Where an example's tiles go.

    Attributes:
        tile: index of its (first) tile.
        first: its first place there; 0 except of a small picture that shares the tile.
        pictures: small pictures that lie in the tile before it.
        opened: tiles that begin with it.
    """

    tile: int
    first: int
    pictures: int
    opened: int


def assign_places(small: Sequence[int], tiles: Sequence[int], places_per_tile: int) -> list[Place]:
    """Returns the place of each example, in order.

    Args:
        small: patches of its small picture; 0 if its pictures fill whole tiles, or if it has none.
        tiles: number of its tiles.
        places_per_tile: patches of one tile.
    """
    places: list[Place] = []
    shared: dict[int, tuple[int, int]] = {}  # tile -> its used places and its pictures
    num_tiles = 0
    for patches, own_tiles in zip(small, tiles, strict=True):
        found = next((tile for tile, (used, _) in shared.items() if used + patches <= places_per_tile), None)
        if patches and found is not None:
            used, pictures = shared[found]
            places.append(Place(found, used, pictures, 0))
            shared[found] = (used + patches, pictures + 1)
            continue
        if patches:
            shared[num_tiles] = (patches, 1)
        places.append(Place(num_tiles, 0, 0, own_tiles))
        num_tiles += own_tiles
    return places


def join(examples: Sequence[Example], architecture: Architecture) -> Example:
    """Returns examples as one, whose segments 1, 2, ... they are; at least one."""
    patches = architecture.vision.patches_per_tile
    sizes = [example.size for example in examples]
    places = assign_places([*map(_small_patches, examples)], [size.tiles for size in sizes], patches)
    num_tiles = sum(place.opened for place in places)
    shapes = tile_shapes(num_tiles, architecture)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    taps = max(example.visual_gather.shape[1] for example in examples)
    gathers, turn_indices, turns = [], [], 0
    for example, place in zip(examples, places, strict=True):
        _copy_tiles(arrays, example, place, architecture)
        gather = moved_gather(example.visual_gather, (len(example.tiles), place.tile, num_tiles), patches)
        gathers.append(_widened(np.where(gather < num_tiles * patches, gather + place.first, gather), taps))
        turn_indices.append(np.where(example.turn_index >= 0, example.turn_index + turns, -1))
        turns += len(example.tasks)
    text_turns = [example.text_turns for example in examples if example.text_turns is not None]  # of all or of none
    numbers = np.arange(1, len(examples) + 1, dtype=np.int32)
    chained = {name: np.concatenate([getattr(example, name) for example in examples]) for name in _CHAINED}
    for name in candidate_arrays(architecture):
        of_each = [moved(getattr(x, name), place.tile) for x, place in zip(examples, places, strict=True)]
        chained[name] = np.concatenate(of_each)
    return examples[0]._replace(
        **arrays,
        **chained,
        tasks=tuple(task for example in examples for task in example.tasks),
        visual_gather=np.concatenate(gathers).astype(np.int32),
        visual_weights=np.concatenate([_widened(example.visual_weights, taps) for example in examples]),
        turn_index=np.concatenate(turn_indices).astype(np.int32),
        text_turns=np.concatenate(text_turns) if text_turns else None,
        length=max(example.length for example in examples),
        visual_segments=np.repeat(numbers, [size.visual for size in sizes]),
        text_segments=np.repeat(numbers, [size.text for size in sizes]),
        members=tuple(
            (example.id, Content(example.source, place.opened, size.visual, size.text, whole=example.whole))
            for example, place, size in zip(examples, places, sizes, strict=True)
        ),
    )


def _small_patches(example: Example) -> int:
    """Returns the number of patches of an example's small picture; 0 if it has none."""
    if example.tile_segments is None or len(example.tiles) != 1:
        return 0
    used = int(np.count_nonzero(example.tile_segments))
    return used if used < example.tile_segments.size else 0


def _copy_tiles(arrays: dict[str, np.ndarray], example: Example, place: Place, architecture: Architecture) -> None:
    """Copies an example's tiles, or the patches of its small picture, to their place in the arrays of a sheet."""
    count = _small_patches(example)
    if not count:
        for name, array in arrays.items():
            array[place.tile : place.tile + len(example.tiles)] = getattr(example, name)
        return
    patches = patches_at(example.tiles[0], count, architecture)
    place_patches(arrays["tiles"][place.tile], place.first, patches, architecture)
    for name, array in arrays.items():
        if name != "tiles":
            array[place.tile, place.first : place.first + count] = getattr(example, name)[0, :count]
    arrays["tile_segments"][place.tile, place.first : place.first + count] = place.pictures + 1


def _widened(values: np.ndarray, taps: int) -> np.ndarray:
    """Returns [Nv, K] with K = `taps`, padded with zeros."""
    missing = taps - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing))) if missing else values
