"""Plans by formula: JSON keys, sizes, padding, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from visor_jax.__main__ import main
from visor_jax.config import apply_overrides, architecture, load_config
from visor_jax.data.anyres import tile_count, visual_token_count
from visor_jax.errors import RequestError
from visor_jax.model.remat import Remat
from visor_jax.model.visor import abstract_params
from visor_jax.planning import compiling
from visor_jax.planning.memory import chip_bytes
from visor_jax.planning.mixture import MIXTURE, packed_step
from visor_jax.planning.plan import COSTLIEST, plan, planned_stages
from visor_jax.planning.roofline import ASSUMPTIONS
from visor_jax.planning.samples import EVERY, SAMPLES
from visor_jax.planning.search import ROOM, search
from visor_jax.planning.workload import REMAT, part_weights, workload
from visor_jax.scale.topologies import parse_topology
from visor_jax.testing import tiny_config
from visor_jax.tree import flatten

ROOT = Path(__file__).parents[2]
SHIPPED = ("almanac_mini", "almanac_base", "llava_ov_0p5b", "llava_ov_1p5b", "llava_ov_7b")


def shipped(name: str, *overrides: str) -> Any:
    return load_config(ROOT / "configs" / f"{name}.py", overrides)


def test_a_small_plan_has_the_keys_of_the_contract() -> None:
    config = shipped("almanac_mini")
    result = plan(config, parse_topology("h100x8"), ["warmup", "full"], dollars=2.0)
    assert result.keys() >= {*COSTLIEST, "stages"}
    json.dumps(result, allow_nan=False)
    for stage in result["stages"].values():
        assert stage.keys() >= {*COSTLIEST}
        assert stage["fits"] and 0 < stage["mfu"] < 1 and stage["dollars"] == pytest.approx(2 * stage["chip_hours"])
        expected = stage["mfu"] * stage["seconds_per_step"] * 8 * 989e12
        assert stage["flops_per_step"] == pytest.approx(expected)
    assert result["chips"] == 8 and result["mesh"] == {"replica": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_by_part_are_those_of_the_model(name: str) -> None:
    arch = architecture(shipped(name), "full")
    sizes = {path: x.size for path, x in flatten(abstract_params(arch)).items()}
    assert sum(part_weights(arch).values()) == pytest.approx(sum(sizes.values()), rel=2e-3)


def test_the_mixture_is_that_of_the_benchmark() -> None:
    arch = architecture(shipped("llava_ov_0p5b"))
    rows = list(csv.DictReader((ROOT / "benchmarks" / "lengths.csv").read_text().splitlines()))
    text = np.array([int(row["text_tokens"]) for row in rows], float)
    sizes = [(int(row["height"]), int(row["width"])) for row in rows]
    tiles = np.array([tile_count(size, arch) if size[0] else 0 for size in sizes], float)
    visual = np.array([visual_token_count(size, arch) if size[0] else 0 for size in sizes], float)
    means = [tiles, visual, text, (visual + text) ** 2 / 2, text**2 / 2, text * visual]
    assert [x.mean() for x in means] == pytest.approx(list(vars(MIXTURE).values()), rel=1e-3)


@pytest.mark.parametrize("setting", ["8,832", "8,832, four rows", "17,664", "32,768", "32,768, one row"])
def test_packing_fills_about_as_much_as_it_was_measured_to(setting: str) -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "packing.json").read_text())["settings"]
    if setting not in measured:
        pytest.skip(f"packing.json has {', '.join(measured)}")
    pool = measured[setting]["pool"]
    config = shipped(
        "llava_ov_0p5b",
        f"--config.data.batch_size={pool['rows']}",
        "--config.train.accumulate=1",
        f"--config.data.pool_rows={pool['rows']}",
        f"--config.data.pool_tiles={pool['tiles']}",
        f"--config.data.visual_length={pool['visual']}",
        f"--config.data.text_length={pool['text']}",
        "--config.data.pack_window=64",
    )
    assert packed_step(config, "full").samples == pytest.approx(
        measured[setting]["packed"]["samples_per_step"], rel=0.04
    )


def test_frozen_parts_have_no_backward_pass() -> None:
    config, place = shipped("llava_ov_0p5b"), parse_topology("h100x8")
    warmup, full = (workload(config, stage, place) for stage in ("warmup", "full"))
    assert warmup.trained < 0.1 * full.trained
    tower = [sum(op.useful_flops for op in work.ops if op.name == "tower") for work in (warmup, full)]
    assert tower[1] == pytest.approx(3 * tower[0], rel=0.02)


def test_the_full_remat_costs_about_a_third() -> None:
    place = parse_topology("v5p:4x4x4")
    kept, again = (
        workload(shipped("llava_ov_7b", f"--config.train.remat={remat}"), "full", place) for remat in ("none", "full")
    )
    executed = [sum(op.executed_flops for op in work.ops) for work in (kept, again)]
    assert executed[1] / executed[0] == pytest.approx(4 / 3, abs=0.05)


def test_an_unknown_or_untrained_stage_is_refused() -> None:
    with pytest.raises(RequestError, match=r"--stage=ful: .*'full'"):
        planned_stages(shipped("llava_ov_0p5b"), "ful")
    with pytest.raises(RequestError, match="--stage=search"):
        planned_stages(shipped("llava_ov_0p5b"), "search")


def test_a_mesh_of_another_size_is_refused() -> None:
    config = shipped("llava_ov_0p5b", "--config.mesh.fsdp=4")
    with pytest.raises(RequestError, match=r"mesh.fsdp=4.*--topology=h100x8, 8"):
        plan(config, parse_topology("h100x8"), ["full"])


@pytest.mark.parametrize("topology", ["h100x256", "v5e:16x16", "v5e:3x5"])
def test_a_batch_that_devices_cannot_split_is_refused_without_compiling(topology: str) -> None:
    with pytest.raises(RequestError, match=rf"stage 'full'=32: expected a multiple of \d+, .*--topology={topology}"):
        plan(shipped("llava_ov_0p5b"), parse_topology(topology), ["full"], seconds=0)


def test_samples_are_no_larger_than_the_rows_of_a_small_model() -> None:
    config = shipped("almanac_mini")
    step = packed_step(config, "full")
    assert step.sizes.joint_pairs <= (config.data.visual_length + config.data.text_length) ** 2 / 2
    result = plan(config, parse_topology("h100x4"), ["full"])
    assert result["stages"]["full"]["time_shares"]["joint layers attention"] < 0.3


def test_without_libtpu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"^--topology=v5e:2x2: .*\[aot\][^\n]*$"):
        plan(tiny_config(), parse_topology("v5e:2x2"), ["full"])


def test_by_formula_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("visor_jax.planning.plan.compile_stages", None)
    config = f"--config={ROOT / 'configs' / 'llava_ov_7b.py'}"
    assert main(["plan", config, "--topology=v5p:4x4x4", "--stage=full", "--by-formula", "--search", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["fits"] and not any(stage["compiled"] for stage in result["stages"].values())
    assert result["mfu"] > 0.6 and "--config.mesh.replica=4" in result["overrides"]
    assert result["note"] == "estimated, not run on hardware"


def test_planning_needs_no_jax_in_its_own_process() -> None:
    assert jax.__version__  # imported here, but not by the modules that plan
    for module in ("plan", "workload", "roofline", "layers", "memory", "mixture", "records", "compiling", "text"):
        text = (ROOT / "visor_jax" / "planning" / f"{module}.py").read_text()
        assert "import jax" not in text and "from jax" not in text


def test_every_policy_of_remat_has_a_formula() -> None:
    assert {*REMAT} == {*get_args(Remat)}


def test_the_command_prints_the_plan_and_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={ROOT / 'configs' / 'almanac_mini.py'}"
    assert main(["plan", config, "--topology=h100x4", "--stage=full", "--dollars-per-chip-hour=2", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["stages"].keys() == {"full"} and result["note"] == "estimated, not run on hardware"
    assert all(f"  {name}: {meaning}" in printed.err for name, meaning in ASSUMPTIONS.items())


def test_picture_and_topology_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={ROOT / 'configs' / 'almanac_mini.py'}"
    for flags, expected in (
        (["--image=64x64", "--topology=h100x8"], "--topology: not allowed with argument --image"),
        (["--topology=h100x8", "--dollars-per-chip-hour=-1"], "--dollars-per-chip-hour=-1"),
        ([], "--image --topology"),
        (["--topology="], "--topology=: expected CHIP:AxB"),
        (["--image=64x64", "--search"], "plan: --search has no effect with --image; remove it"),
        (["--image=64x64", "--stage=full"], "plan: --stage has no effect with --image"),
        (["--topology=h100x8", "--text-tokens=9"], "plan: --text-tokens has no effect with --topology"),
        (["--topology=v5e:2x2", "--by-formula", "--machine-code"], "give one of them"),
    ):
        assert main(["plan", config, *flags]) == 2
        assert expected in capsys.readouterr().err


def test_the_search_keeps_what_is_as_fast_and_splits_replicas_where_gathers_wait() -> None:
    small, large = (
        search(shipped(name), parse_topology(topology), ["full"])[0]
        for name, topology in (("llava_ov_0p5b", "v5e:4x4"), ("llava_ov_7b", "v5p:4x4x4"))
    )
    assert small.config.mesh == shipped("llava_ov_0p5b").mesh
    assert "none" not in (small.config.train.remat, small.config.train.tower_remat), "the tower does not fit otherwise"
    assert large.config.mesh.replica == 4 and large.config.train.remat == "products"
    assert max(small.room, large.room) <= ROOM


def test_a_search_without_a_fit_says_by_how_much() -> None:
    with pytest.raises(
        RequestError, match=r"--topology=v5e:2x2: none of \d+ settings .* fits; the smallest fills \d+% of"
    ):
        search(shipped("llava_ov_7b"), parse_topology("v5e:2x2"), ["full"])


def test_the_table_of_samples_is_drawn_from_the_mixture() -> None:
    arch = architecture(shipped("llava_ov_0p5b"))
    rows = csv.DictReader((ROOT / "benchmarks" / "lengths.csv").read_text().splitlines())
    sizes = [((int(row["height"]), int(row["width"])), int(row["text_tokens"])) for row in rows]
    every = [
        (tile_count(size, arch), visual_token_count(size, arch), text) if size[0] else (0, 0, text)
        for size, text in sizes
    ]
    every.sort(key=lambda sample: sample[1:])
    assert tuple(every[EVERY // 2 :: EVERY]) == SAMPLES


def test_what_the_tower_recomputes_is_its_own_setting() -> None:
    config, place = shipped("llava_ov_0p5b"), parse_topology("v5e:4x4")
    less = shipped("llava_ov_0p5b", "--config.train.tower_remat=")
    work, more = workload(config, "full", place), workload(less, "full", place)
    tower, tower_again = (sum(op.executed_flops for op in x.ops if op.name == "tower") for x in (work, more))
    assert tower < 0.85 * tower_again and [op for op in work.ops if op.name != "tower"] == [
        op for op in more.ops if op.name != "tower"
    ]
    held, held_again = (chip_bytes(x, "full", place, y)["temporaries"] for x, y in ((config, work), (less, more)))
    assert held > held_again + 6e9


def test_a_search_over_all_stages_finds_settings_that_training_accepts() -> None:
    config = shipped("almanac_mini")
    best, *others = search(config, parse_topology("v5e:2x2"), planned_stages(config))
    assert apply_overrides(config, best.overrides).mesh == best.config.mesh
    assert {candidate.config.train.accumulate for candidate in (best, *others)} > {1}


def test_a_search_without_a_mesh_names_the_batch() -> None:
    with pytest.raises(
        RequestError, match=r"data.batch_size=12: no mesh of the 256 devices of --topology=v5e:16x16 sp"
    ):
        search(shipped("almanac_mini", "--config.data.batch_size=12"), parse_topology("v5e:16x16"), ["full"])
