"""Estimated time of a training step: a roofline over classes of operations, with its assumptions in one table.

In: operations of one chip (`Op`: FLOPs and bytes of a forward pass, and how often forward and backward passes run) and
collectives. Out: seconds by class. Nothing here was measured: `ASSUMPTIONS` says where each number comes from, and
`visor_jax.planning.records` compares the estimates with published training records. No JAX import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visor_jax.scale.topologies import Chip, Topology

MATMUL, ATTENTION, MEMORY = "matmul", "attention", "memory"

# Share of the peak that large matrix products reach: one number per generation of matrix units. The three are chosen so
# that the records of `visor_jax.planning.records` come out; no record has a number of its own.
MATMUL_SHARE = {"v4": 0.9, "v5e": 0.9, "v5p": 0.9, "v6e": 0.78, "tpu7x": 0.78, "h100": 0.65, "h200": 0.65}
# Share of the peak of attention over the pairs that the mask keeps, if a head fills the matrix unit: splash on tpu7x at
# 8,192 tokens reaches 253 (causal) and 369 (full) of 1,153 TFLOP/s forward and 290 and 429 backward at head_dim 128,
# which is half of a unit of 256, and half as much at 64. FA3 on H100 reaches 602 of 989 (causal) and 559 backward.
ATTENTION_SHARE = {"tpu": {"causal": 0.48, "full": 0.66}, "gpu": {"causal": 0.55, "full": 0.6}}
ATTENTION_BACKWARD = 2.5  # FLOPs of its backward pass relative to the forward one: five products instead of two
HBM_SHARE = 0.8  # of the published bandwidth
LINK_SHARE = 0.8  # of the published bandwidth, in large transfers
HIDDEN_SHARE = 0.7  # of a collective's time during which the chip also computes

ASSUMPTIONS: dict[str, str] = {
    "matmul": "large matrix products reach a share of the peak: 0.90 on v4, v5e and v5p, 0.78 on v6e and tpu7x, 0.65 on"
    " h100 and h200 (fitted to published records, three numbers); dimensions are padded to the matrix unit, 128 or 256",
    "attention": "0.48 (causal) or 0.66 (full) of the peak on TPUs if head_dim fills the matrix unit, in proportion"
    " less for narrower heads, 0.55 or 0.60 on GPUs (published kernel measurements); blocks of 512 without a pair are"
    " skipped; its backward pass costs 2.5 forward passes",
    "memory": "norms, rotary embedding, activations, residuals move 2 bytes times (8 hidden + 4 heads + 3 MLP) values"
    " per token and layer (tower: 8 hidden + 2 MLP) at 0.8 of the memory bandwidth, twice in the backward pass, and are"
    " not overlapped",
    "optimizer": "each chip reads and writes its share of float32 weights, moments and gradients once per step",
    "collectives": "FSDP gathers bfloat16 weights in the forward and in the backward pass and reduces float32"
    " gradients once; tensor parallelism reduces activations four times per layer; if the compiled program says more,"
    " that counts; rings at 0.8 of the links' bandwidth; 70 % of the time is hidden behind computation, of compiled"
    " collectives only where they are asynchronous or part of a fusion; FSDP over all three axes of a v4 or v5p slice"
    " is compiled to all-reduces, which move twice the bytes and are not hidden",
    "slices": "between slices each chip has its share of the network: 3.125 GB/s on v5e, 6.25 on v4 and v5p, 12.5 on"
    " v6e and tpu7x; collectives reach 0.8 of it and 70 % are hidden; replicas all-reduce their share of the gradients"
    " once per step, slices that share parameters exchange theirs as often as chips of one slice do",
    "offload": "transfers between chip and host (train.remat=offload) are hidden",
    "data": "the host delivers batches in time; no preemption, evaluation or saving",
    "mixture": "sizes of samples are those of LLaVA-OneVision's single-image mixture (benchmarks/lengths.csv), cut"
    " to what a row of the configuration holds",
    "passes": "search and label ask questions of 80 text tokens about the mixture's pictures, one per row, padded to"
    " data.tiles, data.visual_length and 256 text positions; one process per host, which scores its own batches; of"
    " label's viable budgets there is one for each number of slots",
    "budgets": "every optional layer is on in every step, also in stage universal",
}


@dataclass(frozen=True)
class Op:
    """One class of operations on one chip, as a forward pass over all its tokens.

    Attributes:
      name: the part of the model.
      kind: MATMUL, ATTENTION or MEMORY.
      flops: of a forward pass, with padded positions; 0 for MEMORY.
      bytes: moved to and from memory by a forward pass.
      dims: dimensions of the products that pad to the matrix unit; for attention the head_dim alone.
      recompute: how often the forward pass runs again for the backward pass.
      backward: 0 without a backward pass, 1 with gradients of activations only, 2 with those of weights as well.
      useful: FLOPs of a forward pass over real tokens only.
      mask: of attention: "causal" or "full".
    """

    name: str
    kind: str
    flops: float
    bytes: float
    dims: tuple[int, ...] = ()
    recompute: float = 0.0
    backward: float = 2.0
    useful: float = 0.0
    mask: str = "causal"

    @property
    def passes(self) -> float:
        """Forward passes that cost as much as all passes of one step."""
        backward = self.backward * (ATTENTION_BACKWARD / 2 if self.kind == ATTENTION else 1)
        return 1 + self.recompute + backward

    @property
    def useful_flops(self) -> float:
        """Useful FLOPs of one step: no padding, no recomputation, backward twice the forward pass."""
        return self.useful * (1 + self.backward)

    @property
    def executed_flops(self) -> float:
        return self.flops * self.passes

    def seconds(self, chip: Chip) -> float:
        """Returns the estimated time of all passes of one step."""
        memory = self.bytes / (chip.hbm_bandwidth * HBM_SHARE)
        rate = chip.flops * self.share_of_peak(chip)
        return self.passes * max(self.flops / rate if self.flops else 0.0, memory)

    def share_of_peak(self, chip: Chip) -> float:
        """Returns the share of the peak FLOP/s at which the operation computes."""
        if self.kind == ATTENTION:
            return ATTENTION_SHARE[chip.kind][self.mask] * min(1.0, self.dims[0] / chip.matrix_unit)
        fill = math.prod(size / padded(size, chip.matrix_unit) for size in self.dims)
        return MATMUL_SHARE[chip.name] * fill


def padded(size: int, unit: int) -> int:
    """Returns `size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Collective:
    """Communication of one step on one chip: `bytes` received or reduced, among `ways` chips.

    `hidden`: the share of its time during which the chip also computes. `network`: between slices, over the data
    center's network, of which each chip has its share.
    """

    name: str
    kind: str
    bytes: float
    ways: int
    hidden: float = HIDDEN_SHARE
    network: bool = False

    def seconds(self, topology: Topology) -> float:
        if self.ways <= 1:
            return 0.0
        bandwidth = topology.chip.network_bandwidth if self.network else topology.gather_bandwidth(self.ways)
        return self.bytes * (1 - 1 / self.ways) / (bandwidth * LINK_SHARE)


@dataclass(frozen=True)
class Estimate:
    """The estimated time of a step.

    Attributes:
      seconds: of one step.
      parts: seconds by class of operations; collectives count only what is not hidden.
      useful_flops, executed_flops: of one step on one chip.
      mfu: useful FLOPs as a share of the peak.
    """

    seconds: float
    parts: Mapping[str, float]
    useful_flops: float
    executed_flops: float
    mfu: float

    @property
    def bound(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])


def estimate(ops: Sequence[Op], collectives: Sequence[Collective], topology: Topology) -> Estimate:
    """Returns the estimated time of a step of these operations and collectives on one chip of `topology`."""
    chip = topology.chip
    parts: dict[str, float] = {}
    for op in ops:
        limit = "memory" if op.kind == MEMORY else op.kind
        parts[f"{op.name} {limit}"] = parts.get(f"{op.name} {limit}", 0.0) + op.seconds(chip)
    computing = sum(parts.values())
    talking = sum(collective.seconds(topology) for collective in collectives)
    hidden = min(sum(collective.hidden * collective.seconds(topology) for collective in collectives), computing)
    if talking:
        parts["collectives not hidden"] = talking - hidden
    seconds = computing + talking - hidden
    useful = sum(op.useful_flops for op in ops)
    mfu = useful / (seconds * chip.flops)
    return Estimate(seconds, parts, useful, sum(op.executed_flops for op in ops), mfu)
