"""Examples and batches: positions in the dense sequence, targets, packing, padding, prompts."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import (
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    ReductionArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.data import chat, collate
from visor_jax.data.collate import Example, RowShape, encode_example, encode_prompt, encode_tokens, make_batch
from visor_jax.data.packing import PoolShape, fill_pool
from visor_jax.data.sample import Sample, SkipSample, Turn
from visor_jax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("almanac")
PLAIN = Architecture(  # every picture is one tile of four patches
    text=TextArchitecture(16, 8, 8, 3, 1, 1, 8),
    vision=VisionArchitecture(8, 4, 8, 8, 1, 1),
    cross=CrossAttentionArchitecture(1),
    policy=PolicyArchitecture(8),
)
TILED = dataclasses.replace(
    PLAIN, anyres=AnyResArchitecture(tuple((8 * r, 8 * c) for r in (1, 2, 3) for c in (1, 2, 3)), max_tiles=2)
)
ROOM = RowShape(tiles=12, visual=80, text=200)
IMAGE = 999  # a placeholder id


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def conversation(*turns: tuple[str, str], images: tuple[np.ndarray, ...] = ()) -> Sample:
    return Sample("id", images, tuple(Turn(q, a, f"task{i}") for i, (q, a) in enumerate(turns)), "test")


def dense(example: Example) -> list[int]:
    """Returns the interleaved sequence of the positions: token ids, and -1 for visual positions."""
    sequence = np.full(example.length, -2)
    sequence[example.visual_positions] = -1
    sequence[example.text_positions] = example.text_tokens
    assert len(example.visual_positions) + len(example.text_positions) == example.length
    return sequence.tolist()


def test_positions_count_the_interleaved_sequence() -> None:
    images = [picture(8, 8), picture(3, 30)]
    example = encode_tokens([1, IMAGE, 2, 3, IMAGE, 4], images, IMAGE, PLAIN)
    assert dense(example) == [1, -1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1, -1, 4]
    assert example.visual_positions.tolist() == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
    assert example.visual_gather[:, 0].tolist() == [0, 1, 2, 3, 8, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(example.tiles[0], images[0])


def test_text_without_pictures() -> None:
    example = encode_tokens([5, 6, 7], [], IMAGE, TILED)
    assert dense(example) == [5, 6, 7] and example.size == RowShape(0, 0, 3)
    batch = make_batch([[example]], RowShape(1, 4, 5), TILED)
    assert not batch.arrays["visual_segments"].any() and batch.arrays["visual_weights"].shape == (1, 4, 4)


def test_pictures_and_placeholders_must_match() -> None:
    for tokens in ([1, 2], [1, IMAGE, IMAGE]):
        with pytest.raises(SkipSample) as caught:
            encode_tokens(tokens, [picture(8, 8)], IMAGE, PLAIN)
        assert caught.value.reason == "image_count"


def test_what_no_text_token_precedes_is_no_target() -> None:
    example = encode_tokens([1, 2, IMAGE, 3, 4], [picture(8, 8)], IMAGE, PLAIN, target_mask=[True] * 5)
    assert example.text_tokens.tolist() == [1, 2, 3, 4]
    assert example.loss_mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize("targets", ["answer", "llava"])
def test_targets_and_turns_of_a_conversation(targets: str) -> None:
    sample = conversation(("Which digit?", "It is 7"), ("Sure?", "yes"), images=(picture(8, 8),))
    example = encode_example(sample, TOKENIZER, PLAIN, targets=targets, system="Be brief.")
    encoded = chat.encode_conversation(TOKENIZER, sample.turns, system="Be brief.", targets=targets)
    tokens = np.array([i for i in encoded.token_ids if i != TOKENIZER.image_token_id])
    np.testing.assert_array_equal(example.text_tokens, tokens)
    for turn, answer in enumerate(["It is 7", "yes"]):
        answer_tokens = example.text_tokens[example.turn_index == turn].tolist()
        assert answer_tokens == [*TOKENIZER.encode(answer), TOKENIZER.end_token_id]
    assert example.loss_mask[example.turn_index >= 0].all()
    if targets == "answer":
        assert example.loss_mask.sum() == (example.turn_index >= 0).sum() == sum(encoded.target_mask)
    else:
        assert example.loss_mask.sum() > (example.turn_index >= 0).sum()
    assert example.tasks == ("task0", "task1")


def test_too_long_is_refused_before_any_pixel_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = conversation(("Which digit?", "7"), images=(picture(24, 24),))
    size = encode_example(sample, TOKENIZER, TILED).size
    assert size.tiles == 10 and encode_example(sample, TOKENIZER, TILED, row_shape=size).size == size
    monkeypatch.setattr(collate, "make_tiles", lambda *_: pytest.fail("cut"))
    for field in ("tiles", "visual", "text"):
        small = dataclasses.replace(size, **{field: getattr(size, field) - 1})
        with pytest.raises(SkipSample) as caught:
            encode_example(sample, TOKENIZER, TILED, row_shape=small)
        assert caught.value.reason == "too_long" and str(size) in caught.value.detail


def test_a_conversation_that_teaches_nothing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = chat.EncodedConversation([1, 2], [False, False])
    monkeypatch.setattr(collate.chat, "encode_conversation", lambda *_, **__: silent)
    with pytest.raises(SkipSample, match="no_target"):
        encode_example(conversation(("Hi", "Ho")), TOKENIZER, PLAIN)


def test_a_prompt_is_the_conversation_up_to_its_first_answer() -> None:
    images = (picture(8, 8),)
    prompt = encode_prompt(images, "Which digit?", TOKENIZER, PLAIN, id="p", task="digit")
    whole = encode_example(conversation(("Which digit?", "7"), images=images), TOKENIZER, PLAIN)
    count = len(prompt.text_tokens)
    np.testing.assert_array_equal(prompt.text_tokens, whole.text_tokens[:count])
    assert whole.loss_mask[count] and not whole.loss_mask[:count].any() and not prompt.loss_mask.any()

    longer = encode_prompt(images, "Which digit is it?", TOKENIZER, PLAIN)
    batch = collate.make_prompt_batch([prompt, longer], ROOM, PLAIN)
    assert batch.arrays["routing_position"].tolist() == [whole.text_positions[count], longer.length]
    assert batch.arrays["routing_position"][0] == prompt.text_positions[-1] + 1
    assert (batch.ids, batch.tasks) == (["p", ""], [["digit"], [""]])


def features(batch_row: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the feature of each visual position: the mean of its patch's pixels, -1 for newlines."""
    tiles = batch_row["tiles"].astype(np.float64)
    patches = tiles.reshape(len(tiles), 2, 4, 2, 4, 3).mean(axis=(2, 4, 5)).reshape(-1)
    table = np.append(patches, -1.0)
    return (table[batch_row["visual_gather"]] * batch_row["visual_weights"]).sum(axis=-1)


def row_of(arrays: dict[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    return {name: array[row] for name, array in arrays.items()}


@st.composite
def some_examples(draw: st.DrawFn) -> list[Example]:
    """Up to six samples with zero to two pictures and one or two turns."""
    examples = []
    for number in range(draw(st.integers(1, 6))):
        sizes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=2))
        images = tuple(picture(*size, seed=number) for size in sizes)
        turns = [("<image>" * len(images) + "Which digit?", "7"), ("Sure?", "yes, 8")][: draw(st.integers(1, 2))]
        sample = dataclasses.replace(conversation(*turns, images=images), id=str(number))
        examples.append(encode_example(sample, TOKENIZER, TILED))
    return examples


@hypothesis.given(some_examples(), st.integers(1, 3), st.integers(1, 2))
@hypothesis.settings(max_examples=40, deadline=None)
def test_packing_keeps_every_example_whole(examples: list[Example], num_pools: int, rows_per_pool: int) -> None:
    rows: list[list[Example]] = []
    waiting = list(examples)
    for _ in range(num_pools):
        chosen = fill_pool([e.size for e in waiting], PoolShape(rows_per_pool, ROOM.tiles, ROOM.visual, ROOM.text))
        rows += [[waiting[index] for index in row] for row in chosen]
        taken = {index for row in chosen for index in row}
        waiting = [e for index, e in enumerate(waiting) if index not in taken]
    assert sorted(e.id for e in [*itertools.chain(*rows), *waiting]) == [e.id for e in examples]
    batch = make_batch(rows, ROOM, TILED, rows_per_pool)
    assert batch.arrays["tiles"].shape[:2] == (num_pools, ROOM.tiles)
    batch.arrays["tiles"] = np.repeat(
        batch.arrays["tiles"], rows_per_pool, axis=0
    )  # each row gets the tiles of its pool
    assert batch.ids == [e.id for row in rows for e in row]
    for number, row in enumerate(rows):
        arrays = row_of(batch.arrays, number)
        slots, turns = features(arrays), 0
        assert set(arrays["text_segments"]) <= set(range(len(row) + 1))
        for segment, example in enumerate(row, start=1):
            alone = row_of(make_batch([[example]], ROOM, TILED).arrays, 0)
            visual, text = arrays["visual_segments"] == segment, arrays["text_segments"] == segment
            alone_visual, alone_text = alone["visual_segments"] == 1, alone["text_segments"] == 1
            np.testing.assert_allclose(slots[visual], features(alone)[alone_visual], atol=1e-9)
            np.testing.assert_array_equal(arrays["visual_positions"][visual], example.visual_positions)
            for name in ("text_tokens", "text_positions", "loss_mask"):
                np.testing.assert_array_equal(arrays[name][text], getattr(example, name))
                np.testing.assert_array_equal(alone[name][alone_text], getattr(example, name))
            wanted = np.where(example.turn_index >= 0, example.turn_index + turns, -1)
            np.testing.assert_array_equal(arrays["turn_index"][text], wanted)
            turns += len(example.tasks)
        assert len(batch.tasks[number]) == turns == sum(len(e.tasks) for e in row)
        padding = arrays["text_segments"] == 0
        assert not arrays["loss_mask"][padding].any() and (arrays["turn_index"][padding] == -1).all()
        assert not arrays["visual_weights"][arrays["visual_segments"] == 0].any()


@pytest.mark.parametrize("changes", [{"packing": 2}, {"packing": 4}, {"method": "m3"}, {"method": "vispruner"}])
def test_positions_without_packing_and_reduction_are_counted(changes: dict) -> None:
    pictures = [np.zeros((40, 30, 3), np.uint8), np.zeros((9, 50, 3), np.uint8)]
    for images in (pictures[:1], pictures, []):
        tokens = [1, *[IMAGE] * len(images), 2]
        plain = encode_tokens(tokens, images, IMAGE, TILED)
        if "packing" in changes:
            arch = dataclasses.replace(TILED, anyres=dataclasses.replace(TILED.anyres, **changes))
        else:
            arch = dataclasses.replace(TILED, reduction=ReductionArchitecture(**changes, ratio=0.25))
        fewer = encode_tokens(tokens, images, IMAGE, arch)
        assert plain.whole == fewer.whole == plain.size.visual and (not images or fewer.size.visual < plain.size.visual)


def test_batch_shapes_and_types() -> None:
    example = encode_tokens([1, IMAGE, 2], [picture(30, 30)], IMAGE, TILED)
    arrays = make_batch([[example], []], ROOM, TILED).arrays
    shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    assert shapes == {
        "tiles": ((2, 12, 8, 8, 3), "uint8"),
        "visual_gather": ((2, 80, 4), "int32"),
        "visual_weights": ((2, 80, 4), "float32"),
        "visual_positions": ((2, 80), "int32"),
        "visual_segments": ((2, 80), "int32"),
        "text_tokens": ((2, 200), "int32"),
        "text_positions": ((2, 200), "int32"),
        "text_segments": ((2, 200), "int32"),
        "loss_mask": ((2, 200), "bool"),
        "turn_index": ((2, 200), "int32"),
    }
    assert arrays["visual_gather"].max() == 12 * 4  # the newline follows the patches of all tiles of the row
    plain = encode_tokens([1, IMAGE, 2], [picture(30, 30)], IMAGE, PLAIN)
    assert make_batch([[plain]], ROOM, PLAIN).arrays["visual_gather"].shape == (1, 80, 1)


def test_a_row_that_overflows_is_refused() -> None:
    example = encode_tokens([1, 2, 3], [], IMAGE, PLAIN)
    with pytest.raises(ValueError, match="does not fit"):
        make_batch([[example, example]], RowShape(1, 5, 5), PLAIN)
    tiled = encode_tokens([1, IMAGE, 2], [picture(30, 30)], IMAGE, TILED)
    room = RowShape(tiled.size.tiles + 1, 80, 5)
    assert make_batch([[tiled], []], room, TILED, 2).arrays["tiles"].shape[:2] == (1, room.tiles)
    with pytest.raises(ValueError, match=r"row 1 .* does not fit"):
        make_batch([[tiled], [tiled]], room, TILED, 2)
    with pytest.raises(ValueError, match="3 rows do not divide into pools of 2"):
        make_batch([[tiled], [], []], room, TILED, 2)


def test_the_generated_data_fits_its_default_row_shape() -> None:
    architecture = dataclasses.replace(PLAIN, vision=VisionArchitecture(96, 12, 8, 8, 1, 1))
    source = testing.almanac_source()
    for index in range(20):
        example = encode_example(source[index], TOKENIZER, architecture, row_shape=RowShape(1, 72, 128))
        assert example.size.visual == 65 and set(example.turn_index) == set(range(-1, len(example.tasks)))
