"""The configurations of almanac: what they train, and that a few of their steps run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from visor_jax.__main__ import main
from visor_jax.config import architecture, load_config, stage_config
from visor_jax.config.schema import BASE_STAGES, TRAINED_STAGES
from visor_jax.data.from_config import stage_parts, stage_phases
from visor_jax.data.sources import check_source
from visor_jax.hf.model import differences
from visor_jax.model.visor import abstract_params
from visor_jax.tree import flatten

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE, MINI = CONFIGS / "almanac_base.py", CONFIGS / "almanac_mini.py"


def num_parameters(config_file: Path, stage: str) -> int:
    return sum(
        math.prod(x.shape) for x in flatten(abstract_params(architecture(load_config(config_file), stage))).values()
    )


def test_the_base_is_dense_and_asks_every_part_in_some_stage() -> None:
    config = load_config(BASE)
    check_source(config)
    assert config.stages == BASE_STAGES and architecture(config).plan == "dense"
    assert 0.6e6 < num_parameters(BASE, "base_pages") < 0.8e6
    asked: set[str] = set()
    for stage in config.stages:
        settings, parts = stage_config(config, stage), stage_parts(config, stage)
        phases = stage_phases(config, stage, parts)
        assert phases[0].start == 0 and phases[-1].start < settings.steps * settings.batch_size
        assert settings.objective == "answer" and settings.budgets == "full"
        asked |= {part.path for phase in phases for part, weight in zip(parts, phase.weights, strict=True) if weight}
    assert asked == {path for _, path, _, _ in config.data.parts}
    starts = [stage_config(config, stage).init_from for stage in config.stages]
    assert starts == ["", *BASE_STAGES[:-1]]


def test_the_default_job_starts_from_a_model_of_the_base_shape() -> None:
    base, mini = load_config(BASE), load_config(MINI)
    check_source(mini)
    assert differences(architecture(base, "base_pages"), architecture(mini)) == []
    assert stage_config(mini, "warmup").init_from == "almanac-base"
    assert stage_config(load_config(f"{MINI}:/some/folder"), "warmup").init_from == "/some/folder"
    assert stage_config(mini, "warmup").trainable == ("blocks/cross_attention/",)


@pytest.mark.slow
def test_a_few_steps_of_the_base_and_of_the_default_job_run(tmp_path: Path) -> None:
    """Every stage, search, labels, policy, evaluation, report and export, from random weights on."""
    steps = [f"--config.stage_overrides.{stage}.steps=2" for stage in TRAINED_STAGES]
    small = ["--config.data.batch_size=4", "--config.evaluate.samples=16", "--config.evaluate.batch_size=8"]
    folder = tmp_path / "base"
    every = ["--config.train.validate_every=2", "--config.train.validate_samples=4"]
    assert main(["run", f"--config={BASE}", f"--workdir={folder}", *steps, *small, *every]) == 0
    few = ["--config.search.samples=8", "--config.label.samples=8", "--config.label.only_right=false"]
    run = ["run", f"--config={MINI}:{folder / 'export'}", f"--workdir={tmp_path / 'mini'}"]
    assert main([*run, *steps, *small, *few]) == 0
    assert (tmp_path / "mini" / "policy" / "complete.json").exists()
