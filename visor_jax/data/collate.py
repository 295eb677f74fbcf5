"""Turns samples into fixed-shape batches.

In: a `Sample` (pictures and turns), a `ChatTokenizer` and an `Architecture`. Out: an `Example` (the sample as arrays,
unpadded), and from rows of examples a `Batch` whose shapes a `RowShape` sets.

The decoder's stream is [V; T]: visual positions and text tokens are separate arrays. Each entry carries its position
id in the dense interleaved sequence (text before a picture, the picture's tokens, text after), so nothing is
physically interleaved. Several examples may share a row: each is one segment, numbered from 1; 0 is padding. A sheet
(`visor_jax.data.sheets`) is one example with as many segments as samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data import chat
from visor_jax.data.anyres import taps as taps_of_pictures
from visor_jax.data.candidates import candidate_arrays, moved
from visor_jax.data.row_shape import RowShape, batch_shapes
from visor_jax.data.sample import Sample, SkipSample
from visor_jax.data.scales import ScaleLayout, place_at_scale, shapes_at_scales
from visor_jax.data.tile_pools import moved_gather
from visor_jax.data.tiles import Origin, layout_of, make_tiles, tile_shapes
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.data.turns import encode_turns, interleaved_positions, turns_of_answers
from visor_jax.errors import RequestError


class Content(NamedTuple):
    """The source of one sample in a batch, and how many tiles, visual positions and text tokens it has.

    A tile that several samples of a sheet share counts for the first of them. `scales`: visual positions at each
    further scale of a training batch (`visor_jax.data.scales`). `whole`: visual positions without packing and
    reduction.
    """

    source: str
    tiles: int
    visual: int
    text: int
    scales: tuple[int, ...] = ()
    whole: int = 0


class Example(NamedTuple):
    """A sample, or all samples of a sheet, as arrays without padding; n tiles, Nv visual positions, Nt text tokens.

    N is Nv, or of a reduction that chooses tokens the number of those among which it does (`data.candidates`).

    Attributes:
        id: the sample's id; of a sheet that of its first sample.
        tasks: the task of each turn ("" if the source has no tasks).
        tiles: uint8 [n, S, S, 3].
        visual_gather, visual_weights: int32 and float32 [N, K]; index n * patches is the newline (`anyres.Layout`).
        visual_positions: int32 [Nv].
        text_tokens, text_positions: int32 [Nt], without picture placeholders.
        loss_mask: bool [Nt], True at targets, each predicted from the text token before it.
        turn_index: int32 [Nt], the turn of each target in an answer, -1 elsewhere.
        length: length of the dense interleaved sequence, which is the position id of the next token.
        source: name of the sample's source.
        tile_positions, tile_segments, tile_means, tile_scales: [n, P] (`visor_jax.data.tiles`); None if the batches
            have no such array.
        visual_segments, text_segments: int32 [Nv] and [Nt], the sample 1, 2, ... of a sheet; None of a sample.
        members: id and content of each sample of a sheet; empty of a sample.
        text_turns: int32 [Nt], of independent turns: 0 in what they share, 1, 2, ... in the turns; otherwise None.
        visual_pictures, visual_marks: int32 [N], of candidates (`data.candidates`); otherwise None.
        scales: the example at each further scale (`visor_jax.data.scales`).
        whole: visual positions without packing and reduction.
    """

    id: str
    tasks: tuple[str, ...]
    tiles: np.ndarray
    visual_gather: np.ndarray
    visual_weights: np.ndarray
    visual_positions: np.ndarray
    text_tokens: np.ndarray
    text_positions: np.ndarray
    loss_mask: np.ndarray
    turn_index: np.ndarray
    length: int
    source: str = ""
    tile_positions: np.ndarray | None = None
    tile_segments: np.ndarray | None = None
    tile_means: np.ndarray | None = None
    tile_scales: np.ndarray | None = None
    visual_segments: np.ndarray | None = None
    text_segments: np.ndarray | None = None
    members: tuple[tuple[str, Content], ...] = ()
    text_turns: np.ndarray | None = None
    visual_pictures: np.ndarray | None = None
    visual_marks: np.ndarray | None = None
    scales: tuple[ScaleLayout, ...] = ()
    whole: int = 0

    @property
    def samples(self) -> tuple[tuple[str, Content], ...]:
        """Id and content of each sample, in the order of their segments."""
        size, scales = self.size, tuple(len(scale.visual_positions) for scale in self.scales)
        own = Content(self.source, size.tiles, size.visual, size.text, scales, self.whole)
        return self.members or ((self.id, own),)

    @property
    def size(self) -> RowShape:
        """The part of a row that the example fills."""
        return RowShape(len(self.tiles), len(self.visual_positions), len(self.text_tokens))


class Batch(NamedTuple):
    """Fixed-shape arrays, and the ids, tasks and contents of their rows.

    Attributes:
        arrays: tiles uint8 [G, n, S, S, 3], a pool of tiles for each B / G rows (G is B without packing), and what
            `visor_jax.data.tiles` adds to them, [G, n, P];
            visual_gather int32, visual_weights float32 [B, N, K], indices into the row's pool; visual_positions,
            visual_segments int32 [B, Nv]; where a reduction chooses Nv of N tokens visual_pictures, visual_marks int32
            [B, N] (`visor_jax.data.candidates`; 0: padding), elsewhere N = Nv;
            text_tokens, text_positions, text_segments, turn_index int32 [B, Nt]; loss_mask bool [B, Nt]. Batches of
            prompts also have routing_position, int32 [B]; with independent turns batches also have text_turns, int32
            [B, Nt]: 0 in what the turns of a segment share, else the turn from 1.
        ids: the samples' ids, row by row.
        tasks: the tasks of each row's turns, in the order of `turn_index`.
        contents: the samples of each row, in the order of their segments.
    """

    arrays: dict[str, np.ndarray]
    ids: list[str]
    tasks: list[list[str]]
    contents: list[list[Content]]


def encode_example(
    sample: Sample,
    tokenizer: ChatTokenizer,
    architecture: Architecture,
    *,
    system: str | None = None,
    targets: str = "answer",
    row_shape: RowShape | None = None,
    independent_turns: bool = False,
    all_scales: bool = False,
) -> Example:
    """Encodes a sample as a training example. Uses the sample's system text, or `system` if it has none.

    With `independent_turns` no turn sees another, and the answers are the targets (`turns.encode_turns`); with
    `all_scales` the example has the architecture's further scales.

    Raises:
        SkipSample: "image_count" or "empty_conversation" (as `chat.encode_conversation`), "late_picture" (as
            `turns.encode_turns`), "small_picture" (it does not fit its tile), "too_long" (it does not fit the row
            shape), "no_target" (no token is a target).
    """
    if independent_turns:
        encoded, turns = encode_turns(sample, tokenizer, system)
        turn_index = np.array(turns) - 1
    else:
        encode = _conversation(sample, tokenizer, system)
        encoded, turns = encode(targets=targets), None
        answers = encoded if targets == "answer" else encode(targets="answer")
        turn_index = turns_of_answers(answers.target_mask)
    example = encode_tokens(
        encoded.token_ids,
        sample.images,
        tokenizer.image_token_id,
        architecture,
        target_mask=encoded.target_mask,
        turn_index=turn_index,
        turns=turns,
        id=sample.id,
        tasks=tuple(turn.task for turn in sample.turns),
        row_shape=row_shape,
        source=sample.source,
        origin=sample.origin,
        scales=architecture.other_scales if all_scales else (),
    )
    if not example.loss_mask.any():
        raise SkipSample("no_target", "no token of this conversation is a target")
    return example


def _conversation(sample: Sample, tokenizer: ChatTokenizer, system: str | None) -> partial[chat.EncodedConversation]:
    return partial(
        chat.encode_conversation,
        tokenizer,
        sample.turns,
        system=sample.system or system,
        num_images=len(sample.images),
    )


def count_text(
    sample: Sample, tokenizer: ChatTokenizer, system: str | None = None, *, independent_turns: bool = False
) -> int:
    """Returns Nt, the number of text tokens of `encode_example`'s result; reads no pixel.

    Raises:
        SkipSample: "image_count", "empty_conversation" or "late_picture", as `encode_example`.
    """
    if independent_turns:
        encoded, _ = encode_turns(sample, tokenizer, system)
    else:
        encoded = _conversation(sample, tokenizer, system)()
    return sum(token != tokenizer.image_token_id for token in encoded.token_ids)


def encode_prompt(
    images: Sequence[np.ndarray],
    question: str,
    tokenizer: ChatTokenizer,
    architecture: Architecture,
    *,
    system: str | None = None,
    row_shape: RowShape | None = None,
    id: str = "",
    task: str = "",
    history: Sequence[tuple[str, str]] = (),
    origin: Origin | None = None,
) -> Example:
    """Encodes a question up to the assistant's header, for routing and generation; without targets.

    `history` holds earlier turns, (question, answer) each; the routing token follows the latest question. `origin`: see
    `Sample`.

    Raises:
        SkipSample: "image_count", "empty_conversation", "small_picture" or "too_long", as `encode_example`.
    """
    token_ids = chat.encode_prompt(tokenizer, question, len(images), system, history)
    return encode_tokens(
        token_ids,
        images,
        tokenizer.image_token_id,
        architecture,
        id=id,
        tasks=(task,),
        row_shape=row_shape,
        origin=origin,
    )


def encode_tokens(
    token_ids: Sequence[int],
    images: Sequence[np.ndarray],
    image_token_id: int,
    architecture: Architecture,
    *,
    target_mask: Sequence[bool] | np.ndarray | None = None,
    turn_index: Sequence[int] | np.ndarray | None = None,
    turns: Sequence[int] | np.ndarray | None = None,
    id: str = "",
    tasks: tuple[str, ...] = (),
    row_shape: RowShape | None = None,
    source: str = "",
    origin: Origin | None = None,
    scales: Sequence[Architecture] = (),
) -> Example:
    """Makes an example of token ids and of pictures (uint8 [H, W, 3]) or videos (uint8 [F, H, W, 3]).

    `token_ids` holds one placeholder id per picture or video. The size is checked against `row_shape` before any pixel
    is read. The first token, and a token right after a picture, are never targets: no text token precedes them that
    could predict them. With `origin` the one picture keeps its size in its tile (`visor_jax.data.tiles`). `turns` of
    independent turns are 0 in what they share, which comes first, then 1, 2, ...; position ids of each turn continue
    behind what they share, and its first token is no target. `scales`: other architectures to lay it out for.

    Raises:
        SkipSample: "image_count", "small_picture" or "too_long".
        RequestError: there is an origin, and the architecture has no small pictures.
    """
    if origin is not None and not architecture.anyres.small_pictures:
        raise RequestError(
            f"data.small_pictures=False: sample {id!r} of source {source!r} holds a picture that keeps its size in a"
            " tile; expected True, or a source without such pictures"
        )
    tokens = np.asarray(token_ids, np.int32)
    is_image = tokens == image_token_id
    if is_image.sum() != len(images):
        raise SkipSample("image_count", f"{is_image.sum()} picture placeholders, {len(images)} pictures")
    sizes = [image.shape[:-1] for image in images]
    layout = layout_of(sizes, architecture, origin)
    whole = layout if architecture.whole is architecture else layout_of(sizes, architecture.whole, origin)
    check_fits(id, RowShape(layout.num_tiles, sum(layout.lengths), int((~is_image).sum())), row_shape)

    text_turns = None if turns is None else np.asarray(turns, np.int32)
    visual_positions, text_positions, length = interleaved_positions(is_image, layout.lengths, text_turns)
    others = []
    for scale in scales:
        other = layout_of(sizes, scale, origin)
        others.append(
            ScaleLayout(other.gather, other.weights, *interleaved_positions(is_image, other.lengths, text_turns)[:2])
        )

    arrays = make_tiles(images, architecture, origin)
    targets = np.zeros(len(tokens), bool) if target_mask is None else np.array(target_mask, bool)
    targets[:1] = False
    targets[1:] &= ~is_image[:-1]
    if text_turns is not None:
        targets[1:] &= text_turns[1:] == text_turns[:-1]
    turn_index = np.full(len(tokens), -1) if turn_index is None else np.asarray(turn_index)
    return Example(
        id=id,
        tasks=tasks,
        tiles=arrays["tiles"],
        visual_gather=layout.gather,
        visual_weights=layout.weights,
        visual_positions=visual_positions,
        text_tokens=tokens[~is_image],
        text_positions=text_positions,
        loss_mask=targets[~is_image],
        turn_index=np.where(targets, turn_index, -1)[~is_image].astype(np.int32),
        length=length,
        source=source,
        text_turns=None if text_turns is None else text_turns[~is_image],
        visual_pictures=layout.pictures,
        visual_marks=layout.marks,
        scales=tuple(others),
        whole=sum(whole.lengths),
    )._replace(**arrays)


def check_fits(id: str, size: RowShape, row_shape: RowShape | None) -> None:
    """Raises `SkipSample` "too_long" if `size` exceeds the row shape."""
    if row_shape is not None and not row_shape.holds(size):
        raise SkipSample("too_long", f"{id}: {size}; there is room for {row_shape}")


def make_batch(
    rows: Sequence[Sequence[Example]],
    row_shape: RowShape,
    architecture: Architecture,
    rows_per_pool: int = 1,
    min_taps: int = 0,
    *,
    independent_turns: bool = False,
    all_scales: bool = False,
) -> Batch:
    """Makes a batch of the given row shape from rows of examples; a row's samples become its segments 1, 2, ...

    `rows_per_pool` neighboring rows share one pool of `row_shape.tiles` tiles. The K of `visual_gather` is that of the
    pictures, more where a video needs it, and at least `min_taps`. The rest says how the examples are encoded.

    Raises:
        ValueError: a row or a pool holds more than the row shape allows, the rows do not divide into pools, or an
            example is encoded otherwise than `independent_turns` says.
    """
    if len(rows) % rows_per_pool:
        raise ValueError(f"{len(rows)} rows do not divide into pools of {rows_per_pool}")
    # Video frames may need more taps than `anyres.taps`, which counts pictures only.
    widest = (example.visual_gather.shape[1] for examples in rows for example in examples)
    most_taps = max(taps_of_pictures(architecture), *widest, min_taps)
    num_pools = len(rows) // rows_per_pool
    scales = shapes_at_scales(row_shape.visual, architecture, rows, videos=min_taps > 0) if all_scales else []
    shapes = batch_shapes(
        len(rows), num_pools, row_shape, most_taps, architecture, independent_turns=independent_turns, scales=scales
    )
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    arrays["turn_index"].fill(-1)
    tiles_used = 0
    for row, examples in enumerate(rows):
        pool, place = divmod(row, rows_per_pool)
        used, turns, segments, candidates = RowShape(tiles_used if place else 0, 0, 0), 0, 0, 0
        for example in examples:
            if (example.text_turns is not None) != independent_turns:
                raise ValueError(f"row {row}: independent_turns={independent_turns}, and {example.id} is otherwise")
            if not row_shape.holds(used + example.size):
                raise ValueError(f"row {row} ({used + example.size}) does not fit the row shape ({row_shape})")
            before = Before(pool, segments, used, turns, candidates)
            _place(arrays, architecture, example, row, before)
            used, turns = used + example.size, turns + len(example.tasks)
            segments, candidates = segments + len(example.samples), candidates + len(example.visual_gather)
        tiles_used = used.tiles
    return Batch(
        arrays=arrays,
        ids=[id for examples in rows for example in examples for id, _ in example.samples],
        tasks=[[task for example in examples for task in example.tasks] for examples in rows],
        contents=[[content for example in examples for _, content in example.samples] for examples in rows],
    )


class Before(NamedTuple):
    """What precedes an example in its row: its samples (`segments`), `turns` and `candidates`, and what is `used`."""

    pool: int
    segments: int
    used: RowShape
    turns: int
    candidates: int


def _place(
    arrays: dict[str, np.ndarray], architecture: Architecture, example: Example, row: int, before: Before
) -> None:
    """Writes an example into its row, after what is there, and its tiles into their pool."""
    pool, segments, used, turns, start = before
    num_tiles = arrays["tiles"].shape[1]
    patches = architecture.vision.patches_per_tile
    tiles = slice(used.tiles, used.tiles + example.size.tiles)
    visual = slice(used.visual, used.visual + example.size.visual)
    text = slice(used.text, used.text + example.size.text)
    candidates = slice(start, start + len(example.visual_gather))
    in_pool = partial(moved_gather, tiles=(example.size.tiles, used.tiles, num_tiles), patches=patches)
    gather = in_pool(example.visual_gather)
    for name in tile_shapes(0, architecture):
        arrays[name][pool, tiles] = getattr(example, name)
    for name in candidate_arrays(architecture):
        arrays[name][row, candidates] = moved(getattr(example, name), used.tiles)
    arrays["visual_gather"][row, candidates, : gather.shape[1]] = gather
    arrays["visual_weights"][row, candidates, : gather.shape[1]] = example.visual_weights
    arrays["visual_positions"][row, visual] = example.visual_positions
    arrays["visual_segments"][row, visual] = segments + _local(example.visual_segments)
    arrays["text_tokens"][row, text] = example.text_tokens
    arrays["text_positions"][row, text] = example.text_positions
    arrays["text_segments"][row, text] = segments + _local(example.text_segments)
    arrays["loss_mask"][row, text] = example.loss_mask
    arrays["turn_index"][row, text] = np.where(example.turn_index >= 0, example.turn_index + turns, -1)
    if example.text_turns is not None:
        arrays["text_turns"][row, text] = example.text_turns
    for number, scale in enumerate(example.scales):
        place_at_scale(arrays, number, scale._replace(visual_gather=in_pool(scale.visual_gather)), row, text)


def _local(segments: np.ndarray | None) -> np.ndarray | int:
    """Returns the segments within an example: those of a sheet, 1 of a sample."""
    return 1 if segments is None else segments


def make_prompt_batch(prompts: Sequence[Example], row_shape: RowShape, architecture: Architecture) -> Batch:
    """Makes a batch with one prompt per row and adds `routing_position`.

    `routing_position` int32 [B] is the position id of the routing token (or of the first generated token): the last
    prompt position + 1.
    """
    batch = make_batch([[prompt] for prompt in prompts], row_shape, architecture)
    batch.arrays["routing_position"] = np.array([prompt.length for prompt in prompts], np.int32)
    return batch
