"""What search and label cost: counts of layers, FLOPs, and the lines of a plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from visor_jax.__main__ import main
from visor_jax.architecture import LayerKind
from visor_jax.budget import all_subsets
from visor_jax.config import architecture, load_config
from visor_jax.cost import decoder_flops, tree_flops, tree_layers
from visor_jax.planning.passes import TEXT, passes, question_sizes
from visor_jax.planning.plan import plan
from visor_jax.scale.topologies import parse_topology

ROOT = Path(__file__).parents[2]
WAYS = ("alone", "shared", "stopped_at_once")


def shipped(name: str, *overrides: str) -> Any:
    return load_config(ROOT / "configs" / f"{name}.py", overrides)


def test_the_layers_of_all_subsets_of_eight_slots() -> None:
    """510 blocks of three layers, without the two that all subsets share."""
    arch = architecture(shipped("llava_ov_0p5b"), "full")
    counts = Counter(tree_layers(arch, all_subsets(8)))
    assert counts.total() == 3 * 510 - 2  # the first text-only and cross-attention layer run once, not twice
    assert counts[LayerKind.SELF] == 255 and counts[LayerKind.CROSS] == 509
    assert counts[LayerKind.TEXT] == 509 + 255


def test_a_search_at_real_size() -> None:
    config, topology = shipped("llava_ov_0p5b"), parse_topology("v5e:4x4")
    found = passes(config, topology, dollars=1.2)
    search, arch = found["search"], architecture(config, "full")
    assert (search["questions"], search["budgets"]) == (1024, 256)
    sizes = question_sizes(config, arch)
    assert sizes.text == TEXT
    tree = 1024 * tree_flops(arch, all_subsets(8), round(sizes.visual), TEXT) / 1e12
    alone = 1024 * sum(decoder_flops(arch, bits, round(sizes.visual), TEXT) for bits in all_subsets(8)) / 1e12
    assert search["decoder_tflop"] == pytest.approx(tree) and search["decoder_tflop_alone"] == pytest.approx(alone)
    assert alone / tree == pytest.approx(4, rel=0.02)
    hours = [search[way]["hours"] for way in WAYS]
    assert hours[0] > hours[1] > hours[2] > hours[1] * 64 / 1024
    for way in WAYS:
        assert search[way]["chip_hours"] == pytest.approx(16 * search[way]["hours"])
        assert search[way]["dollars"] == pytest.approx(1.2 * search[way]["chip_hours"])
    assert found["label"]["questions"] == 100_000 and found["label"]["budgets"] == 9
    assert 0.3 < search["used"]["visual"] < 0.5, "rows have room for the largest picture, not for those of training"


def test_four_hosts_share_the_batches() -> None:
    config = shipped("llava_ov_0p5b")
    one, four = (passes(config, parse_topology(name))["label"]["shared"]["hours"] for name in ("v5e:2x2", "v5e:4x4"))
    assert one / four == pytest.approx(4, rel=0.01)


def test_a_best_first_search_is_bounded_only() -> None:
    config = shipped("llava_ov_0p5b", "--config.search.max_subsets=40")
    search = passes(config, parse_topology("h100x8"))["search"]
    assert search["budgets"] == 40 and search["shared"] is None and "stopped_at_once" not in search
    assert search["alone"]["dollars"] is None
    chosen = passes(shipped("llava_ov_0p5b", "--config.search.slots=1,3"), parse_topology("h100x8"))["search"]
    assert chosen["budgets"] == 5 and chosen["shared"]["hours"] < search["alone"]["hours"]


def test_a_plan_of_all_stages_has_the_passes(capsys: pytest.CaptureFixture[str]) -> None:
    config, topology = shipped("llava_ov_0p5b"), parse_topology("h100x8")
    assert plan(config, topology, ["full"])["passes"] == {}
    assert passes(shipped("almanac_base"), topology) == {}
    assert main(["plan", f"--config={ROOT}/configs/llava_ov_0p5b.py", "--topology=h100x8", "--by-formula"]) == 0
    printed = capsys.readouterr().out
    assert "search: 1,024 questions under 256 budgets" in printed and "label: 100,000 questions" in printed
    assert "each budget alone: about" in printed and "with shared layers: about" in printed
    assert "search.early_stopping" in printed
