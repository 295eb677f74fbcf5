"""Configurations: the files in configs/, stages' settings, JSON, and loading without JAX."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.overrides import changed
from visor_jax.config import (
    architecture,
    default_config,
    from_dict,
    from_json,
    load_config,
    stage_config,
    to_json,
    validate,
)
from visor_jax.config.schema import SCHEMA, TRAINED_STAGES, field_of
from visor_jax.errors import RequestError
from visor_jax.workdir.provenance import is_free

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


# --- the files in configs/ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_described(path, shipped):
    config = load_config(shipped(path))
    assert config.name == path.stem
    text = path.read_text()
    assert "Reproduces" in text
    assert "visor run --config=" in text
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("name", "layers", "slots", "parameters"),
    [("llava_ov_0p5b", 24, 8, 0.5e9), ("llava_ov_1p5b", 28, 9, 1.5e9), ("llava_ov_7b", 28, 9, 7.6e9)],
)
def test_real_sizes(name, layers, slots, parameters):
    arch = architecture(load_config(ROOT / "configs" / f"{name}.py"))
    text = arch.text
    assert (text.num_layers, arch.num_slots) == (layers, slots)
    assert arch.vision.patches_per_side == 27
    assert arch.anyres.pinpoints[0] == (384, 384)
    assert arch.anyres.pinpoints[1] == (384, 768)
    assert len(arch.anyres.pinpoints) == 36
    heads = 2 * text.num_heads * text.head_dim + 2 * text.num_kv_heads * text.head_dim
    layer = text.hidden_size * (heads + 3 * text.intermediate_size)
    tables = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    assert math.isclose(text.num_layers * layer + tables, parameters, rel_tol=0.05)


def test_the_argument_after_the_colon_reaches_get_config():
    config = load_config(f"{ROOT / 'configs' / 'forkme.py'}:runs/other")
    assert config.stage_overrides.full.init_from == "runs/other/universal"


def test_a_model_takes_its_vocabulary_from_the_tokenizer(tmp_path):
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 6, "content": "<image>"}]}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tokens))
    assert architecture(changed(f"tokenizer.path={file}")).text.vocab_size == 7
    assert architecture(changed(f"tokenizer.path={file}", "model.text.vocab_size=99")).text.vocab_size == 99
    assert architecture(changed()).text.vocab_size > 100


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ((), 2 * 64 + 2048),  # longer than the rows; two pictures of one tile of 8 x 8 patches
        (("model.anyres.pinpoints=(1x1),(1x2)", "data.tiles=3"), 2 * 10 * 64 + 2048),
        (("data.visual_length=600", "data.text_length=400"), 4000),
        (("data.visual_length=9000",), 32_768),
        (("data.visual_length=9000", "model.text.max_positions=77"), 77),
    ],
)
def test_a_prompt_may_be_a_few_times_as_long_as_what_was_trained_on(overrides, most):
    assert architecture(changed(*overrides)).text.max_positions == most


@pytest.mark.parametrize("content", [None, "", "[]", '{"model": {"vocab": {}}}', '{"model": 3}'])
def test_a_bad_tokenizer_file_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RequestError, match=r"tokenizer\.path='.*tokenizer\.json'"):
        architecture(changed(f"tokenizer.path={file}"))


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_s_settings_are_the_defaults_with_its_own():
    config = changed("train.steps=7", "stage_overrides.full.steps=9", "stage_overrides.full.batch_size=3")
    assert stage_config(config, "warmup").steps == 7
    assert stage_config(config, "full").steps == 9
    assert stage_config(config, "full").batch_size == 3
    assert stage_config(config, "warmup").batch_size == config.data.batch_size
    assert stage_config(config, "policy").objective == "policy"
    assert config.train.steps == 7


def test_every_stage_but_the_first_starts_from_one_before_it():
    config = changed()
    chain = [stage_config(config, stage).init_from for stage in ("base", "warmup", "full", "universal", "policy")]
    assert chain == ["", "base", "warmup", "full", "universal"]


def test_a_start_that_is_a_path_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    config = changed("stage_overrides.full.init_from=runs/a/universal", "stage_overrides.warmup.init_from=gs://b/full")
    assert stage_config(config, "full").init_from == str(tmp_path / "runs/a/universal")
    at_home = changed("stage_overrides.full.init_from=~/a/universal")
    assert stage_config(at_home, "full").init_from == "/somewhere/a/universal"
    assert stage_config(config, "warmup").init_from == "gs://b/full"


@pytest.mark.parametrize(("stage", "expected"), [("search", "trains nothing"), ("ful", "did you mean 'full'")])
def test_stages_without_settings(stage, expected):
    with pytest.raises(RequestError, match=expected):
        stage_config(changed(), stage)


def test_stage_overrides_know_every_training_field():
    for stage in TRAINED_STAGES:
        assert field_of(f"stage_overrides.{stage}.steps") is SCHEMA["train.steps"]
    assert field_of("stage_overrides.search.steps") is None
    assert field_of("stage_overrides.full.train.steps") is None


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_round_trip_keeps_types():
    config = changed("train.group_rates=(('vision/', 0.2),)", "stages=warmup,full")
    again = from_json(to_json(config))
    assert again == config
    assert again.train.group_rates == (("vision/", 0.2),)
    assert again.stages == ("warmup", "full")
    assert isinstance(again.train.learning_rate, float)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 1}', '{"a.b": 1}', '{"train": {"steps": NaN}}', "[" * 100_000])
def test_json_that_is_no_configuration(text):
    with pytest.raises(RequestError) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


def test_from_dict_refuses_what_is_no_object():
    with pytest.raises(RequestError, match="expected a JSON object"):
        from_dict(json.loads("[]"))


def test_loading_imports_neither_jax_nor_the_model(shipped):
    code = (
        "import sys; from visor_jax.config import load_config, architecture;"
        f"load_config({str(ROOT / 'configs' / 'llava_ov_0p5b.py')!r});"
        f"load_config({shipped(ROOT / 'configs' / 'llava_ov_finetune.py')!r});"
        "print([m for m in ('jax', 'flax', 'torch', 'numpy', 'tensorflow') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(("earlier", "now"), [(True, "full"), (False, "none"), ("attention", "attention")])
def test_booleans_of_earlier_versions_name_a_policy(earlier: object, now: str) -> None:
    """In a workdir's record, for all stages and for one, and in a file that `get_config` is read from."""
    read = from_dict({"train": {"remat": earlier}, "stage_overrides": {"full": {"remat": earlier}}})
    assert read.train.remat == stage_config(read, "full").remat == now
    config = default_config()
    config.train.remat = earlier
    assert validate(config).train.remat == now
    with pytest.raises(RequestError, match=r"train.remat=1: expected text"):
        from_dict({"train": {"remat": 1}})


def test_what_only_changes_memory_may_differ_in_a_workdir() -> None:
    assert all(map(is_free, ("train.accumulate", "stage_overrides.full.remat", "mesh.dcn_fsdp", "mesh.max_unsharded")))
    assert not any(map(is_free, ("train.moments_dtype", "train.ema_decay", "train.use_ema")))
