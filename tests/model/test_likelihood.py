"""The likelihood of an answer: only its targets weigh, and where its prompt ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from visor_jax import testing
from visor_jax.model.likelihood import answer_tokens, prompt_end
from visor_jax.model.visor import encode


def test_prompt_end_is_where_the_first_target_stands() -> None:
    batch = {
        "loss_mask": jnp.array([[False, False, True, True], [False] * 4]),
        "text_positions": jnp.array([[0, 1, 40, 41], [0, 0, 0, 0]]),
    }
    assert prompt_end(batch).tolist() == [40, np.iinfo(np.int32).max]


def test_only_targets_weigh_and_none_is_predicted_from_another_sample() -> None:
    arch = testing.tiny_architecture(num_layers=6)
    batch, params = testing.random_batch(arch), testing.random_params(arch)
    budget = jnp.ones(arch.num_slots, bool)

    def run(params, arrays):
        return answer_tokens(params, encode(params, arrays, arch), arrays, budget, arch)

    program = testing.quick_jit(run)
    losses, _, weights = program(params, batch.arrays)
    mask, segments = batch.arrays["loss_mask"], batch.arrays["text_segments"]
    assert np.array_equal(np.asarray(weights) > 0, mask[:, 1:] & (segments[:, 1:] == segments[:, :-1]))
    assert float(weights.sum()) == 8, "two targets of each of the four examples"
    everything = {**batch.arrays, "loss_mask": np.ones_like(mask)}
    _, _, weights = program(params, everything)
    assert not np.asarray(weights)[segments[:, 1:] != segments[:, :-1]].any(), "the first token of a packed sample"
    changed = {**batch.arrays, "text_tokens": np.where(segments == 2, 5, batch.arrays["text_tokens"])}
    other, _, _ = program(params, changed)
    first = segments[:, 1:] == 1
    np.testing.assert_array_equal(np.asarray(losses)[first], np.asarray(other)[first])
    assert jax.tree.leaves(losses)[0].dtype == np.float32
