"""The configurations of almanac: what they train, and that a few of their steps run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from visor_jax.__main__ import main
from visor_jax.config import Config, apply_overrides, architecture, load_config, stage_config
from visor_jax.config.schema import BASE_STAGES, TRAINED_STAGES
from visor_jax.data.from_config import (
    make_tokenizer,
    sample_encoder,
    stage_parts,
    stage_phases,
    training_row_shape,
)
from visor_jax.data.sources import check_source
from visor_jax.errors import RequestError
from visor_jax.hf.model import differences
from visor_jax.model.visor import abstract_params
from visor_jax.tree import flatten

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE, MINI, LARGE = (CONFIGS / f"almanac_{name}.py" for name in ("base", "mini", "large"))


def num_parameters(config_file: Path, stage: str) -> int:
    return sum(
        math.prod(x.shape) for x in flatten(abstract_params(architecture(load_config(config_file), stage))).values()
    )


def asked_parts(config: Config) -> set[str]:
    """Returns the parts that some stage asks, after checks of every stage."""
    asked: set[str] = set()
    for stage in config.stages:
        settings, parts = stage_config(config, stage), stage_parts(config, stage)
        phases = stage_phases(config, stage, parts)
        assert phases[0].start == 0 and phases[-1].start < settings.steps * settings.batch_size
        assert settings.objective == "answer" and settings.budgets == "full"
        asked |= {part.path for phase in phases for part, weight in zip(parts, phase.weights, strict=True) if weight}
    return asked


def test_the_base_is_dense_and_its_two_rounds_ask_every_part() -> None:
    first, second = load_config(BASE), load_config(f"{BASE}:/some/base")
    for config, stages, start in ((first, BASE_STAGES, ""), (second, BASE_STAGES[1:], "/some/base")):
        check_source(config)
        assert config.stages == stages and architecture(config).plan == "dense"
        assert [stage_config(config, stage).init_from for stage in stages] == [start, *stages[:-1]]
    assert 0.6e6 < num_parameters(BASE, "base_pages") < 0.8e6
    assert differences(architecture(first, "base_pages"), architecture(second, "base_pages")) == []
    assert asked_parts(first) | asked_parts(second) == {path for _, path, _, _ in first.data.parts}
    assert first.data.parts == second.data.parts


def test_the_default_job_starts_from_a_model_of_the_base_shape() -> None:
    base, mini = load_config(BASE), load_config(MINI)
    check_source(mini)
    assert differences(architecture(base, "base_pages"), architecture(mini)) == []
    assert stage_config(mini, "warmup").init_from == "almanac-base"
    assert stage_config(load_config(f"{MINI}:/some/folder"), "warmup").init_from == "/some/folder"
    assert stage_config(mini, "warmup").trainable == ("blocks/cross_attention/",)


def test_the_large_model_reads_pages_of_480_pixels_by_tiles() -> None:
    config = load_config(LARGE)
    check_source(config)
    assert 20e6 < num_parameters(LARGE, "base_pages") < num_parameters(LARGE, "full") < 30e6
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    sizes = {part.path: encode(part.source[0]).size for part in stage_parts(config, "base_pages")}
    assert (sizes["pages_480"].tiles, sizes["pages_480"].visual) == (5, 2040)
    assert sizes["crops"].tiles == 1, "small pictures keep their size"
    with pytest.raises(
        RequestError, match=r"draws pictures of 480 x 480 pixels; expected a tile of at least 480 pixels"
    ):
        check_source(apply_overrides(config, ["model.anyres.pinpoints="]))


@pytest.mark.slow
def test_a_step_of_the_large_model_runs(tmp_path: Path) -> None:
    """The dense stage on pages from random weights, then all layers of the adaptive model."""
    small = ["batch_size=1", "workers=0", "text_length=256", "turns_per_picture=2"]
    run = [f"--config={LARGE}", f"--workdir={tmp_path}", *(f"--config.data.{field}" for field in small)]
    run += ["--config.stage_overrides.base_pages.init_from=", "--config.stage_overrides.full.init_from=base_pages"]
    for stage in ("base_pages", "full"):
        run += [f"--config.stage_overrides.{stage}.steps=1"]
    for stage in ("base_pages", "full"):
        assert main(["train", *run, f"--config.stage={stage}"]) == 0


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
