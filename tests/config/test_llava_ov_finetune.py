"""`configs/llava_ov_finetune.py`: sizes from a checkpoint's files, steps from the number of records, and refusals.

`tests/hf/test_finetune_config.py` trains with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from visor_jax.architecture import Architecture
from visor_jax.config import architecture, load_config, stage_config
from visor_jax.errors import RequestError
from visor_jax.hf.folder import pinpoints_text, read_shape

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = CONFIGS / "llava_ov_finetune.py"
HubFolder = Callable[[str], Path]


def refusal(argument: str | Path) -> str:
    with pytest.raises(RequestError) as caught:
        load_config(f"{FILE}:{argument}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("size", "layers", "slots"), [("0p5b", 24, 8), ("1p5b", 28, 9), ("7b", 28, 9)])
def test_sizes_come_from_the_checkpoint(hub_folder: HubFolder, size: str, layers: int, slots: int) -> None:
    config = load_config(f"{FILE}:{hub_folder(size)}")
    arch, stored = architecture(config), read_shape(hub_folder(size))[1]
    assert (arch.text, arch.vision, arch.anyres) == (stored.text, stored.vision, stored.anyres)
    assert (arch.plan, arch.text.num_layers, arch.num_slots) == ("visor", layers, slots)
    paper = load_config(CONFIGS / f"llava_ov_{size}.py")
    assert (config.data.tiles, config.data.visual_length) == (paper.data.tiles, 8832), "what the largest picture needs"
    assert paper.data.visual_length > 8832  # its rows hold several pictures
    for stage in ("warmup", "full", "universal"):
        rates = {"learning_rate", "group_rates", "schedule", "warmup_fraction", "weight_decay", "b2", "trainable"}
        ours, theirs = stage_config(config, stage), stage_config(paper, stage)
        assert all(getattr(ours, name) == getattr(theirs, name) for name in rates)
    assert config.tokenizer.path == f"{hub_folder(size)}/tokenizer.json"


def test_grids_keep_the_checkpoints_order_and_lengths_follow_its_sizes(hub_folder: HubFolder, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(hub_folder("0p5b"), folder)
    told = json.loads((folder / "config.json").read_text())
    told["image_grid_pinpoints"] = [[768, 384], [384, 768], [384, 384]]
    told["vision_aspect_ratio"] = "anyres_max_4"
    (folder / "config.json").write_text(json.dumps(told))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["image_grid_pinpoints"] = told["image_grid_pinpoints"]
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert pinpoints_text(read_shape(folder)[1]) == "(2x1),(1x2),(1x1)"
    config = load_config(f"{FILE}:{folder}")
    assert architecture(config).anyres.pinpoints == ((768, 384), (384, 768), (384, 384))
    assert config.data.tiles == 3
    assert 3 * 729 + 54 <= config.data.visual_length < 3 * 729 + 54 + 1 + 64, "three maps and their newlines"


@pytest.mark.parametrize(
    ("options", "rows", "warmup", "full", "held_out"),
    [
        ("", 64, 600, 600, 0.02),  # 96,000 records in steps of 160 samples
        (",records=10000", 64, 500, 200, 0.1),
        (",records=700000", 64, 4350, 4350, 2000 / 700_000),
        (",records=100000,devices=2,rows=4", 8, 4800, 4800, 0.02),
        (",devices=3", 24, 1600, 1600, 0.02),
    ],
)
def test_records_and_devices_set_steps_and_rows(
    hub_folder: HubFolder, options: str, rows: int, warmup: int, full: int, held_out: float
) -> None:
    config = load_config(f"{FILE}:{hub_folder('0p5b')}{options}")
    assert config.data.batch_size == rows
    assert stage_config(config, "warmup").steps == warmup
    assert stage_config(config, "full").steps == stage_config(config, "universal").steps == full
    assert config.data.test_fraction == pytest.approx(held_out)
    devices = 2 if "devices=2" in options else 3 if "devices=3" in options else 8
    for batch in (config.evaluate.batch_size, stage_config(config, "policy").batch_size):
        assert batch % devices == 0, "every device has the same number of rows"
    assert config.data.pool_rows * devices == rows


def test_a_large_model_has_fewer_rows_per_device_and_more_steps(hub_folder: HubFolder) -> None:
    config = load_config(f"{FILE}:{hub_folder('7b')}")
    assert (config.data.batch_size, config.data.pool_rows, config.data.pool_tiles) == (32, 4, 64)
    assert stage_config(config, "full").steps == 1200
    assert load_config(f"{FILE}:{hub_folder('7b')},rows=8").data.pool_tiles == 128


def test_a_folder_that_is_not_there_is_named(hub_folder: HubFolder, tmp_path: Path) -> None:
    for argument in (tmp_path / "none", hub_folder("7b") / "config.json", ""):
        told = refusal(argument)
        assert told.startswith(f"--config=configs/llava_ov_finetune.py:{argument}: no such folder; expected")
        assert "hf download" in told


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'}: no such file"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llava_next"}, "config.json: model_type='llava_next': expected 'llava_onevision'"),
        ({"model_type": "llava_qwen"}, "model_type='llava_qwen': expected 'llava_onevision'"),
        ({"model_type": "visor"}, "model_type='visor': expected 'llava_onevision'; this model is adaptive already"),
        ({"model_type": None}, "config.json: model_type=None: expected"),
        ({"text_config": {"model_type": "llama"}}, "config.json: text_config.model_type='llama': expected 'qwen2'"),
    ],
)
def test_another_kind_of_model_is_refused(
    hub_folder: HubFolder, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(hub_folder("0p5b"), folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    assert told in refusal(folder)


@pytest.mark.parametrize("option", ["record=3", "records=0", "records=-1", "records", "records=1e5", "rows=", ""])
def test_an_option_that_is_wrong_is_named(hub_folder: HubFolder, option: str) -> None:
    told = refusal(f"{hub_folder('0p5b')},{option}")
    assert f": {option!r}: expected records=N, devices=N or rows=N" in told


def test_without_an_argument_the_message_says_how_to_give_one() -> None:
    with pytest.raises(RequestError, match="takes an argument, given as FILE:ARGUMENT"):
        load_config(FILE)


def test_a_picture_of_any_size_fits_into_a_row(hub_folder: HubFolder) -> None:
    from visor_jax.data import anyres

    config = load_config(f"{FILE}:{hub_folder('0p5b')}")
    arch: Architecture = architecture(config)
    sizes = [(height, width) for height in range(50, 3000, 190) for width in range(50, 3000, 190)]
    assert max(anyres.visual_token_count(size, arch) for size in sizes) <= config.data.visual_length
    assert max(anyres.tile_count(size, arch) for size in sizes) <= config.data.tiles
