"""The whole model: encode -> route -> decode -> logits.

`init_params` gives the nested dict of arrays that training, checkpoints and exports share; every other function here is
a pure function of it. `Batch` arrays are those of `visor_jax.data.collate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from visor_jax.architecture import Architecture
from visor_jax.kernels.mesh import by_rows, by_rows_from_table
from visor_jax.kernels.precision import widened
from visor_jax.model.connector import Connector, connector, shuffled, stitch
from visor_jax.model.decoder import Blocks, Budget, forward, run_layers
from visor_jax.model.decoders.qwen2 import Qwen2Layer
from visor_jax.model.dropping.api import run_dropping
from visor_jax.model.encoders.siglip import VisionTower, tower
from visor_jax.model.initializers import start_cross_attention
from visor_jax.model.layers import Embedding, Linear, Params, RMSNorm, rms_norm, stacked
from visor_jax.model.policy import Routing, policy_logits
from visor_jax.model.reduction.api import reduced_tokens
from visor_jax.model.remat import Remat
from visor_jax.model.stream import TokenStream

Batch = Mapping[str, Any]  # the arrays of visor_jax.data.collate.Batch, NumPy's or JAX's


class Visor(nnx.Module):
    """Every parameter of the model, under the names that checkpoints and exports keep."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        text = arch.text
        self.vision = VisionTower(arch.vision, rngs=rngs)
        self.connector = Connector(arch.connector_input, text.hidden_size, rngs=rngs)
        self.image_newline = nnx.Param(
            jax.random.normal(rngs.params(), (text.hidden_size,), jnp.float32) * text.hidden_size**-0.5
        )
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size, std=text.embedding_init, rngs=rngs)
        if arch.num_head_layers:
            self.head = stacked(lambda r: Qwen2Layer(text, rngs=r), arch.num_head_layers, rngs)
        if arch.num_blocks:
            self.blocks = Blocks(arch, rngs=rngs)
        if arch.num_tail_layers:
            self.tail = stacked(lambda r: Qwen2Layer(text, rngs=r), arch.num_tail_layers, rngs)
        self.norm = RMSNorm(text.hidden_size)
        if not text.tie_word_embeddings:
            self.lm_head = Linear(text.hidden_size, text.vocab_size, rngs=rngs)
        if arch.plan == "visor":
            self.routing = Routing(arch, rngs=rngs)


def init_params(arch: Architecture, key: PRNGKeyArray) -> Params:
    """Random parameters; `cross.init` sets how cross-attention starts (`visor_jax.model.initializers`)."""
    weights = jax.random.split(key)[0]  # the first of two, as in versions that drew from both
    params = nnx.to_pure_dict(nnx.state(Visor(arch, rngs=nnx.Rngs(params=weights))))
    return start_cross_attention(params, arch) if arch.plan == "visor" else params


def abstract_params(arch: Architecture) -> Params:
    """Shapes and dtypes of `init_params`, without computing anything."""
    return jax.eval_shape(partial(init_params, arch), jax.random.key(0))


def encode(params: Params, batch: Batch, arch: Architecture, *, remat: Remat = "none") -> Float[Array, "B Nv D"]:
    """Visual tokens V(0) of the batch's pictures: tower, connector, stitching, and the reduction if there is one.

    `remat`: what the backward pass recomputes of the tower's layers (`visor_jax.model.remat`).
    """
    if arch.reduction.selects:
        return by_rows(reduced_tokens(params, batch, arch, remat=remat))
    if arch.anyres.shuffled > 1:
        patches = tower(params["vision"], batch, arch.vision, arch.anyres, remat=remat)
        gather, weights = (jnp.asarray(batch[name]) for name in ("visual_gather", "visual_weights"))
        return by_rows(shuffled(params, patches, gather, weights, arch.anyres.packing))
    return stitched(params, patch_tokens(params, batch, arch, remat=remat), batch)


def patch_tokens(params: Params, batch: Batch, arch: Architecture, *, remat: Remat = "none") -> Float[Array, "G n P D"]:
    """The tokens of all patches of the batch's tiles: tower and connector."""
    patches = tower(params["vision"], batch, arch.vision, arch.anyres, remat=remat)
    return connector(params["connector"], patches)


def stitched(params: Params, patches: Float[Array, "G n P D"], batch: Batch) -> Float[Array, "B Nv D"]:
    """V(0) of a model whose reduction does not choose tokens, from the tokens of all patches."""
    return by_rows(stitch(patches, params["image_newline"], batch["visual_gather"], batch["visual_weights"]))


def embed(params: Params, tokens: Int[Array, "B Nt"]) -> Float[Array, "B Nt D"]:
    return by_rows_from_table(params["embed_tokens"]["embedding"][tokens])


def stream_of(batch: Batch) -> TokenStream:
    """Positions, segments and independent turns of a batch, every token seen under its own segment."""
    names = ("visual_positions", "visual_segments", "text_positions", "text_segments", "text_segments")
    return TokenStream(
        *(batch[name] for name in names), text_turns=batch.get("text_turns"), targets=batch.get("loss_mask")
    )


def hidden_states(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Batch,
    budget: Budget,
    arch: Architecture,
    *,
    remat: Remat = "none",
) -> Float[Array, "B Nt D"]:
    """Final hidden states of the text tokens, for visual tokens `visual` [B, Nv, D] and a run-time budget."""
    text = embed(params, batch["text_tokens"])
    if arch.dropping.active:
        _, text, _ = run_dropping(params, visual, text, stream_of(batch), arch, remat=remat)
    else:
        _, text = forward(params, visual, text, stream_of(batch), budget, arch, remat=remat)
    return rms_norm(params["norm"], text, arch.text.rms_norm_eps)


def head(params: Params) -> Float[Array, "D V"]:
    """The output head, which may be the transposed embedding table."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"].T


def logits(params: Params, batch: Batch, budget: Budget, arch: Architecture) -> Float[Array, "B Nt V"]:
    """Next-token logits at every text token, float32 or wider."""
    hidden = hidden_states(params, encode(params, batch, arch), batch, budget, arch)
    return widened(hidden @ head(params))


def with_routing_tokens(
    params: Params, text: Float[Array, "B Nt D"], stream: TokenStream, positions: Int[Array, "B R"]
) -> tuple[Float[Array, "B Nt_routed D"], TokenStream]:
    """The text with a routing token for each of up to R samples per row appended, Nt_routed = Nt + R.

    Token r belongs to segment r + 1 and stands at `positions[:, r]`, the position id right after that sample's prompt;
    where a row has fewer samples it is padding. As a key it carries segment 0, so that no token sees it.

    Raises:
      ValueError: the stream has independent turns; a routing token reads one question.
    """
    if stream.text_turns is not None:
        raise ValueError("stream.text_turns: a routing token reads one question per sample, not independent turns")
    batch, samples = positions.shape
    token = jnp.broadcast_to(params["routing"]["token"], (batch, samples, text.shape[2])).astype(text.dtype)
    segments = jnp.broadcast_to(jnp.arange(1, samples + 1, dtype=stream.text_segments.dtype), (batch, samples))
    segments = jnp.where(segments <= jnp.max(stream.text_segments, axis=1, keepdims=True), segments, 0)
    stream = stream._replace(
        text_positions=jnp.concatenate([stream.text_positions, positions], axis=1),
        text_segments=jnp.concatenate([stream.text_segments, segments], axis=1),
        text_key_segments=jnp.concatenate([stream.text_key_segments, jnp.zeros_like(segments)], axis=1),
        targets=None,
    )
    return jnp.concatenate([text, token], axis=1), stream


def routing_hidden(
    params: Params, visual: Float[Array, "B Nv D"], batch: Batch, arch: Architecture
) -> Float[Array, "B *samples D"]:
    """The routing tokens' hidden states at the entry of the first optional self-attention layer.

    The batch's `routing_position` are the position ids right after the prompts: [B] with one sample per row, or [B, R]
    with up to R samples per row, in the order of their segments. Tokens at or past them (answers) are hidden from them.
    """
    stream, positions = stream_of(batch), batch["routing_position"]
    per_row = positions.reshape(len(positions), -1)  # [B, R]
    prompt_ends = jnp.take_along_axis(per_row, jnp.maximum(stream.text_segments - 1, 0), axis=1)  # of each token
    prompt = stream.text_positions < prompt_ends
    stream = stream._replace(text_key_segments=jnp.where(prompt, stream.text_segments, 0))
    text, stream = with_routing_tokens(params, embed(params, batch["text_tokens"]), stream, per_row)
    hidden = before_first_slot(params, visual, text, stream, arch)[:, -per_row.shape[1] :]
    return hidden.reshape(*positions.shape, hidden.shape[-1])


def shared_text(
    params: Params, visual: Float[Array, "B Nv D"], batch: Batch, arch: Architecture
) -> Float[Array, "B Nt D"]:
    """T at the entry of the first optional layer."""
    return before_first_slot(params, visual, embed(params, batch["text_tokens"]), stream_of(batch), arch)


def before_first_slot(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    arch: Architecture,
) -> Float[Array, "B Nt D"]:
    """T at the entry of the first optional self-attention layer, which is the same for every budget."""
    off = (False,) * arch.num_slots
    return run_layers(params, visual, text, stream, off, arch, layers=arch.shared_layers)[1]


def route(
    params: Params, visual: Float[Array, "B Nv D"], batch: Batch, num_viable: int, arch: Architecture
) -> Float[Array, "B *samples M"]:
    """The policy's scores over budgets, minus infinity past the viable ones; of each sample, as `routing_hidden`."""
    hidden = routing_hidden(params, visual, batch, arch)
    return policy_logits(params["routing"], hidden, num_viable, arch.text.rms_norm_eps)
