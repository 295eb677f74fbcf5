"""The operations and collectives of one step of a stage on one chip, by formula.

In: a configuration, a stage, a topology. Out: `Op`s and `Collective`s for `visor_jax.planning.roofline.estimate`. The
stage computes on every position of its batch; only those that hold tokens are useful. Which backward passes run follows
from the stage's trainable parameters. No JAX import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from visor_jax.architecture import Architecture, LayerKind
from visor_jax.config import Config, architecture, stage_config
from visor_jax.cost import reduction_flops
from visor_jax.planning.layers import WORD, LayerShape, Load, Remat, head_ops, layer_ops, optimizer_op
from visor_jax.planning.mixture import Packed, packed_at_scale, packed_step, with_visual_share
from visor_jax.planning.records import fsdp, tensor_parallel
from visor_jax.planning.roofline import ATTENTION, MATMUL, MEMORY, Collective, Op, padded
from visor_jax.scale.mesh_sizes import filled
from visor_jax.scale.topologies import Topology

BLOCK = 512  # tokens of a block of the attention kernel: blocks on the diagonal are computed in full
TILE_BLOCK = 128  # patches of a tile are padded to a multiple
REMAT: Mapping[str, Remat] = {
    "none": Remat(),
    "full": Remat(qkv=1, out=1, mlp=1, attention=1, memory=1),
    "attention": Remat(qkv=1, out=1, mlp=1, attention=0, memory=1),
    "mlp": Remat(qkv=1, mlp=1 / 3, memory=1),  # the last product: layers of a super-block need each other's
    "products": Remat(memory=1),
    "offload": Remat(qkv=1, out=1, mlp=1, attention=1, memory=1),
}
# A layer of the tower is checkpointed on its own: its last product is not needed. "mlp" keeps its residual sums, which
# are a fourth of what norms, activations and residuals move.
TOWER_REMAT: Mapping[str, Remat] = {**REMAT, "mlp": Remat(qkv=1, memory=0.75)}


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes over all JAX devices, and over how many slices the first two of them extend."""

    replica: int
    fsdp: int
    tensor: int
    dcn_replica: int = 1
    dcn_fsdp: int = 1

    @property
    def row_ways(self) -> int:
        return self.replica * self.fsdp

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes as a plan lists them: those over slices only if there are several."""
        several = self.dcn_replica * self.dcn_fsdp > 1
        return {name: size for name, size in vars(self).items() if several or not name.startswith("dcn")}


def mesh_of(config: Config, topology: Topology) -> Mesh:
    """Returns the configured mesh on a topology, with -1 filled in, as `visor_jax.scale.mesh.build_mesh` builds it.

    Raises:
      RequestError: the mesh does not have as many devices as the topology, or not as many slices.
    """
    mesh = config.mesh
    over = {"dcn_replica": mesh.dcn_replica, "dcn_fsdp": mesh.dcn_fsdp}
    within = {"replica": mesh.replica, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    by_hosts = topology.chip.kind == "gpu" and {*over.values()} != {1}  # hosts of GPUs count as slices on demand
    groups = topology.hosts if by_hosts else topology.slices
    dcn_replica, dcn_fsdp = filled(over, groups, f"slices of {topology.flags}")
    of_what = f"devices of {topology.flags}" if groups == 1 else f"devices of a slice of {topology.flags}"
    replica, fsdp, tensor = filled(within, topology.devices // groups, of_what)
    return Mesh(replica * dcn_replica, fsdp * dcn_fsdp, tensor, dcn_replica, dcn_fsdp)


@dataclass(frozen=True)
class Workload:
    """One step on one chip, with the weights it trains and holds over all chips."""

    ops: list[Op]
    collectives: list[Collective]
    weights: dict[str, float]  # by part
    trained: float
    packed: Packed


def workload(config: Config, stage: str, topology: Topology) -> Workload:
    """Returns the operations of one step of `stage` on one chip."""
    settings, arch, mesh = (
        stage_config(config, stage),
        architecture(config, stage).in_training,
        mesh_of(config, topology),
    )
    packed, weights = packed_step(config, stage), part_weights(arch)
    trains = {part: _trains(part, settings.trainable) for part in weights}
    share = topology.chip.cores / mesh.row_ways  # of the batch, on the chips that share each product
    remat, tower = REMAT[settings.remat], TOWER_REMAT[settings.tower_remat or settings.remat]
    build = Builder(arch, packed, share, remat, tower, trains, mesh.tensor)
    ops = build.policy() if settings.objective == "policy" else build.answer()
    collectives = build.reductions() if settings.objective == "answer" else []
    for other in arch.other_scales if settings.objective == "answer" else ():
        at_scale = replace(build, packed=packed_at_scale(packed, config.data.visual_length, arch, other))
        ops += at_scale.decoder()
        collectives += at_scale.reductions(tower=False)
    trained = sum(weights[part] for part in weights if trains[part])
    ops.append(optimizer_op(trained * mesh.replica / topology.devices * topology.chip.cores))
    total = sum(weights.values())
    parts = settings.accumulate  # each gathers the weights and reduces its gradients
    collectives = weight_collectives(mesh, topology, total, trained, parts) + collectives
    return Workload(ops, collectives, weights, trained, packed)


def weight_collectives(mesh: Mesh, topology: Topology, total: float, trained: float, parts: int) -> list[Collective]:
    """Returns what one chip gathers of `total` weights and reduces of the gradients of `trained` ones, in `parts`.

    Between slices each chip exchanges only its share within its slice, over the network.
    """
    inner, dcn = max(mesh.fsdp // mesh.dcn_fsdp // topology.chip.cores, 1), mesh.dcn_fsdp
    exchanged = fsdp(parts * total / mesh.tensor, parts * trained / mesh.tensor, inner)
    collectives = exchanged
    if topology.spans_three_axes(inner):
        collectives = [Collective(x.name, "all-reduce", 2 * x.bytes, inner, hidden=0.0) for x in exchanged]
    if dcn > 1:
        collectives += [
            Collective(f"{x.name} over slices", x.kind, x.bytes / inner, dcn, network=True) for x in exchanged
        ]
    gradients = 2 * 4.0 * trained / (mesh.fsdp * mesh.tensor) * topology.chip.cores
    if mesh.replica > mesh.dcn_replica:
        collectives.append(Collective("replicas", "all-reduce", gradients, mesh.replica // mesh.dcn_replica))
    if mesh.dcn_replica > 1:
        share = gradients * mesh.dcn_replica / mesh.replica
        collectives.append(Collective("replicas over slices", "all-reduce", share, mesh.dcn_replica, network=True))
    return collectives


def part_weights(arch: Architecture) -> dict[str, float]:
    """Returns the number of parameters by part; the parts are the beginnings of parameter paths."""
    text, vision, cross = arch.text, arch.vision, arch.cross
    hidden, kv = text.hidden_size, cross.num_kv_heads * text.head_dim
    layer = sum(decoder_shape(arch).products.values()) + 2 * hidden
    layer += text.num_heads * text.head_dim + 2 * text.num_kv_heads * text.head_dim
    tower = sum(tower_shape(arch).products.values()) + 2 * vision.hidden_size + vision.intermediate_size
    tower += 7 * vision.hidden_size
    heads = text.num_heads * text.head_dim
    reading = 2 * hidden * heads + 2 * hidden * kv + heads + 2 * kv + (2 + cross.kernel_size) * hidden + 1
    count = {kind: sum(place.kind is kind for place in arch.layers) for kind in LayerKind}
    parts = {
        "vision": vision.num_layers * tower
        + (3 * vision.patch_size**2 + 1 + vision.patches_per_tile) * vision.hidden_size,
        "connector": (arch.connector_input + hidden + 2) * hidden,
        "image_newline": hidden,
        "embed_tokens": text.vocab_size * hidden,
        "lm_head": 0 if text.tie_word_embeddings else text.vocab_size * hidden,
        "blocks/text": sum(count.values()) * layer,
        "norm": hidden,
    }
    if arch.plan == "visor":
        parts["blocks/cross_attention"] = count[LayerKind.CROSS] * reading
        policy = arch.policy
        parts["routing"] = (
            (hidden + 1) * policy.hidden_size + (policy.hidden_size + 1) * policy.max_budgets + 2 * hidden
        )
    return {part: float(size) for part, size in parts.items() if size}


def _trains(part: str, patterns: tuple[str, ...]) -> bool:
    path = part if part == "image_newline" else f"{part}/"
    return any(re.match(pattern, path) for pattern in patterns)


def decoder_shape(arch: Architecture) -> LayerShape:
    text = arch.text
    return LayerShape(text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim, text.intermediate_size)


def tower_shape(arch: Architecture) -> LayerShape:
    """The tower's layer."""
    vision, heads = arch.vision, arch.vision.num_heads
    return LayerShape(vision.hidden_size, heads, heads, vision.head_dim, vision.intermediate_size, gated=False)


@dataclass(frozen=True)
class Builder:
    """Builds the operations of one chip; `share` is its part of the batch, with the `tensor` chips beside it."""

    arch: Architecture
    packed: Packed
    share: float
    remat: Remat
    tower_remat: Remat
    trains: Mapping[str, bool]
    tensor: int

    def answer(self) -> list[Op]:
        """Tower, decoder under the full budget, and logits."""
        return self.vision(2.0 if self.trains["vision"] else 0.0) + self.decoder()

    def decoder(self) -> list[Op]:
        """The decoder under the full budget, and logits."""
        arch, packed, share = self.arch, self.packed, self.share
        visual, text = packed.visual * share, packed.text * share
        samples = packed.samples * share
        decoder = 2.0 if self.trains["blocks/text"] else 1.0
        kinds = [place.kind for place in arch.layers] if arch.plan == "visor" else [LayerKind.SELF] * len(arch.layers)
        joint, cross = kinds.count(LayerKind.SELF), kinds.count(LayerKind.CROSS)
        used = text * packed.used("text")
        pairs = samples * packed.sizes.text_pairs
        alone = Load(text, used, pairs + used * BLOCK / 2, pairs)
        shape = decoder_shape(arch)
        ops = []
        for count, read in self.readings(joint):
            useful = read * visual * packed.used("visual") + used
            pairs = samples * with_visual_share(packed.sizes, read).joint_pairs
            both = Load(read * visual + text, useful, pairs + useful * BLOCK / 2, pairs)
            ops += layer_ops("joint layers", shape, count, both, self.remat, decoder, self.tensor)
        ops += layer_ops("text layers", shape, len(kinds) - joint, alone, self.remat, decoder, self.tensor)
        ops += self.reading(cross, self.remat, 2.0 if self.trains.get("blocks/cross_attention") else decoder)
        head = 2.0 if self.trains.get("lm_head", self.trains["embed_tokens"]) else 1.0
        return [*ops, head_ops(arch.text.hidden_size, arch.text.vocab_size, text, used, head, self.tensor)]

    def readings(self, joint: int) -> list[tuple[int, float]]:
        """Numbers of consecutive joint layers, and the share of the visual positions that they read."""
        edges = (0, *self.arch.dropping.layers, joint)
        shares = (1.0, *self.arch.dropping.ratios)
        return [(stop - start, share) for start, stop, share in zip(edges, edges[1:], shares, strict=False)]

    def reductions(self, *, tower: bool = True) -> list[Collective]:
        """Reductions of activations over the chips that share each product: joint layers, text layers, tower."""
        arch, share, tensor = self.arch, self.share, self.tensor
        kinds = [place.kind for place in arch.layers] if arch.plan == "visor" else [LayerKind.SELF] * len(arch.layers)
        joint, hidden = kinds.count(LayerKind.SELF), arch.text.hidden_size
        patches = self.packed.tiles * share * arch.vision.patches_per_tile
        positions = [
            (count, (read * self.packed.visual + self.packed.text) * share) for count, read in self.readings(joint)
        ]
        return [
            *(one for count, size in positions for one in tensor_parallel(count, size, hidden, tensor)),
            *tensor_parallel(len(kinds) - joint, self.packed.text * share, hidden, tensor),
            *tensor_parallel(arch.vision.num_layers if tower else 0, patches, arch.vision.hidden_size, tensor),
        ]

    def policy(self) -> list[Op]:
        """Tower, and the layers before the first optional one; gradients reach the routing token only."""
        arch, packed, share = self.arch, self.packed, self.share
        text = packed.text * share
        used = text * packed.used("text")
        pairs = packed.samples * share * packed.sizes.text_pairs
        alone = Load(text, used, pairs + used * BLOCK / 2, pairs)
        layers = [arch.layers[index].kind for index in arch.shared_layers]
        ops = self.vision(0.0) + layer_ops(
            "text layers", decoder_shape(arch), len(layers), alone, Remat(), 1.0, self.tensor
        )
        return ops + self.reading(layers.count(LayerKind.CROSS), Remat(), 1.0)

    def vision(self, backward: float) -> list[Op]:
        """The tower over every tile, the connector, and the gather of visual positions."""
        arch, vision, hidden = self.arch, self.arch.vision, self.arch.text.hidden_size
        tiles = self.packed.tiles * self.share
        patches, side = tiles * vision.patches_per_tile, float(vision.patches_per_tile)
        used = self.packed.used("tiles")
        load = Load(patches, patches * used, patches * padded(int(side), TILE_BLOCK), patches * used * side)
        remat = self.tower_remat if backward else Remat()
        ops = layer_ops("tower", tower_shape(arch), vision.num_layers, load, remat, backward, self.tensor, "full")
        training = 2.0 if self.trains["connector"] else 0.0
        connected = self.packed.visual * self.share if arch.anyres.shuffled > 1 else patches
        for rows, wide, out, gradient in (
            (patches, 3 * vision.patch_size**2, vision.hidden_size, backward),
            (connected, arch.connector_input, hidden, training),
            (connected, hidden, hidden, training),
        ):
            flops = 2.0 * wide * out / self.tensor
            moved = WORD * rows * (wide + out / self.tensor)
            ops.append(Op("tower", MATMUL, flops * rows, moved, (wide, out), 0.0, gradient, flops * rows * used))
        positions = arch.reduction.candidates(self.packed.visual) * self.share
        gathered = WORD * positions * hidden * 5  # four features and their mean
        sizes = self.packed.sizes
        if choosing := reduction_flops(arch, sizes.tiles, sizes.visual) * self.packed.samples * self.share:
            dims = (hidden, vision.patches_per_tile)
            ops.append(Op("tower", MATMUL, choosing / used, 0.0, dims, backward=0.0, useful=choosing))
        return [*ops, Op("tower", MEMORY, 0.0, gathered, (), 0.0, training)]

    def reading(self, count: int, remat: Remat, backward: float) -> list[Op]:
        """Cross-attention of text to visual positions in `count` layers."""
        if not count:
            return []
        arch, packed, share = self.arch, self.packed, self.share
        text, hidden = arch.text, arch.text.hidden_size
        visual, tokens = packed.visual * share, packed.text * share
        heads = text.num_heads * text.head_dim / self.tensor
        kv = arch.cross.num_kv_heads * text.head_dim / self.tensor
        pairs = packed.samples * share * packed.sizes.cross_pairs
        ops = []
        for positions, wide, what in ((tokens, heads, "text"), (visual, kv, "visual")):
            flops = 4.0 * count * hidden * wide
            moved = 2 * WORD * count * positions * (hidden + wide)
            useful = flops * positions * packed.used(what)
            dims = (hidden, int(wide))
            ops.append(Op("reading", MATMUL, flops * positions, moved, dims, remat.qkv, backward, useful))
        flops = 4.0 * count * heads
        moved = WORD * count * (2 * tokens * heads + 2 * visual * kv)
        useful = flops * pairs
        ops.append(
            Op("reading", ATTENTION, 1.3 * useful, moved, (text.head_dim,), remat.attention, 2.0, useful, "full")
        )
        values = 6 * visual + 4 * tokens  # convolution and norm of V; norm, gate and residual of T
        return [*ops, Op("reading", MEMORY, 0.0, WORD * count * hidden * values, (), remat.memory, backward)]
