"""The public testing package makes small, fully random and reproducible models and batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.model.visor import abstract_params
from visor_jax.tree import flatten

ARCH = testing.tiny_architecture(3)


def test_parameters_fit_the_model_and_none_is_at_a_special_value() -> None:
    actual, again, other = (flatten(testing.random_params(ARCH, seed)) for seed in (1, 1, 2))
    for path, shape in flatten(abstract_params(ARCH)).items():
        assert actual[path].shape == shape.shape and actual[path].dtype == np.float32
        np.testing.assert_array_equal(actual[path], again[path])
        assert not np.array_equal(actual[path], other[path])
        assert not np.isin(actual[path], (0.0, 1.0)).any(), path


def test_batches_are_packed_padded_and_reproducible() -> None:
    one, again, other = (testing.random_batch(ARCH, seed=seed) for seed in (0, 0, 1))
    for name, x in one.arrays.items():
        np.testing.assert_array_equal(x, again.arrays[name])
    assert not np.array_equal(one.arrays["text_tokens"], other.arrays["text_tokens"])
    for stream in ("visual", "text"):
        segments = one.arrays[f"{stream}_segments"]
        assert (segments[:, -1] == 0).all(), "every row ends in padding"
        assert segments.max() == 2, "two examples share a row"
    assert not one.arrays["visual_segments"][-1].any(), "a row with text only"
    assert one.arrays["loss_mask"].any(axis=1).all()
    assert testing.IMAGE_TOKEN not in one.arrays["text_tokens"]


def test_pictures_stand_in_the_middle_of_the_text() -> None:
    example = testing.random_example(ARCH, texts=(2, 3, 1))
    order = np.argsort(np.concatenate([example.visual_positions, example.text_positions]))
    is_text = (order >= len(example.visual_positions)).tolist()
    runs = [key for index, key in enumerate(is_text) if index == 0 or is_text[index - 1] != key]
    assert runs == [True, False, True, False, True]


def test_prompts_end_where_their_routing_token_stands() -> None:
    arrays = testing.random_prompts(ARCH).arrays
    assert not arrays["loss_mask"].any() and len(set((arrays["text_segments"] > 0).sum(axis=1).tolist())) > 1
    for row, position in enumerate(arrays["routing_position"]):
        last = arrays["text_positions"][row][arrays["text_segments"][row] > 0].max()
        assert position == last + 1


def test_decoder_inputs_have_the_shapes_of_the_batch() -> None:
    batch = testing.random_batch(ARCH)
    visual, text, stream = testing.decoder_inputs(ARCH, batch)
    assert visual.shape == (*stream.visual_segments.shape, ARCH.text.hidden_size)
    assert text.shape == (*stream.text_segments.shape, ARCH.text.hidden_size)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="color"):
        testing.tiny_architecture(3, color="red")


def test_the_quick_compiler_computes_the_same() -> None:
    x = np.random.default_rng(0).standard_normal((8, 16), np.float32)

    def function(x):
        return jax.nn.softmax(jnp.tanh(x @ x.T) * 3) @ x

    np.testing.assert_allclose(testing.quick_jit(function)(x), jax.jit(function)(x), atol=1e-5)


def test_the_tokenizer_reads_back_what_it_wrote() -> None:
    tokenizer = testing.almanac_tokenizer()
    assert tokenizer is testing.almanac_tokenizer()
    text = "Which digit is below A?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
