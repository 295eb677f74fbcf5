"""Visibility, tested by gradients: an output depends on an input exactly where the definition allows it.

The expected dependencies are computed from positions and segments only, as boolean matrices over [V; T], and compared
entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import Architecture
from visor_jax.model.decoder import forward, run_layers

ROWS = (((2, 3), (1, 1, 2)), ((1, 1),))  # a picture amid text; beside it, in one row, a conversation with two pictures
ON, OFF = True, False


# --- actual: by gradients ---------------------------------------------------------------------------------------------


def influence(arch: Architecture, layers: range | None = None) -> Callable[..., np.ndarray]:
    """Of a budget: boolean [Nv + Nt, Nv + Nt], whether output token i of row 0 has a gradient by input token j.

    With `layers`, only these run, one after the other; else all, in the scan.
    """
    batch = testing.random_batch(arch, ROWS)
    visual, text, stream = testing.decoder_inputs(arch, batch)
    params, count = testing.random_params(arch), visual.shape[1]
    direction = np.random.default_rng(5).standard_normal(visual.shape[2], np.float32)

    def outputs(both, bits):
        if layers is None:
            out = forward(params, both[:, :count], both[:, count:], stream, bits, arch)
        else:
            on = [ON] * arch.num_slots
            out = run_layers(params, both[:, :count], both[:, count:], stream, on, arch, layers=layers)
        return jnp.concatenate(out, axis=1)[0] @ direction

    jacobian = testing.quick_jit(jax.jacrev(outputs))  # [i, B, j, D]
    both = np.concatenate([visual, text], axis=1)
    return lambda bits=(): np.any(np.asarray(jacobian(both, np.array(bits, bool)))[:, 0] != 0, axis=-1)


# --- expected: by definition ------------------------------------------------------------------------------------------


class Expected:
    """What each kind of layer lets through in row 0; `itself` is the residual connection."""

    def __init__(self, arch: Architecture):
        arrays = testing.random_batch(arch, ROWS).arrays
        self.positions, segments = (
            np.concatenate([arrays[f"visual_{name}"][0], arrays[f"text_{name}"][0]])
            for name in ("positions", "segments")
        )
        visual = np.arange(len(segments)) < arrays["visual_segments"].shape[1]
        self.from_visual, self.from_text = np.broadcast_arrays(visual[None, :], ~visual[None, :])
        self.by_visual, self.by_text = np.broadcast_arrays(visual[:, None], ~visual[:, None])
        self.itself = np.eye(len(segments), dtype=bool)
        self.same = (segments[:, None] == segments[None, :]) & (segments > 0)
        self.earlier = self.positions[None, :] <= self.positions[:, None]

    @property
    def text(self) -> np.ndarray:
        return self.itself | (self.same & self.earlier & self.by_text & self.from_text)

    @property
    def cross(self) -> np.ndarray:
        """Text reads all of V of its own segment, also what comes later; then the layer over the text alone."""
        return then(self.itself | (self.same & self.by_text & self.from_visual), self.text)

    @property
    def joint(self) -> np.ndarray:
        return self.itself | (self.same & self.earlier)

    @property
    def joint_both_ways(self) -> np.ndarray:
        """As `joint`, and visual tokens see their whole picture: those with no text of their segment in between."""
        between = np.zeros_like(self.itself)
        for k in np.flatnonzero(self.by_text[:, 0]):
            before, after = self.positions < self.positions[k], self.positions > self.positions[k]
            between |= self.same[k] & (np.outer(before, after) | np.outer(after, before))
        return self.joint | (self.same & self.by_visual & self.from_visual & ~between)


def then(first: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """What passes through one layer after the other."""
    for step in rest:
        first = (step.astype(int) @ first.astype(int)) > 0
    return first


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kind"), [(0, "text"), (1, "cross"), (2, "joint")])
def test_each_kind_of_layer(layer: int, kind: str) -> None:
    arch = testing.tiny_architecture(3)
    expected = Expected(arch)
    np.testing.assert_array_equal(influence(arch, range(layer, layer + 1))(), getattr(expected, kind))


def test_the_expectation_itself() -> None:
    """The matrices above, in words, at one segment's picture (positions 2 to 15), text before (0, 1) and after."""
    see = Expected(testing.tiny_architecture(3))
    first_text = (
        len(see.itself) - testing.random_batch(testing.tiny_architecture(3), ROWS).arrays["text_tokens"].shape[1]
    )
    before, after, inside = first_text, first_text + 2, 5
    assert not see.joint[before, inside] and see.joint[after, inside] and see.joint[inside, before]
    assert not see.joint[inside, after] and not see.joint[inside, inside + 1] and see.joint[inside + 1, inside]
    assert see.cross[before, inside] and see.cross[after, inside] and not see.cross[inside, before]
    assert see.joint_both_ways[inside, inside + 1] and not see.joint_both_ways[inside, after]
    assert not see.joint[after, -1] and see.itself[-1].sum() == see.joint[-1].sum() == 1  # padding


def test_two_super_blocks_and_a_layer_more() -> None:
    """A cross-attention layer reads the V that the last slot before it left: here text reaches text through V."""
    arch = testing.tiny_architecture(7)
    found, see = influence(arch), Expected(arch)
    front = then(see.text, see.cross)
    for bits in ((OFF, OFF), (ON, OFF), (OFF, ON), (ON, ON)):
        first, second = (see.joint if on else see.text for on in bits)
        expected = then(front, first, see.text, see.cross, second, see.text)
        np.testing.assert_array_equal(found(bits), expected, err_msg=str(bits))


def test_visual_tokens_see_both_ways_where_asked() -> None:
    arch = testing.tiny_architecture(3, bidirectional_vision=True)
    found, see = influence(arch), Expected(arch)
    np.testing.assert_array_equal(found([ON]), then(see.text, see.cross, see.joint_both_ways))
    np.testing.assert_array_equal(found([OFF]), then(see.text, see.cross, see.text))


def test_the_dense_plan_is_causal_everywhere() -> None:
    arch = testing.tiny_architecture(4, plan="dense")
    np.testing.assert_array_equal(influence(arch)(), Expected(arch).joint)


def test_without_slots_the_picture_reaches_the_text_through_cross_attention_only() -> None:
    arch = testing.tiny_architecture(3)
    visual, text, stream = testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    params: dict[str, Any] = testing.random_params(arch)

    def reaches(visual, gate, on):
        cross = {**params["blocks"]["cross_attention"], "gate": gate}
        changed = {**params, "blocks": {**params["blocks"], "cross_attention": cross}}
        return jnp.sum(jnp.sin(forward(changed, visual, text, stream, on, arch)[1]))

    gradient = testing.quick_jit(jax.grad(reaches))
    closed, opened = np.zeros(1, np.float32), np.ones(1, np.float32)
    seen = stream.visual_segments > 0
    assert not np.any(np.asarray(gradient(visual, closed, np.array([OFF]))))
    for gate, on in ((opened, OFF), (closed, ON), (opened, ON)):
        by_slot = np.any(np.asarray(gradient(visual, gate, np.array([on]))) != 0, axis=-1)
        assert not by_slot[~seen].any(), "padding reaches nothing"
        assert by_slot[seen].all() if gate[0] else by_slot.any()
