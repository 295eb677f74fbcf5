"""The compiled programs of generation, and the loop that runs them.

A prompt goes through three phases: shared prefill (`prefill_shared`: the vision tower and the layers that all budgets
share, one prompt at a time), budget choice (by the caller), and decoding (`tokens`: the remaining layers and the new
tokens, in batches of one budget, one token per row and step). No phase repeats the work of an earlier one.

Every program is compiled for buckets of shapes (`visor_jax.generate.buckets`); temperature, top-p, seed and step are
its arguments, so that other values compile nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from visor_jax.architecture import Architecture, LayerKind
from visor_jax.budget import Bits
from visor_jax.data.collate import Example, RowShape, make_prompt_batch
from visor_jax.generate.buckets import batch_bucket, cache_bucket, joined, row_bucket
from visor_jax.generate.programs import Programs
from visor_jax.generate.sampling import Draw, Sampling, select
from visor_jax.model import incremental as caches
from visor_jax.model.decoder import stack_layers, unstack_layers
from visor_jax.model.incremental import Cache, Prefix
from visor_jax.model.layers import Params
from visor_jax.model.policy import choose
from visor_jax.model.visor import encode, logits
from visor_jax.scale import compiler_options as compiling

Arrays = Mapping[str, Any]
STREAM = ("visual_positions", "visual_segments", "text_positions", "text_segments", "routing_position")


@dataclass(frozen=True)
class PrefillState:
    """A prompt after the vision tower and the decoder layers before the first optional one.

    Attributes:
      row_shape: the bucket of `prefix`, one row.
      length: number of text tokens.
      scores: the policy's, [1, M]; None if the policy did not run.
    """

    prefix: Prefix
    stream: Arrays
    row_shape: RowShape
    length: int
    scores: Float[Array, "1 M"] | None


class Engine:
    """The programs of one model; each is compiled when it is first needed.

    Attributes:
      programs: the compiled programs, and the time spent compiling.
    """

    def __init__(self, params: Params, arch: Architecture, num_viable: int, forbidden: int):
        self.arch, self.programs = arch, Programs(compiling.options(params))
        self._params, self._num_viable, self._forbidden = params, num_viable, forbidden

    @property
    def params(self) -> Params:
        """Returns the parameters, stacked; the engine stores them once, unstacked from the first prompt on."""
        return stack_layers(self._params)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._params))

    @property
    def dtype(self) -> np.dtype:
        return self._params["embed_tokens"]["embedding"].dtype

    @property
    def bytes_per_value(self) -> int:
        return self.dtype.itemsize

    def _unstacked(self) -> Params:
        with self.programs.preparing():
            self._params = jax.block_until_ready(unstack_layers(self._params))
        return self._params

    # --- one prompt ---------------------------------------------------------------------------------------------------

    def prefill_shared(self, prompt: Example, *, routed: bool) -> PrefillState:
        """Encodes the pictures and runs the layers that every budget shares."""
        row_shape = row_bucket(prompt.size)
        arrays = make_prompt_batch([prompt], row_shape, self.arch).arrays
        visual = self.programs.run("encode", partial(encode, arch=self.arch), self._unstacked(), arrays)
        function = partial(caches.prefill_prefix, num_viable=self._num_viable, arch=self.arch, routed=routed)
        without_tiles = {name: arrays[name] for name in (*STREAM, "text_tokens")}
        prefix, scores = self.programs.run(("prefix", routed), function, self._params, visual, without_tiles)
        stream = {name: arrays[name] for name in STREAM}
        return PrefillState(prefix, stream, row_shape, prompt.size.text, scores)

    def pick(self, state: PrefillState, costs: Sequence[float], dial: float) -> int:
        """Returns the index of the policy's budget for a prompt; `costs` and the index are of the viable budgets."""
        clipped = np.float32(np.clip(dial, -1e38, 1e38))  # the range of float32
        choice = self.programs.run("choose", choose, state.scores, np.array(costs, np.float32), clipped)
        return int(np.asarray(choice)[0])  # indexing on the device would compile a program

    def logits(self, prompt: Example, bits: Bits) -> Float[np.ndarray, "Nt V"]:
        """Returns next-token logits at every text token; one program serves all budgets."""
        arrays = make_prompt_batch([prompt], row_bucket(prompt.size), self.arch).arrays
        function = partial(all_logits, arch=self.arch)
        values = self.programs.run("logits", function, self._params, arrays, np.array(bits, bool))
        return np.asarray(values)[0, : prompt.size.text]

    # --- a batch ------------------------------------------------------------------------------------------------------

    def tokens(
        self,
        rows: Sequence[PrefillState],
        bits: Bits,
        sampling: Sampling,
        stops: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[list[int | None]]:
        """Yields each step's tokens, one per row, stop tokens included; None for a row that has ended."""
        draw, ended = sampling.draw(), np.zeros(len(rows), bool)
        token, cache = self._prefill(rows, bits, draw)
        function = partial(decode, bits=bits, arch=self.arch, forbidden=self._forbidden)
        length, decode_step = max(row.length for row in rows), None
        for step in range(max_new_tokens):
            if step:
                if length == caches.capacity(cache, bits, self.arch):
                    grow = partial(caches.grow_cache, bits=bits, arch=self.arch)
                    cache, decode_step = self.programs.run(("grow", bits), grow, cache), None
                args = self._params, token, cache, draw, np.int32(step)
                # Keep the program until the cache grows: looking it up takes longer than a step of a small model.
                decode_step = decode_step or self.programs.ready(("step", bits), function, *args, donate_argnums=2)
                token, cache = decode_step(*args)
                length += 1
            chosen = np.asarray(token)[: len(rows)].tolist()
            yield [None if over else new for over, new in zip(ended, chosen, strict=True)]
            ended |= np.isin(chosen, list(stops))
            if ended.all():
                return

    def _prefill(self, rows: Sequence[PrefillState], bits: Bits, draw: Draw | None) -> tuple[Int[Array, " B"], Cache]:
        """Returns the first token of every row, and the cache; pads the rows to a common size first."""
        row_shape = joined([row.row_shape for row in rows])
        sizes = row_shape.visual, row_shape.text
        pad = partial(in_row_shape, sizes=sizes)
        wide = [self.programs.run(("padded", sizes), pad, (row.prefix, row.stream)) for row in rows]
        wide += [wide[0]] * (batch_bucket(len(rows)) - len(rows))
        function = partial(prefill, bits=bits, arch=self.arch, forbidden=self._forbidden)
        return self.programs.run(("rest", bits), function, self._params, wide, draw)


# --- compiled functions -----------------------------------------------------------------------------------------------


def all_logits(params: Params, arrays: Arrays, bits: Array, *, arch: Architecture) -> Array:
    """Returns logits at every text token; stacks the layers first, because the forward pass scans over them."""
    return logits(stack_layers(params), arrays, bits, arch)


def in_row_shape(row: tuple[Prefix, Arrays], sizes: tuple[int, int]) -> tuple[Prefix, Arrays]:
    """Pads the second axis of every array of one prompt's prefix and stream to `sizes`, (visual, text) positions."""
    (visual, text, recorded), stream = row

    def to(size: int, x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))

    of_visual, of_text = partial(to, sizes[0]), partial(to, sizes[1])
    recorded = {
        kind: jax.tree.map(of_text if kind == LayerKind.TEXT else of_visual, layers)
        for kind, layers in recorded.items()
    }
    positions = {"routing_position": stream["routing_position"]}
    visuals = {name: of_visual(x) for name, x in stream.items() if name.startswith("visual_")}
    texts = {name: of_text(x) for name, x in stream.items() if name.startswith("text_")}
    return Prefix(of_visual(visual), of_text(text), recorded), {**positions, **visuals, **texts}


def prefill(
    params: Params,
    rows: Sequence[tuple[Prefix, Arrays]],
    draw: Draw | None,
    *,
    bits: Bits,
    arch: Architecture,
    forbidden: int,
) -> tuple[Int[Array, " B"], Cache]:
    """Runs a batch of rows through the layers after the prefix; returns first tokens and the cache."""
    prefix, stream = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
    capacity = cache_bucket(prefix.text.shape[1] + 1)
    scores, cache = caches.prefill_rest(params, prefix, stream, bits, capacity, arch)
    return select(scores, draw, 0, forbidden), cache


def decode(
    params: Params,
    token: Int[Array, " B"],
    cache: Cache,
    draw: Draw | None,
    step: Int[Array, ""],
    *,
    bits: Bits,
    arch: Architecture,
    forbidden: int,
) -> tuple[Int[Array, " B"], Cache]:
    """Runs one decoding step; returns the next token of every row, and the cache with the current one added."""
    scores, cache = caches.decode_step(params, token, cache, bits, arch)
    return select(scores, draw, step, forbidden), cache
