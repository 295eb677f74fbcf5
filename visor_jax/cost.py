"""The cost of a budget by formula: FLOPs of decoder, vision tower and reduction, bytes of the cache. No JAX import.

The functions take an `Architecture`, the bits of a budget and numbers of tokens and tiles. FLOPs of one sample count:

* matrix products (projections, MLPs, attention, logits) and the conditional position, 2 FLOPs per multiply-add. Norms,
  activations, rotary embedding, softmax and the gather of visual tokens are a few per mille and not counted;
* causal attention at half of queries x keys; cross-attention and the tower's attention in full;
* every layer over all its tokens, although nothing reads the last layer's visual outputs;
* the logits of `num_logits` tokens, by default one.
"""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.architecture import Architecture, TextArchitecture
from visor_jax.budget import Bits, LayerKind, Plan


def decoder_flops(
    architecture: Architecture,
    bits: Sequence[bool],
    num_visual: int,
    num_text: int,
    plan: Plan | None = None,
    *,
    num_logits: int = 1,
    causal_half: bool = True,
) -> float:
    """Returns FLOPs of the decoder's forward pass over one sample's visual and text tokens.

    Args:
      bits: one per slot of the plan; empty for a dense plan.
      plan: None means the architecture's.
      num_logits: tokens whose logits are computed; 1 for a prompt, `num_text` in training.
      causal_half: False counts causal attention over all queries x keys, for implementations that skip no blocks.
    """
    text, dropping = architecture.text, architecture.dropping
    causal = 0.5 if causal_half else 1.0
    total = 2.0 * num_logits * text.hidden_size * text.vocab_size + dropping_flops(architecture, num_visual, num_text)
    for layer, kind in enumerate((plan or Plan.of(architecture)).under(bits)):
        tokens = num_text + (dropping.visual_in(layer, num_visual) if kind is LayerKind.SELF else 0)
        pairs = causal * tokens**2
        if kind is LayerKind.SELF and architecture.bidirectional_vision:
            pairs += (1 - causal) * (tokens - num_text) ** 2
        total += tokens * _layer_flops_per_token(text) + _attention_flops(text, pairs)
        if kind is LayerKind.CROSS:
            total += _cross_read_flops(architecture, num_visual, num_text)
            total += _cross_keys_flops(architecture, num_visual) + conditional_position_flops(architecture, num_visual)
    return total


def tree_flops(architecture: Architecture, budgets: Sequence[Bits], num_visual: int, num_text: int) -> float:
    """Returns FLOPs of the decoder for one sample under many budgets that share layers, with one token's logits each.

    This is what `visor_jax.evaluate.prefixes.score_tree` runs.
    """
    kinds = Plan(tuple(tree_layers(architecture, budgets)))
    return decoder_flops(architecture, (), num_visual, num_text, kinds, num_logits=len(set(budgets)))


def tree_layers(architecture: Architecture, budgets: Sequence[Bits]) -> list[LayerKind]:
    """Returns the layers that run for one sample under budgets that share layers up to the first block that differs."""
    plan, size, first = Plan.of(architecture), architecture.slots_per_block, architecture.shared_layers.stop
    kinds = list(plan.kinds[:first])
    for begin in beginnings(budgets, size):
        block = len(begin) // size - 1
        start = architecture.num_head_layers + block * len(architecture.pattern)
        rest = (False,) * (len(plan.slots) - len(begin))
        kinds += plan.under((*begin, *rest))[max(start, first) : start + len(architecture.pattern)]
    tail = plan.kinds[architecture.text.num_layers - architecture.num_tail_layers :]
    return kinds + len(set(budgets)) * list(tail)


def beginnings(budgets: Sequence[Bits], slots_per_block: int) -> set[Bits]:
    """Returns the distinct beginnings of budgets that end with a block: as many blocks run if budgets share them."""
    return {bits[:end] for bits in budgets for end in range(slots_per_block, len(bits) + 1, slots_per_block)}


def dense_decoder_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """Returns `decoder_flops` of the dense plan of the same shape, the reference of every saving.

    Args:
      num_visual: all visual tokens, without packing and reduction.
    """
    plan = Plan.dense(architecture.text.num_layers)
    return decoder_flops(architecture.without_dropping, (), num_visual, num_text, plan)


def dropping_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """Returns FLOPs of choosing the visual tokens that later layers of a dense plan read.

    Each drop projects queries and keys once more; the queries of the text, with "fastv" and score "paper" of all
    tokens, and their products with all keys. "sparsevlm" compares the embeddings of text and visual tokens, and those
    that it clusters with each other.
    """
    text, dropping, total = architecture.text, architecture.dropping, 0.0
    everyone = dropping.method == "fastv" and dropping.score == "paper"
    if dropping.method == "sparsevlm":
        total += 2.0 * num_text * num_visual * text.hidden_size
    for drop, layer in enumerate(dropping.layers):
        tokens = num_text + dropping.visual_in(layer - 1, num_visual)
        queries = tokens if everyone else num_text
        heads = queries * text.num_heads + tokens * text.num_kv_heads
        total += 2.0 * text.hidden_size * heads * text.head_dim
        total += 2.0 * queries * tokens * text.num_heads * text.head_dim
        counts = dropping.counts(drop, num_visual)
        total += 2.0 * counts.best * (counts.best + counts.clusters) * text.hidden_size
    return total


def decode_flops(architecture: Architecture, bits: Sequence[bool], num_visual: int, num_text: int) -> float:
    """Returns FLOPs of one decoding step with a cache, including logits; `num_text` includes the new token."""
    text = architecture.text
    total = 2.0 * text.hidden_size * text.vocab_size
    for layer, kind in enumerate(Plan.of(architecture).under(bits)):
        keys = num_text + (architecture.dropping.visual_in(layer, num_visual) if kind is LayerKind.SELF else 0)
        total += _layer_flops_per_token(text) + _attention_flops(text, keys)
        if kind is LayerKind.CROSS:
            total += _cross_read_flops(architecture, num_visual, 1)
    return total


def route_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """Returns FLOPs of the policy: the routing token through the layers before the first slot, and the MLP."""
    plan, text, policy = Plan.of(architecture), architecture.text, architecture.policy
    if not plan.slots:
        return 0.0
    total = 2.0 * policy.hidden_size * (text.hidden_size + policy.max_budgets)
    for kind in plan.kinds[: plan.slots[0]]:
        total += _layer_flops_per_token(text) + _attention_flops(text, num_text)
        if kind is LayerKind.CROSS:
            total += _cross_read_flops(architecture, num_visual, 1)
    return total


def tower_flops(architecture: Architecture, num_tiles: int) -> float:
    """Returns FLOPs of the vision tower and the connector over `num_tiles` tiles; independent of the budget."""
    vision = architecture.vision
    size, patches = vision.hidden_size, vision.patches_per_tile
    layer = 4.0 * size * vision.intermediate_size + 8.0 * size**2 + 4.0 * patches * size
    embedding = 2.0 * 3 * vision.patch_size**2 * size
    shuffled = architecture.anyres.shuffled  # of whole tiles; `visual_flops` knows how many positions there are
    tower = num_tiles * patches * (embedding + vision.num_layers * layer)
    return tower + num_tiles * patches / shuffled * _connector_flops_per_token(architecture)


def visual_flops(architecture: Architecture, num_tiles: int, num_visual: int) -> float:
    """Returns FLOPs from pixels to the visual tokens that the decoder reads: tower, connector and reduction.

    Args:
      num_visual: visual tokens after the reduction.
    """
    total = tower_flops(architecture, num_tiles) + reduction_flops(architecture, num_tiles, num_visual)
    if architecture.reduction.method == "visionzip":  # merges before the connector
        merged = num_tiles * architecture.vision.patches_per_tile - num_visual
        total -= merged * _connector_flops_per_token(architecture)
    if (shuffled := architecture.anyres.shuffled) > 1:  # packs before the connector
        packed = num_tiles * architecture.vision.patches_per_tile / shuffled
        total += (num_visual - packed) * _connector_flops_per_token(architecture)
    return total


def reduction_flops(architecture: Architecture, num_tiles: float, num_visual: float) -> float:
    """Returns FLOPs of choosing the `num_visual` visual tokens that remain of a picture.

    Matrix products only, as elsewhere: similarities of tokens, and what the tower's attention weights take once more.
    Sorting and averaging neighbors count nothing.
    """
    vision, reduction = architecture.vision, architecture.reduction
    patches, size = vision.patches_per_tile, vision.hidden_size
    pairs = 2.0 * patches**2 * size  # products of all pairs of a tile's patches
    if reduction.method == "divprune":  # each token's nearest other one, then each chosen one and all tokens
        tokens = num_visual / float(reduction.fraction)
        return 2.0 * architecture.text.hidden_size * tokens * (tokens + num_visual)
    return (
        num_tiles
        * {
            "none": 0.0,
            "m3": 0.0,
            "vispruner": 2 * pairs,  # attention weights, similarities
            "visionzip": pairs + 2.0 * patches * reduction.contextual(reduction.kept(patches)) * vision.head_dim,
            "hired": 2 * pairs
            + 4.0 * patches * size**2,  # attention weights of two layers, the first one's projections
        }[reduction.method]
    )


def _connector_flops_per_token(architecture: Architecture) -> float:
    return 2.0 * (architecture.connector_input + architecture.text.hidden_size) * architecture.text.hidden_size


def conditional_position_flops(architecture: Architecture, num_visual: int) -> float:
    """Returns FLOPs of the depthwise convolution over the visual sequence in one cross-attention layer."""
    return 2.0 * architecture.cross.kernel_size * architecture.text.hidden_size * num_visual


def _layer_flops_per_token(text: TextArchitecture) -> float:
    """Returns FLOPs of all projections of one Qwen2 layer: q, k, v, o, gate, up and down."""
    heads = 2 * text.num_heads * text.head_dim + 2 * text.num_kv_heads * text.head_dim
    return 2.0 * text.hidden_size * (heads + 3 * text.intermediate_size)


def _attention_flops(text: TextArchitecture, pairs: float) -> float:
    """Returns FLOPs of logits and weighted sum over `pairs` of a query and a key."""
    return 4.0 * pairs * text.num_heads * text.head_dim


def _cross_read_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """Returns FLOPs of cross-attention's text side: q and o projections, and attention over every visual key."""
    text = architecture.text
    projections = 4.0 * num_text * text.hidden_size * text.num_heads * text.head_dim
    return projections + _attention_flops(text, num_text * num_visual)


def _cross_keys_flops(architecture: Architecture, num_visual: int) -> float:
    """Returns FLOPs of cross-attention's visual side: k and v projections."""
    text = architecture.text
    return 4.0 * num_visual * text.hidden_size * architecture.cross.num_kv_heads * text.head_dim


# --- cache ------------------------------------------------------------------------------------------------------------


def cache_bytes(
    architecture: Architecture,
    bits: Sequence[bool],
    num_visual: int,
    num_text: int,
    bytes_per_value: int,
    plan: Plan | None = None,
) -> int:
    """Returns bytes of one sample's cached keys and values: text in every layer, visual in cross and self layers.

    Args:
      plan: None means the architecture's.
    """
    text = architecture.text
    kinds = (plan or Plan.of(architecture)).under(bits)
    heads = num_text * text.num_kv_heads * len(kinds)
    layers = [layer for layer, kind in enumerate(kinds) if kind is LayerKind.SELF]
    heads += sum(architecture.dropping.visual_in(layer, num_visual) for layer in layers) * text.num_kv_heads
    heads += num_visual * architecture.cross.num_kv_heads * kinds.count(LayerKind.CROSS)
    return 2 * heads * text.head_dim * bytes_per_value


def dense_cache_bytes(architecture: Architecture, num_visual: int, num_text: int, bytes_per_value: int) -> int:
    """Returns `cache_bytes` of the dense plan of the same shape; arguments as of `dense_decoder_flops`."""
    plan = Plan.dense(architecture.text.num_layers)
    return cache_bytes(architecture.without_dropping, (), num_visual, num_text, bytes_per_value, plan)
