r"""Your own records: fine-tunes a LLaVA-OneVision of the hub and makes it adaptive. Sizes come from its config.json.

Reproduces: no table of the paper; its stages (arXiv 2603.23495) at the size of your data, 10,000 to 700,000 records.
Never run to the end by us: it needs accelerators. Tests run every line of it on a small checkpoint of the same format:
import, training, an interruption and its continuation. docs/finetune.md explains the choices and what to watch.

    C="--config=configs/llava_ov_finetune.py:HF_DIR,records=120000,devices=8"
    D="--config.data.root=DATA --config.data.path=train.json"
    visor data check $C $D
    visor import --from=HF_DIR --workdir=DIR $C $D
    visor run --config=configs/llava_ov_finetune.py:HF_DIR,records=120000,devices=8 --workdir=DIR $D

HF_DIR is a local copy of llava-hf/llava-onevision-qwen2-0.5b-ov-hf (or 7b, or a 1.5B of the same format), which `hf
download` makes. `import` writes its weights into the workdir as the stage `base`. `run` goes on from there through all
stages, then evaluates, reports and exports; after an interruption the same command continues. `visor train
--config.stage=warmup` runs one stage.

After the colon, separated by commas:

    HF_DIR       the checkpoint's folder
    records=N    records of your data set (100,000): sets the steps of every stage
    devices=N    accelerators that train together (8): sets the rows of a step
    rows=N       rows per device (8, and 4 for 7B): fewer need less memory, see docs/finetune.md

Records in LLaVA's JSON are expected; `--config.data.source=parquet`, `messages`, `tfds` or `array_record` reads others,
and `--config.data.mixture=FILE.yaml` instead of `data.path` mixes several files.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from visor_jax.architecture import Architecture
from visor_jax.config import default_config
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path
from visor_jax.hf.folder import pinpoints_text, read_shape

SAMPLES_PER_ROW = 2.5  # of LLaVA-OneVision's mixture in rows of 8,832 visual positions (benchmarks/packing.py)
TILES_PER_ROW = 16  # likewise, on average; a single sample has up to 37
HELD_OUT = 2000  # records for validation, and as many for the test


def get_config(argument: str) -> ConfigDict:
    """Returns the recipe for a checkpoint and a number of records.

    Args:
      argument: "HF_DIR", optionally with ",records=N,devices=N,rows=N".

    Raises:
      RequestError: the folder holds no LLaVA-OneVision, or an option is wrong.
    """
    hf_dir, options = read_argument(argument)
    arch = read_model(hf_dir)
    records, devices = options["records"], options["devices"]
    rows = options["rows"] or (8 if arch.text.hidden_size < 2048 else 4)

    config = default_config()
    config.name = "llava_ov_finetune"
    config.stages = ("warmup", "full", "search", "universal", "label", "policy")  # the imported model is `base`

    # --- model: the checkpoint's sizes, and new layers ----------------------------------------------------------------
    config.model.dtype = "bfloat16"  # of activations; parameters and optimizer stay float32
    config.model.text.update(dataclasses.asdict(arch.text))
    config.model.vision.update(dataclasses.asdict(arch.vision))
    config.model.anyres.update(
        pinpoints=pinpoints_text(arch),
        max_tiles=arch.anyres.max_tiles,
        image_mean=arch.anyres.image_mean,
        image_std=arch.anyres.image_std,
    )
    config.model.policy.hidden_size = 512
    config.tokenizer.path = f"{hf_dir}/tokenizer.json"

    # --- data: several samples per row, and one pool of tiles per device ----------------------------------------------
    tiles = 1 + max((height * width for height, width in grids(arch)), default=0)  # the whole picture, and its crops
    held_out = min(0.1, HELD_OUT / records)
    config.data.update(
        source="llava",
        root="data",
        path="",  # given by an override; or data.mixture
        test_fraction=held_out,
        batch_size=rows * devices,
        tiles=tiles,
        visual_length=largest_sample(arch),
        text_length=4096,  # 1,024 would be full before the visual positions are
        pack_window=64,
        pool_rows=rows,
        pool_tiles=max(tiles, TILES_PER_ROW * rows),
        workers=4,  # processes per device; 0 on a machine with few cores
    )
    config.mesh.update(replica=1, fsdp=-1, tensor=1)  # every device holds a part of parameters and optimizer

    # --- training: the rates of docs/method.md, the steps of your records ---------------------------------------------
    config.train.update(
        learning_rate=1e-5,
        group_rates=(("vision/", 0.2),),
        weight_decay=0.0,
        b2=0.999,
        clip_norm=1.0,
        warmup_fraction=0.03,
        remat="full",
        # A preempted machine that gets SIGTERM saves immediately; these saves are for machines that get none.
        checkpoint_every=100,
        keep=2,
    )
    epoch = math.ceil(records * (1 - 2 * held_out) / (SAMPLES_PER_ROW * rows * devices))
    # Only the new layers train in warmup, so small data sets may be seen several times.
    config.stage_overrides.warmup.update(steps=max(epoch, 500), learning_rate=1e-3)
    config.stage_overrides.full.update(steps=max(epoch, 200))
    config.stage_overrides.universal.update(steps=max(epoch, 200))

    # --- search, labels, policy, evaluation: one question per row -----------------------------------------------------
    config.search.samples = min(1024, math.ceil(held_out * records))
    config.label.samples = min(20_000, records)
    labels_per_step = multiple(64, devices)
    config.stage_overrides.policy.update(
        steps=max(3 * config.label.samples // labels_per_step, 200), batch_size=labels_per_step, learning_rate=1e-3
    )
    config.evaluate.update(samples=HELD_OUT, batch_size=multiple(16, devices))
    return config


def read_argument(argument: str) -> tuple[str, dict[str, int]]:
    """Splits "HF_DIR,records=120000,devices=8" into the folder and the options."""
    hf_dir, *settings = argument.split(",")
    options = {"records": 100_000, "devices": 8, "rows": 0}
    for setting in settings:
        name, _, number = setting.partition("=")
        if name not in options or not number.isdecimal() or int(number) < 1:
            raise RequestError(
                f"--config=configs/llava_ov_finetune.py:{argument}: {setting!r}: expected records=N, devices=N or"
                " rows=N with a whole number of at least 1"
            )
        options[name] = int(number)
    return hf_dir.rstrip("/"), options


def read_model(hf_dir: str) -> Architecture:
    """Returns the architecture in HF_DIR/config.json, after checking that it is a dense LLaVA-OneVision."""
    if not hf_dir or not as_path(hf_dir).is_dir():
        raise RequestError(
            f"--config=configs/llava_ov_finetune.py:{hf_dir}: no such folder; expected that of a checkpoint, such as"
            " `hf download llava-hf/llava-onevision-qwen2-0.5b-ov-hf --local-dir=HF_DIR` makes"
        )
    _, arch = read_shape(hf_dir)
    if arch.plan != "dense":
        raise RequestError(
            f"{hf_dir}/config.json: model_type='visor': expected 'llava_onevision'; this model is adaptive already:"
            " continue from it with configs/forkme.py and its own sizes"
        )
    return arch


def grids(arch: Architecture) -> list[tuple[int, int]]:
    """Returns (rows, columns) of tiles of every pinpoint."""
    tile = arch.vision.tile_size
    return [(height // tile, width // tile) for height, width in arch.anyres.pinpoints]


def largest_sample(arch: Architecture) -> int:
    """Returns a row's visual positions: as many as the largest picture needs, rounded up to 64. 8,832 for the hub's."""
    side, patches = arch.vision.patches_per_side, arch.vision.patches_per_tile
    crops = max((height * width for height, width in grids(arch)), default=0) * patches
    crops = min(crops, int(1.1**2 * arch.anyres.max_tiles * patches))  # above that they are shrunk
    newlines = side * max((height for height, _ in grids(arch)), default=0)
    return multiple(patches + crops + newlines + 1, 64)


def multiple(number: int, factor: int) -> int:
    """Returns the smallest multiple of `factor` that is at least `number`."""
    return factor * math.ceil(number / factor)
