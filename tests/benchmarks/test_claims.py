"""The comparison of variants: configurations, what is skipped or refused, statistics, page; a whole one if slow."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from visor_jax.commands.recipe import run_stages
from visor_jax.config import architecture, as_config, load_config, stage_config, to_json
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEFAULT_JOB = BENCHMARKS.parent / "configs" / "almanac_mini.py"
LEVELS = {"paper": "easy", "title": "middle", "below": "hard", "cell3": "hard"}
COSTS = {"empty": 0.002, "0b10": 0.004, "full": 0.006, "auto": 0.003}
pytestmark = pytest.mark.usefixtures("script")


@pytest.fixture
def claims() -> types.ModuleType:
    return importlib.import_module("claims")


@pytest.fixture
def table() -> types.ModuleType:
    return importlib.import_module("claims_table")


def session(claims: types.ModuleType, tmp_path: Path, **settings: Any) -> Any:
    config = as_config(tiny_config({"stages": ("warmup", "full", "search", "universal", "label", "policy")}, steps=4))
    return claims.Session(config, "/base", "b" * 64, tmp_path / "runs", tmp_path, **settings)


# --- configurations ---------------------------------------------------------------------------------------------------


def test_every_variant_is_a_valid_configuration(
    claims: types.ModuleType, table: types.ModuleType, tmp_path: Path
) -> None:
    here = session(claims, tmp_path)
    configs = {name: claims.configured(here, name, 3) for name in table.VARIANTS}
    identities = {name: json.dumps(claims.identity_of(here, config)) for name, config in configs.items()}
    assert len(set(identities.values())) == len(identities), "no two variants are the same"
    assert {config.seed for config in configs.values()} == {3}
    for name, variant in table.VARIANTS.items():
        assert configs[name].stages == variant.stages
        if variant.stages and not variant.after:
            start = stage_config(configs[name], variant.stages[0]).init_from
            assert start == ("/base" if variant.start is None else str(tmp_path / "runs" / "visor_3" / "full"))
    steps = {name: sum(stage_config(config, s).steps for s in config.stages if s in (*table.ADAPTIVE, "dense"))
             for name, config in configs.items()}  # fmt: skip
    assert steps["visor"] == steps["dense"] == steps["cross"] == steps["dense_packed_4"] == 12
    assert steps["cross_twice"] == 24
    slots = {name: config.model.pattern.count("self") for name, config in configs.items() if name.startswith("slots")}
    assert set(slots.values()) == {1}


def test_every_variant_fits_the_default_job(claims: types.ModuleType, table: types.ModuleType, tmp_path: Path) -> None:
    here = claims.Session(load_config(DEFAULT_JOB), "almanac-base", "b" * 64, tmp_path / "runs", tmp_path)
    configs = {name: claims.configured(here, name, 1) for name in table.VARIANTS}
    assert {stage_config(configs[name], "warmup").init_from for name in ("visor", "cross")} == {"almanac-base"}
    tasks = source_kind(here.config).levels
    assert set(table.WITHOUT_TASKS) <= tasks.keys() and len({tasks[task] for task in table.WITHOUT_TASKS}) == 3
    assert len({architecture(configs[name]).num_slots for name in table.VARIANTS if name.startswith("slots")}) == 3


def test_steps_are_scaled_in_all_stages(claims: types.ModuleType, tmp_path: Path) -> None:
    here = session(claims, tmp_path, steps_scale=0.5)
    assert stage_config(claims.configured(here, "visor", 1), "policy").steps == 2
    assert stage_config(claims.configured(here, "dense", 1), "dense").steps == 6
    longer, samples = session(claims, tmp_path, steps_scale=3.0), here.config.label.samples
    labels = [claims.configured(each, name, 1).label.samples for each, name in
              ((here, "visor"), (longer, "visor"), (longer, "dense"))]  # fmt: skip
    assert labels == [samples, 3 * samples, samples], "only a policy that trains longer needs more labels"
    whole = session(claims, tmp_path)
    assert (here.results, here.folder) == (whole.results / "steps_x0.5", whole.folder)
    assert claims.workdir_of(here, "visor", 1).path != claims.workdir_of(whole, "visor", 1).path


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_a_scale_that_gives_no_steps_is_refused(claims: types.ModuleType, scale: str) -> None:
    with pytest.raises(RequestError, match=r"--steps-scale=.*: expected a finite number above 0"):
        claims.main(["--steps-scale", scale])


def test_a_variant_without_its_option_is_refused(claims: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        claims.main(["dense", "--page"])
    assert "unexpected argument 'dense'; expected --only VARIANT" in capsys.readouterr().err


def test_an_identity_ignores_where_a_run_lies(claims: types.ModuleType, tmp_path: Path) -> None:
    here = session(claims, tmp_path)
    config = claims.configured(here, "visor", 1)
    moved = claims.changed(config, {"stage_overrides.warmup.init_from": "/other", "train.checkpoint_every": 9})
    assert claims.identity_of(here, moved) == claims.identity_of(here, config)
    for fields in ({"evaluate.samples": 9}, {"stage_overrides.full.steps": 9}, {"seed": 9}):
        assert claims.identity_of(here, claims.changed(config, fields)) != claims.identity_of(here, config)


# --- results that are there -------------------------------------------------------------------------------------------


def result(variant: str, seed: int, budgets: dict[str, tuple[float, ...]], identity: Any = None) -> dict[str, Any]:
    """Returns a result whose budgets answer the tasks with these probabilities, 50 questions of each task."""
    rng = np.random.default_rng([seed, len(variant)])
    tasks = [task for task in LEVELS for _ in range(50)]
    right = {name: "".join("01"[int(rng.random() < dict(zip(LEVELS, p, strict=True))[t])] for t in tasks)
             for name, p in budgets.items()}  # fmt: skip
    rows = {name: {"decoder_gflops": COSTS[name], "end_to_end_gflops": 2 * COSTS[name]} for name in budgets}
    return {
        "variant": variant, "seed": seed, "identity": identity or {"base_sha256": "b" * 64, "config": {}},
        "steps": {"warmup": 20, "full": 20, "universal": 20}, "cpu_seconds": {"warmup": 3.0}, "budgets": rows,
        "levels": LEVELS, "dense": {"decoder_gflops": 0.01, "end_to_end_gflops": 0.02},
        "answered": {"ids": [str(i) for i in range(200)], "tasks": tasks, "kinds": ["table"] * 200, "right": right},
        "curve": [["warmup", 10, 0.2], ["warmup", 20, 0.5], ["full", 20, 0.7], ["universal", 20, 0.8]],
    }  # fmt: skip


def write_results(folder: Path, results: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    questions = {"base_sha256": "b" * 64, "counts": [["below", "table"]], "threshold": 0.8, "split": "validation",
                 "seed": 0}  # fmt: skip
    (folder / "questions.json").write_text(json.dumps(questions))
    for one in results:
        (folder / f"{one['variant']}_{one['seed']}.json").write_text(json.dumps(one))


def test_a_result_that_is_there_is_skipped_and_another_ones_refused(claims: types.ModuleType, tmp_path: Path) -> None:
    here = session(claims, tmp_path)
    stored = result("visor", 1, {"full": (1, 1, 1, 1)}, claims.identity_of(here, claims.configured(here, "visor", 1)))
    stored["identity"] = json.loads(json.dumps(stored["identity"]))
    write_results(here.results, [stored])
    assert claims.result_of(here, "visor", 1) == stored
    other = claims.Session(here.config, "/base", "c" * 64, here.runs, here.out)
    with pytest.raises(RequestError, match="made from base bbbbbbbbbbbb, not cccccccccccc"):
        claims.result_of(other, "visor", 1)
    with pytest.raises(RequestError, match="decided from another base"):
        claims.fixed_questions(other)
    longer = claims.changed(here.config, {"stage_overrides.full.steps": 9})
    with pytest.raises(RequestError, match=r"made with another stage_overrides\.full\.steps"):
        claims.result_of(claims.Session(longer, "/base", "b" * 64, here.runs, here.out), "visor", 1)


def test_questions_are_fixed_before_any_result(claims: types.ModuleType, tmp_path: Path) -> None:
    here = session(claims, tmp_path)
    write_results(here.results, [result("visor", 1, {"full": (1, 1, 1, 1)})])
    (here.results / "questions.json").unlink()
    with pytest.raises(RequestError, match="expected the questions to be fixed first"):
        claims.fixed_questions(here)


# --- statistics and page ----------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Any:
    visor = {"empty": (0.99, 0.9, 0.5, 0.3), "0b10": (0.99, 0.9, 0.8, 0.4), "full": (0.99, 0.95, 0.9, 0.5),
             "auto": (0.99, 0.95, 0.9, 0.5)}  # fmt: skip
    made = [result("visor", seed, visor) for seed in (1, 2, 3)]
    for one in made:
        one["dial"] = [
            {"dial": dial, "easy": 0.99, "middle": 0.9, "hard": 0.1 * (dial + one["seed"]), "decoder_gflops": 0.003}
            for dial in (0.0, 2.0)
        ]
        one["budgets"]["full"].update(easy=1.0, middle=0.95, hard=0.5)
    made += [result("dense_packed_4", seed, {"empty": (0.99, 0.9, 0.6, 0.3)}) for seed in (1, 2, 3)]
    for one in made[3:]:
        one["budgets"]["full"], one["answered"]["right"]["full"] = (
            one["budgets"]["empty"],
            one["answered"]["right"]["empty"],
        )
    made += [result("start_zero", 1, {name: visor[name] for name in ("empty", "0b10", "full")})]
    write_results(tmp_path / "results", made)
    return importlib.import_module("claims_statistics").Results(tmp_path / "results")


def test_means_are_over_tasks_and_hard_holds_the_questions_that_count(results: Any) -> None:
    for level, task in (("easy", "paper"), ("hard", "below"), ("other", "cell3"), ("task=title", "title")):
        cell = results.cell("visor", "full", level)
        runs = results.by_variant["visor"].values()
        expected = np.mean([run["answered"]["right"]["full"][50 * list(LEVELS).index(task) :][:50].count("1") / 50
                            for run in runs])  # fmt: skip
        assert cell.mean == pytest.approx(expected) and cell.low <= cell.mean <= cell.high and cell.seeds == (1, 2, 3)
    both = [results.cell("visor", "full", level).mean for level in ("hard", "other", "all hard")]
    assert both[2] == pytest.approx((both[0] + both[1]) / 2), "one task each"
    assert results.cell("visor", "0b01", "hard") is None and results.cell("dense", "full", "hard") is None
    assert results.cell("visor", "one", "hard").mean == results.cell("visor", "0b10", "hard").mean


def test_the_bootstrap_of_one_seed_is_binomial(results: Any) -> None:
    cell = results.cell("start_zero", "empty", "hard")
    low, high = (binom.ppf(p, 50, cell.mean) / 50 for p in (0.025, 0.975))
    assert (cell.low, cell.high) == pytest.approx((low, high), abs=0.03)


def test_differences_resample_both_sides_together(results: Any) -> None:
    full = ("visor", "full")
    same = results.difference(full, full, "hard")
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    less = results.difference(full, ("visor", "empty"), "hard")
    assert 0.2 < less.low < less.mean < less.high < 0.6


def test_differences_are_of_the_seeds_that_both_have(results: Any) -> None:
    full, other = ("visor", "full"), ("start_zero", "full")
    assert results.cell(*full, "hard").seeds != results.cell(*other, "hard").seeds
    both = results.difference(full, other, "hard")
    sides = [results.cell(*side, "hard", both.seeds).mean for side in (full, other)]
    assert both.seeds == results.cell(*other, "hard").seeds and both.mean == pytest.approx(sides[0] - sides[1])
    assert results.difference(full, ("cross_twice", "empty"), "hard") is None, "not run"


def test_longer_runs_are_compared_with_the_dense_model_of_fewer_steps(results: Any, tmp_path: Path) -> None:
    module = importlib.import_module("claims_statistics")
    write_results(tmp_path / "results", [result("dense", seed, {"full": (1, 1, 0.5, 0.5)}) for seed in (1, 2)])
    write_results(tmp_path / "results" / "steps_x9", [result("visor", 1, {"full": (1, 1, 1, 1)})])
    (tmp_path / "results" / "steps_x9" / "questions.json").unlink()
    fewer, longer = (module.Results(tmp_path / "results" / name) for name in ("", "steps_x9"))
    lines = importlib.import_module("claims_page").dense_table(longer, fewer)
    cell = longer.difference(("visor", "full"), ("dense", "full"), "hard", fewer)
    expected = 1 - fewer.cell("dense", "full", "hard", {1}).mean
    assert cell.mean == pytest.approx(expected) and cell.seeds == (1,)
    assert any(line.startswith(f"| visor full | hard | {100 * expected:+.1f} |") for line in lines)


@pytest.mark.parametrize("field", ["ids", "kinds", "digests"])
def test_results_of_other_questions_are_refused(field: str, tmp_path: Path) -> None:
    module = importlib.import_module("claims_statistics")
    first, other = (result(name, 1, {"full": (1, 1, 1, 1)}) for name in ("visor", "dense"))
    first["answered"]["digests"] = [f"{i}" for i in range(200)]
    write_results(tmp_path, [first, other])
    module.Results(tmp_path)  # an earlier version had no digests
    other["answered"][field] = [f"x{i}" for i in range(200)]
    write_results(tmp_path, [first, other])
    with pytest.raises(RequestError, match="other questions than the other results with seed 1"):
        module.Results(tmp_path)
    for folder, one in (("a", first), ("b", other)):
        write_results(tmp_path / folder, [one])
    apart = [module.Results(tmp_path / folder) for folder in ("a", "b")]
    with pytest.raises(RequestError, match="seed 1 has other questions"):
        apart[0].difference(("visor", "full"), ("dense", "full"), "easy", apart[1])


def test_results_of_another_base_are_refused(tmp_path: Path) -> None:
    module = importlib.import_module("claims_statistics")
    first, other = (result(name, 1, {"full": (1, 1, 1, 1)}) for name in ("visor", "dense"))
    other["identity"] = {"base_sha256": "c" * 64, "config": {}}
    write_results(tmp_path, [first, other])
    with pytest.raises(RequestError, match="made from another base"):
        module.Results(tmp_path)


def test_a_mean_curve_joins_the_points_of_a_stage_by_their_order() -> None:
    curves = [[["full", 28, 0.2], ["full", 63, 0.4], ["full", 92, 0.5]], [["warmup", 9, 0.1], ["full", 22, 0.4],
              ["full", 49, 0.6]]]  # fmt: skip
    mean_curve = importlib.import_module("claims_statistics").mean_curve
    points = mean_curve([{"curve": curve} for curve in curves], "full")
    np.testing.assert_allclose(points, [(25, 0.3), (56, 0.5)])


def test_starts_are_compared_on_the_seeds_that_all_have(results: Any) -> None:
    runs = importlib.import_module("claims_page").start_runs(results)
    assert {name: list(of) for name, of in runs.items()} == {"visor": [1], "start_zero": [1]}


def test_steps_say_which_run_a_variant_continues(claims: types.ModuleType) -> None:
    steps, variants = importlib.import_module("claims_page").model_steps, claims.VARIANTS
    assert steps(variants["visor"], {"steps": {"warmup": 250, "universal": 750, "policy": 400}}) == "1,000"
    assert steps(variants["alone_full"], {"steps": {"universal": 750}}) == "750, after visor's full"
    assert steps(variants["router"], {"steps": {"policy": 400}}) == "0, after visor's universal"


def test_the_page_shows_tables_claims_figures_and_what_is_missing(results: Any, tmp_path: Path) -> None:
    longer = [result("visor", 1, {"empty": (1, 1, 0, 1), "full": (1, 1, 1, 1)})]
    longer += [result("dense_packed_4", 1, {"full": (1, 1, 0, 1)})]
    write_results(tmp_path / "results" / "steps_x3", longer)
    (tmp_path / "results" / "steps_x3" / "questions.json").unlink()
    importlib.import_module("claims_page").write(tmp_path / "results", tmp_path / "docs")
    text, more = (tmp_path / "docs" / "claims.md").read_text().split("## 3 times as many steps")
    assert (
        "| VISOR at no more decoder FLOPs beats packed tokens | visor full | dense_packed_4 full | hard | +100" in more
    )
    assert "### VISOR\n" in more and "claims_x3.png" in more
    assert "VISOR minus the dense model" not in more, "dense was not run"
    assert "| hard questions fall without slots | visor full | visor empty | hard | +" in text
    claim = "VISOR at no more decoder FLOPs beats packed tokens"
    assert f"| {claim} | visor empty | dense_packed_4 full | all hard |" in text
    assert "dense (seeds 1, 2, 3)" in more and "start_zero (seeds 2, 3)" in more
    assert "below (table)" in text
    assert "| +2 | 99.0 | 90.0 | 40.0 | 3.00 | 50 % | 3 |" in text
    assert "| full | 100.0 | 95.0 | 50.0 | 6.00 | 100 % | 3 |" in text
    for name in ("claims.png", "claims_x3.png", "claims_start.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| variant")}
    assert widths == {14}


# --- a whole comparison -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_variants_are_trained_measured_and_shown(
    claims: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """One step per stage: another base's numbers mean nothing, but every kind of variant runs and ends in the page."""
    sizes = {"model.vision.tile_size": 96, "model.vision.patch_size": 12}
    data = {"data.source": "almanac", "tokenizer.path": "almanac", "data.visual_length": 72, "data.text_length": 128}
    passes = {"label.samples": 52, "search.samples": 26, "evaluate.samples": 52, "evaluate.control_samples": 26}
    config = tiny_config({**sizes, **data, **passes, "data.independent_turns": True}, steps=1)
    run_stages(config, str(tmp_path / "base"), ["base"])
    (tmp_path / "config.json").write_text(to_json(config))
    names = [
        "base",
        "dense",
        "visor",
        "cross",
        "alone_0b10",
        "slots_3_cross_3",
        "dense_packed_4",
        "router",
        "start_zero",
    ]
    arguments = [f"--config={tmp_path / 'config.json'}", f"--base={tmp_path / 'base' / 'base'}", "--seeds", "1"]
    arguments += ["--config.evaluate.samples=52"]
    arguments += [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path}", "--only", *names]
    assert claims.main(arguments) == 0
    folder = tmp_path / "benchmarks" / "results" / "claims"
    made = {path.stem: json.loads(path.read_text()) for path in folder.glob("*_1.json")}
    assert made.keys() == {f"{name}_1" for name in names}
    assert len({json.dumps(one["answered"]["ids"]) for one in made.values()}) == 1, "all are asked the same"
    assert made["cross_1"]["budgets"].keys() == {"empty"} and made["router_1"]["budgets"].keys() == {"full", "auto"}
    assert (
        made["dense_packed_4_1"]["budgets"]["full"]["decoder_gflops"]
        < made["dense_1"]["budgets"]["full"]["decoder_gflops"]
    )
    assert all({"blind", "shuffled", "intervals", "commit"} <= one.keys() for one in made.values())
    assert "| VISOR | auto |" in (tmp_path / "docs" / "claims.md").read_text()
    monkeypatch.setattr(claims, "trained", None)  # nothing is trained again
    assert claims.main(arguments) == 0
