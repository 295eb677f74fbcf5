"""Bytes of one chip by formula, for topologies that are not compiled for and for the search over settings.

The compiler's own figure replaces it wherever a step is compiled; `SLACK` covers what a formula does not see. No JAX
import.
"""

from __future__ import annotations

from visor_jax.config import Config, architecture, stage_config
from visor_jax.planning.layers import LayerShape
from visor_jax.planning.workload import Workload, decoder_shape, mesh_of, tower_shape
from visor_jax.scale.topologies import Topology

SLACK = 1.0  # of what is not kept for the backward pass: buffers that overlap in time, and fragmentation


def kept_per_position(shape: LayerShape, remat: str) -> int:
    """Returns bytes that the forward pass of one layer keeps for its backward pass, per position."""
    block = 2 * shape.hidden
    if remat == "offload":
        return 0
    if remat == "full":
        return block
    if remat == "attention":
        return block + 2 * shape.query_width
    if remat == "mlp":
        return 2 * block + 2 * shape.query_width + 2 * (2 if shape.gated else 1) * shape.mlp
    products = 2 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + (2 if shape.gated else 1) * shape.mlp
    if remat == "products":
        return 2 * products
    # Everything: also what norms and activations computed, partly in float32.
    return 2 * (2 * products + 4 * shape.hidden + 2 * shape.mlp)


def chip_bytes(config: Config, stage: str, topology: Topology, work: Workload) -> dict[str, float]:
    """Returns bytes of weights, optimizer, batch, and activations with temporaries, on one chip."""
    arch, settings, mesh = architecture(config, stage), stage_config(config, stage), mesh_of(config, topology)
    remat, cores, parts = settings.remat, topology.chip.cores, settings.accumulate
    split, share = mesh.fsdp * mesh.tensor / cores, cores / mesh.row_ways
    total, packed = sum(work.weights.values()), work.packed
    side = arch.vision.tile_size
    batch = share * (packed.tiles * 3 * side**2 + packed.visual * 40 + packed.text * 17)
    share /= parts
    visual, text = packed.visual * share, packed.text * share
    trains_tower = settings.objective == "answer" and work.trained > 0.9 * total
    patches = packed.tiles * share * arch.vision.patches_per_tile
    tower, decoder = tower_shape(arch), decoder_shape(arch)
    kept = 0.0
    if settings.objective == "answer":
        joint = sum(place.kind == "self" for place in arch.layers) if arch.plan == "visor" else arch.text.num_layers
        kept += kept_per_position(decoder, remat) * (visual + text) * joint
        kept += kept_per_position(decoder, remat) * text * (arch.text.num_layers - joint)
    if trains_tower:
        kept += kept_per_position(tower, settings.tower_remat or remat) * patches * arch.vision.num_layers
    widest = kept_per_position(decoder, "products") * (visual + text) if settings.objective == "answer" else 0.0
    widest = max(widest, kept_per_position(tower, "products") * patches * (1 if trains_tower else 0.5))
    gathered = 2 * max(sum(decoder.products.values()), arch.text.vocab_size * arch.text.hidden_size) / mesh.tensor
    gradients = (4 if parts == 1 else 8) * work.trained / split  # the sum so far, and a part's
    table = work.weights.get("lm_head", work.weights["embed_tokens"]) / mesh.tensor
    logits = 3 * 4 * table if work.trained > table else 0
    temporaries = kept / mesh.tensor + SLACK * (2 * widest / mesh.tensor + 2 * gathered + logits) + gradients
    return {
        "weights": 4 * (total + (work.trained if settings.ema_decay else 0)) / split,
        "optimizer": (8 if settings.moments_dtype == "float32" else 6) * work.trained / split,
        "batch": batch,
        "temporaries": temporaries + 2 * total / split,
    }
