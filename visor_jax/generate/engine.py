"""The compiled programs of generation, and the loop that runs them.

In: prompts (`Example`s) of one model. Out: for a batch of them, step by step, one token per row. A prompt goes
through three phases: shared prefill (`prefill_shared`: the vision tower and the layers that all budgets share, one
prompt at a time), budget choice (by the caller), and decoding (`tokens`: the remaining layers and the new tokens, in
batches of one budget). No phase repeats the work of an earlier one.

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
      window: the bucket that `prefix` has the shapes of, one row.
      length: its text tokens.
      scores: the policy's, [1, M]; None where they were not asked for.
    """

    prefix: Prefix
    stream: Arrays
    row_shape: RowShape
    length: int
    scores: Float[Array, "1 M"] | None


class Engine:
    """The programs of one model; each is compiled when it is first needed and kept.

    Attributes:
      programs: where they are kept, and how long compiling took.
    """

    def __init__(self, params: Params, arch: Architecture, num_viable: int, forbidden: int):
        self.arch, self.programs = arch, Programs(compiling.options(params))
        self._held, self._num_viable, self._forbidden = params, num_viable, forbidden

    @property
    def params(self) -> Params:
        """The model's parameters, stacked; they are held once, and unstacked from the first
        prompt on.
        """
        return stack_layers(self._held)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._held))

    @property
    def dtype(self) -> np.dtype:
        return self._held["embed_tokens"]["embedding"].dtype

    @property
    def bytes_per_value(self) -> int:
        return self.dtype.itemsize

    def _unstacked(self) -> Params:
        with self.programs.preparing():
            self._held = jax.block_until_ready(unstack_layers(self._held))
        return self._held

    # --- one prompt ---------------------------------------------------------------------------------------------------

    def prefill_shared(self, prompt: Example, *, routed: bool) -> PrefillState:
        """Encode the pictures and run the layers that every budget shares."""
        row_shape = row_bucket(prompt.size)
        arrays = make_prompt_batch([prompt], row_shape, self.arch).arrays
        visual = self.programs.run("encode", partial(encode, arch=self.arch), self._unstacked(), arrays)
        function = partial(caches.prefill_prefix, num_viable=self._num_viable, arch=self.arch, routed=routed)
        without_tiles = {name: arrays[name] for name in (*STREAM, "text_tokens")}
        prefix, scores = self.programs.run(("prefix", routed), function, self._held, visual, without_tiles)
        stream = {name: arrays[name] for name in STREAM}
        return PrefillState(prefix, stream, row_shape, prompt.size.text, scores)

    def pick(self, state: PrefillState, costs: Sequence[float], dial: float) -> int:
        """Index of the budget that the policy and the dial give a prompt; `costs` are those of the viable budgets."""
        held = np.float32(np.clip(dial, -1e38, 1e38))  # what float32 holds
        choice = self.programs.run("choose", choose, state.scores, np.array(costs, np.float32), held)
        return int(np.asarray(choice)[0])  # indexing on the device would compile

    def logits(self, prompt: Example, bits: Bits) -> Float[np.ndarray, "Nt V"]:
        """Next-token logits at every text token; one program serves all budgets."""
        arrays = make_prompt_batch([prompt], row_bucket(prompt.size), self.arch).arrays
        function = partial(all_logits, arch=self.arch)
        found = self.programs.run("logits", function, self._held, arrays, np.array(bits, bool))
        return np.asarray(found)[0, : prompt.size.text]

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
        held, one_more = max(row.length for row in rows), None
        for step in range(max_new_tokens):
            if step:
                if held == caches.capacity(cache, bits, self.arch):
                    larger = partial(caches.grow_cache, bits=bits, arch=self.arch)
                    cache, one_more = self.programs.run(("doubled", bits), larger, cache), None
                args = self._held, token, cache, draw, np.int32(step)
                # One program until the cache grows: to look it up takes longer than a step of a small model.
                one_more = one_more or self.programs.ready(("step", bits), function, *args, donate_argnums=2)
                token, cache = one_more(*args)
                held += 1
            chosen = np.asarray(token)[: len(rows)].tolist()
            yield [None if over else new for over, new in zip(ended, chosen, strict=True)]
            ended |= np.isin(chosen, list(stops))
            if ended.all():
                return

    def _prefill(self, rows: Sequence[PrefillState], bits: Bits, draw: Draw | None) -> tuple[Int[Array, " B"], Cache]:
        """The first token of every row, and the cache; rows of other sizes are padded to a common one first."""
        row_shape = joined([row.row_shape for row in rows])
        sizes = row_shape.visual, row_shape.text
        pad = partial(in_row_shape, sizes=sizes)
        wide = [self.programs.run(("padded", sizes), pad, (row.prefix, row.stream)) for row in rows]
        wide += [wide[0]] * (batch_bucket(len(rows)) - len(rows))
        function = partial(prefill, bits=bits, arch=self.arch, forbidden=self._forbidden)
        return self.programs.run(("rest", bits), function, self._held, wide, draw)


# --- what is compiled -------------------------------------------------------------------------------------------------


def all_logits(params: Params, arrays: Arrays, bits: Array, *, arch: Architecture) -> Array:
    """Logits at every text token; a scan goes over stacked layers, however they are held."""
    return logits(stack_layers(params), arrays, bits, arch)


def in_row_shape(row: tuple[Prefix, Arrays], sizes: tuple[int, int]) -> tuple[Prefix, Arrays]:
    """One prompt's prefix and stream with the second axis of every array padded to (visual, text) slots."""
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
    """Rows of one shape as a batch, through the layers after the prefix: first tokens and the cache."""
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
    """One decoding step: the next token of every row, and the cache that holds it."""
    scores, cache = caches.decode_step(params, token, cache, bits, arch)
    return select(scores, draw, step, forbidden), cache
