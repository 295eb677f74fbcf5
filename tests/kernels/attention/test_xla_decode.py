"""A decoding step reads only those chunks of a sample's cache that hold a visible key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.kernels.attention import AttentionMask, xla_decode

LENGTH, CHUNK = 30, 8


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The first key of each chunk that is read while it runs."""
    monkeypatch.setattr(xla_decode, "CHUNK", CHUNK)
    attend_chunk, found = xla_decode.attend_chunk, []

    def recorded(q, keys, values, allowed):
        jax.debug.callback(lambda keys: found.append(keys[0, 0].astype(int).tolist()), keys)
        return attend_chunk(q, keys, values, allowed)

    monkeypatch.setattr(xla_decode, "attend_chunk", recorded)
    return found


@pytest.mark.parametrize(
    ("held", "active", "chunks"),
    [
        ((30, 3, 17), None, [(0, 0), (0, 8), (0, 16), (0, 22), (1, 0), (2, 0), (2, 8), (2, 16)]),
        ((30, 3, 17), (False, True, True), [(1, 0), (2, 0), (2, 8), (2, 16)]),
        ((0, 0, 8), None, [(2, 0)]),
        ((0, 0, 0), None, []),
    ],
)
def test_visits_what_each_sample_holds(visited, held, active, chunks):
    batch, positions = len(held), jnp.tile(jnp.arange(LENGTH), (len(held), 1))
    segments = (positions < jnp.array(held)[:, None]).astype(jnp.int32)
    ones = jnp.ones((batch, 1), jnp.int32)
    flags = None if active is None else jnp.array(active)
    mask = AttentionMask(ones * LENGTH, positions, ones, segments, flags)
    names = jnp.stack(jnp.broadcast_arrays(jnp.arange(batch)[:, None], positions), axis=-1)  # sample, key
    k = names[:, :, None].astype(jnp.float32)
    out = jax.jit(lambda q, k: xla_decode.attention(q, k, k, mask=mask))(jnp.ones((batch, 1, 2, 2)), k)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert sorted(map(tuple, visited)) == chunks
    seen = np.any(np.asarray(mask.as_array()), axis=1)
    by_chunk = np.pad(seen, ((0, 0), (0, -LENGTH % CHUNK))).reshape(batch, -1, CHUNK)
    assert len(visited) == by_chunk.any(axis=2).sum()
