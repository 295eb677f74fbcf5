"""Who may read whom, shown by gradients: an output depends on an input exactly where METHOD.md section 3 lets it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import Architecture
from visor_jax.model.decoder import decode, run_layers
from visor_jax.testing import random_batch

ROWS = (((2, 3), (1, 1, 2)),)  # a picture in the middle of text; beside it two pictures in one conversation


def influence(run: Any, visual: Any, text: Any) -> np.ndarray:
    """Boolean [Nv + Nt, Nv + Nt]: whether output token i has any gradient by input token j, V before T, of row 0."""

    def outputs(x):
        out = run(x[:, : visual.shape[1]], x[:, visual.shape[1] :])
        return jnp.concatenate(out, axis=1)[0] @ np.random.default_rng(5).standard_normal(x.shape[2], np.float32)

    jacobian = jax.jacrev(outputs)(jnp.concatenate([visual, text], axis=1))  # [i, B, j, D]
    return np.asarray(jnp.any(jacobian[:, 0] != 0, axis=-1))


class Expected:
    """What each kind of layer lets through, boolean [Nv + Nt, Nv + Nt], from positions and segments alone."""

    def __init__(self, arrays: dict[str, np.ndarray], *, bidirectional: bool):
        self.positions = np.concatenate([arrays["visual_positions"][0], arrays["text_positions"][0]])
        segments = np.concatenate([arrays["visual_segments"][0], arrays["text_segments"][0]])
        self.count = arrays["visual_positions"].shape[1]
        self.is_visual = np.arange(len(segments)) < self.count
        self.same = (segments[:, None] == segments[None, :]) & (segments > 0)
        self.causal = self.positions[None, :] <= self.positions[:, None]
        if bidirectional:
            self.causal |= self._same_picture()

    def _same_picture(self) -> np.ndarray:
        """Two visual tokens belong to one picture iff no text token of their segment stands between them."""
        between = np.zeros((len(self.positions),) * 2, bool)
        for k in np.flatnonzero(~self.is_visual):
            before, after = self.positions < self.positions[k], self.positions > self.positions[k]
            between |= self.same[k] & (before[:, None] & after[None, :] | after[:, None] & before[None, :])
        return np.outer(self.is_visual, self.is_visual) & ~between

    @property
    def itself(self) -> np.ndarray:
        return np.eye(len(self.positions), dtype=bool)

    @property
    def text(self) -> np.ndarray:
        return self.itself | (self.same & self.causal & ~self.is_visual[:, None] & ~self.is_visual[None, :])

    @property
    def cross(self) -> np.ndarray:
        """All of V of its own segment, before and after; then the layer over the text."""
        read = self.itself | (self.same & ~self.is_visual[:, None] & self.is_visual[None, :])
        return then(read, self.text)

    @property
    def joint(self) -> np.ndarray:
        return self.itself | (self.same & self.causal)


def then(first: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """What passes through one layer after the other."""
    for step in rest:
        first = (step.astype(int) @ first.astype(int)) > 0
    return first


def check(arch: Architecture, bits: tuple[bool, ...] | np.ndarray, expected: Any, layers: range | None = None) -> None:
    batch = random_batch(arch, ROWS)
    visual, text, stream = testing.decoder_inputs(arch, batch)
    params = testing.random_params(arch)
    sees = Expected(batch.arrays, bidirectional=arch.bidirectional_vision)

    def run(v, t):
        if layers is None:
            return decode(params, v, t, stream, bits, arch)
        return run_layers(params, v, t, stream, list(bits), arch, layers=layers)

    found = testing.quick_jit(lambda v, t: influence_of(run, v, t))(visual, text)
    np.testing.assert_array_equal(np.asarray(found), expected(sees))


def influence_of(run: Any, visual: jax.Array, text: jax.Array) -> jax.Array:
    """Boolean [Nv + Nt, Nv + Nt]: whether output token i of row 0 has any gradient by input token j, V before T."""

    def outputs(x):
        out = jnp.concatenate(run(x[:, : visual.shape[1]], x[:, visual.shape[1] :]), axis=1)
        return out[0] @ np.random.default_rng(5).standard_normal(x.shape[2], np.float32)

    jacobian = jax.jacrev(outputs)(jnp.concatenate([visual, text], axis=1))  # [i, B, j, D]
    return jnp.any(jacobian[:, 0] != 0, axis=-1)
