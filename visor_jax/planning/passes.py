"""What search and label cost on a topology, by formula: with every budget alone, and with layers that budgets share.

In: a configuration and a topology. Out: "passes" of `visor plan --topology`. Both passes score questions under many
budgets, forward only, one question per row, and processes, one per host, share the batches. What early stopping saves
depends on the answers: the plan gives a lower limit of the cost. Nothing here was measured. No JAX import.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from visor_jax.architecture import Architecture, LayerKind
from visor_jax.budget import Bits, Plan, by_count, searched_at_once
from visor_jax.config import Config, architecture
from visor_jax.cost import decoder_flops, tree_flops, tree_layers, visual_flops
from visor_jax.data.row_shape import question_visual_length
from visor_jax.data.tile_pools import tile_bucket
from visor_jax.planning.layers import Load, Remat, head_ops, layer_ops
from visor_jax.planning.mixture import Packed, Sizes, cut_to_row, with_visual_share
from visor_jax.planning.records import fsdp
from visor_jax.planning.roofline import Op, estimate
from visor_jax.planning.samples import SAMPLES
from visor_jax.planning.workload import BLOCK, Builder, decoder_shape, mesh_of, part_weights
from visor_jax.scale.topologies import Topology

HOUR = 3600.0
TEXT, LONGEST = 80, 256  # text tokens of a question with its answer, and of the longest one, to which all are padded


def passes(config: Config, topology: Topology, dollars: float = 0.0) -> dict[str, Any]:
    """Returns the figures of search and label, as far as the configuration has them.

    A best-first search has chosen its subsets only when it ends: then only an upper limit, "alone", is known.
    """
    arch, result = architecture(config, "full"), {}
    if "search" in config.stages and arch.num_slots:
        settings = config.search
        subsets = searched_at_once(arch.num_slots, settings.max_subsets, settings.slots)
        known = subsets or [(True,) * arch.num_slots] * settings.max_subsets
        result["search"] = PassCost(config, arch, topology, dollars).figures(settings.samples, known)
        if subsets:
            result["search"] |= early_stopping(PassCost(config, arch, topology, dollars), subsets)
        else:
            result["search"] |= {"shared": None, "decoder_tflop": None}
    if "label" in config.stages and arch.num_slots:
        one_of_each_count = by_count(arch.num_slots)
        result["label"] = PassCost(config, arch, topology, dollars).figures(config.label.samples, one_of_each_count)
    return result


def early_stopping(cost: PassCost, subsets: Sequence[Bits]) -> dict[str, Any]:
    """Returns the least that a search with early stopping costs: of each count one subset is left at the first look."""
    settings, size = cost.config.search, cost.config.evaluate.batch_size
    first = min(settings.samples, -(-settings.look_every // size) * size)
    counts = {sum(bits) for bits in subsets}
    left = [bits for bits in by_count(cost.arch.num_slots) if sum(bits) in counts]
    seconds = cost.seconds(first, tree_layers(cost.arch, subsets), len(subsets))
    seconds += cost.seconds(settings.samples - first, tree_layers(cost.arch, left), len(left))
    return {"early_stopping": settings.early_stopping, "first_look": first, "stopped_at_once": cost.priced(seconds)}


class PassCost:
    """Estimates the time of scoring questions on a topology."""

    def __init__(self, config: Config, arch: Architecture, topology: Topology, dollars: float) -> None:
        self.config, self.arch, self.topology, self._dollars = config, arch, topology, dollars
        data, size = config.data, config.evaluate.batch_size
        # One process uses the mesh of training; each of several ones scores its own batches on its own devices.
        alone = topology.hosts == 1
        ways = mesh_of(config, topology).row_ways if alone else topology.devices // topology.hosts
        tensor = mesh_of(config, topology).tensor if alone else 1
        rows = -(-size // ways) * ways
        self._sizes = question_sizes(config, arch)
        visual = question_visual_length(data.visual_length, arch)  # one picture per question
        tiles = ways * min(tile_bucket(math.ceil(size / ways * self._sizes.tiles)), rows // ways * data.tiles)
        capacity = (rows, tiles, rows * visual, rows * min(LONGEST, data.text_length))
        packed, trains = Packed(*capacity, float(size), self._sizes), dict.fromkeys(part_weights(arch), False)
        self._build = Builder(arch, packed, topology.chip.cores / ways, Remat(), Remat(), trains, tensor)
        self._ways = ways // topology.chip.cores

    def figures(self, questions: int, budgets: Sequence[Bits]) -> dict[str, Any]:
        """Returns FLOPs of real tokens, and times with every budget alone and with shared layers."""
        sizes, arch = self._sizes, self.arch
        tiles, visual, text = round(sizes.tiles), round(sizes.visual), round(sizes.text)
        each = [kind for bits in budgets for kind in Plan.of(arch).under(bits)]
        return {
            "questions": questions,
            "budgets": len(budgets),
            "tower_tflop": questions * visual_flops(arch, tiles, visual) / 1e12,
            "decoder_tflop_alone": questions * sum(decoder_flops(arch, b, visual, text) for b in budgets) / 1e12,
            "decoder_tflop": questions * tree_flops(arch, budgets, visual, text) / 1e12,
            "used": {what: self._build.packed.used(what) for what in ("tiles", "visual", "text")},
            "alone": self.priced(self.seconds(questions, each, len(budgets))),
            "shared": self.priced(self.seconds(questions, tree_layers(arch, budgets), len(budgets))),
        }

    def priced(self, seconds: float) -> dict[str, Any]:
        """Returns hours of the run, hours of all chips together, and dollars."""
        hours = seconds / HOUR
        chip_hours = hours * self.topology.chips
        return {"hours": hours, "chip_hours": chip_hours, "dollars": chip_hours * self._dollars or None}

    def seconds(self, questions: int, layers: Sequence[LayerKind], ends: int) -> float:
        """Returns the estimated seconds of a pass.

        Args:
          layers: all that run for one question.
          ends: how often logits are computed for it.
        """
        runs, build, arch = Counter(layers), self._build, self.arch
        ops = build.vision(0.0) + self._decoder(runs, ends)
        ops = [replace(op, recompute=0.0, backward=0.0) for op in ops]
        weights = part_weights(arch)
        of_layers = sum(runs.values()) * weights["blocks/text"] / arch.text.num_layers
        crossing = sum(kind is LayerKind.CROSS for kind in Plan.of(arch).kinds)
        of_layers += runs[LayerKind.CROSS] * weights.get("blocks/cross_attention", 0.0) / max(crossing, 1)
        gathered = of_layers + weights["vision"] + (1 + ends) * weights["embed_tokens"]
        of_batch = estimate(ops, fsdp(gathered / build.tensor, 0.0, self._ways), self.topology).seconds
        batches = math.ceil(questions / self.config.evaluate.batch_size)
        return math.ceil(batches / self.topology.hosts) * of_batch

    def _decoder(self, runs: Counter[LayerKind], ends: int) -> list[Op]:
        build, sizes, packed = self._build, self._sizes, self._build.packed
        visual, text, samples = packed.visual * build.share, packed.text * build.share, packed.samples * build.share
        shape, tensor, of_text = decoder_shape(self.arch), build.tensor, self.arch.text

        def load(positions: float, tokens: float, pairs: float) -> Load:
            return Load(positions, samples * tokens, samples * (pairs + tokens * BLOCK / 2), samples * pairs)

        joint = load(visual + text, sizes.visual + sizes.text, sizes.joint_pairs)
        alone = load(text, sizes.text, sizes.text_pairs)
        only_text = runs[LayerKind.TEXT] + runs[LayerKind.CROSS]
        return [
            *layer_ops("joint layers", shape, runs[LayerKind.SELF], joint, Remat(), 0.0, tensor),
            *layer_ops("text layers", shape, only_text, alone, Remat(), 0.0, tensor),
            *build.reading(runs[LayerKind.CROSS], Remat(), 0.0),
            head_ops(of_text.hidden_size, of_text.vocab_size, ends * text, ends * samples * sizes.text, 0.0, tensor),
        ]


def question_sizes(config: Config, arch: Architecture) -> Sizes:
    """Returns the mean sizes of questions of `TEXT` tokens about the pictures of LLaVA-OneVision's mixture."""
    count = len(SAMPLES)
    tiles, visual = (sum(sample[i] for sample in SAMPLES) / count for i in (0, 1))
    joint = sum((sample[1] + TEXT) ** 2 / 2 for sample in SAMPLES) / count
    sizes = Sizes(tiles, visual, TEXT, joint, TEXT**2 / 2, visual * TEXT)
    sizes = with_visual_share(sizes, arch.reduction.share / arch.anyres.packing)
    return cut_to_row(sizes, config.data.tiles, config.data.visual_length, config.data.text_length)
