"""Checks rules that span several fields of a configuration, before anything is compiled.

No JAX import. The input is a configuration whose single fields already fit the schema. Each check raises a
`RequestError` that names the fields, both values and the remedy. Rules that need the devices or the data (a mesh that
covers all devices, an exercise that exists) are checked where these are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from visor_jax.architecture import MESH_AXES, LayerKind, ReductionArchitecture
from visor_jax.budget import MAX_SLOTS, Plan
from visor_jax.config.model_fields import ModelConfig
from visor_jax.config.reduction_checks import check_dropping, check_reduction
from visor_jax.config.rules import parse_grids
from visor_jax.config.schema import DENSE_STAGES, STAGES, TRAINED_STAGES, Config
from visor_jax.config.shipped import SHIPPED
from visor_jax.config.train_fields import TrainConfig
from visor_jax.errors import RequestError, nearest


def check_together(config: Config, stages: Iterable[tuple[str, TrainConfig]]) -> None:
    """Checks every rule that spans fields.

    Args:
      config: all fields are present and fit the schema.
      stages: (stage, its merged training settings) of every stage that trains.

    Raises:
      RequestError: names the first fields that do not fit together.
    """
    _check_model(config.model)
    check_reduction(config)
    check_dropping(config)
    _check_row_shape(config)
    _check_data(config)
    _check_packing(config)
    _check_plan(config)
    _check_search(config)
    _check_mesh(config)
    for stage, settings in stages:
        _check_stage(config, stage, settings)


def _check_model(model: ModelConfig) -> None:
    text, vision, cross = model.text, model.vision, model.cross
    _divides("model.text.num_kv_heads", text.num_kv_heads, "model.text.num_heads", text.num_heads)
    if cross.num_kv_heads:
        _divides("model.cross.num_kv_heads", cross.num_kv_heads, "model.text.num_heads", text.num_heads)
    if 0 < cross.num_kv_heads < text.num_kv_heads and cross.init == "copy":
        raise RequestError(
            f"model.cross.num_kv_heads={cross.num_kv_heads}: expected at least {text.num_kv_heads}, the heads that"
            " model.cross.init='copy' copies, or init='zero'"
        )
    if text.head_dim % 2:
        raise RequestError(f"model.text.head_dim={text.head_dim}: expected an even number: pairs are rotated")
    _divides("model.vision.num_heads", vision.num_heads, "model.vision.hidden_size", vision.hidden_size)
    if vision.position_init == "sines" and vision.hidden_size % 4:
        raise RequestError(
            f"model.vision.hidden_size={vision.hidden_size}: expected a multiple of 4: sines and cosines of rows and"
            " columns (model.vision.position_init='sines')"
        )
    if vision.patch_size > vision.tile_size:
        raise RequestError(
            f"model.vision.patch_size={vision.patch_size}: expected at most model.vision.tile_size={vision.tile_size}"
        )
    if cross.kernel_size % 2 == 0:
        raise RequestError(f"model.cross.kernel_size={cross.kernel_size}: expected an odd number")
    _check_pattern(model)


def _check_pattern(model: ModelConfig) -> None:
    """Checks that the layers hold the pattern at least once and that the policy has an output per slot count."""
    pattern, head, layers = model.pattern, model.head_layers, model.text.num_layers
    kinds = [kind.value for kind in LayerKind]
    for kind in pattern:
        if kind not in kinds:
            hint = nearest(kind, kinds)
            raise RequestError(
                f"model.pattern={pattern}: {kind!r} is not a layer kind; expected 'text', 'cross' or 'self'"
                + (f"; {hint}" if hint else "")
            )
    for kind, layer in ((LayerKind.CROSS, "cross-attention"), (LayerKind.SELF, "optional self-attention")):
        if kind not in pattern:
            raise RequestError(f"model.pattern={pattern}: expected at least one {kind.value!r} ({layer}) layer")
    if head > layers:
        raise RequestError(f"model.head_layers={head}: expected at most model.text.num_layers={layers}")
    if model.plan == "dense":
        return
    slots = len(Plan.visor(layers, pattern, head).slots)
    if layers < head + len(pattern):
        raise RequestError(
            f"model.text.num_layers={layers}: expected at least {head + len(pattern)} with model.plan='visor':"
            f" model.head_layers={head} plus the {len(pattern)} layers of model.pattern"
        )
    if slots > MAX_SLOTS:
        raise RequestError(
            f"model.pattern={pattern}: gives {slots} slots with model.text.num_layers={layers}; expected at most"
            f" {MAX_SLOTS}: use fewer 'self' or fewer layers"
        )
    if model.policy.max_budgets < slots + 1:
        raise RequestError(
            f"model.policy.max_budgets={model.policy.max_budgets}: expected at least {slots + 1}, one budget for"
            f" each number of slots from 0 to {slots} (model.text.num_layers={layers})"
        )


def _check_search(config: Config) -> None:
    """Checks that `search.slots` are different slots of the plan."""
    chosen, model = config.search.slots, config.model
    if not chosen:
        return
    slots = len(Plan.visor(model.text.num_layers, model.pattern, model.head_layers).slots)
    if len(set(chosen)) < len(chosen) or not all(0 <= slot < slots for slot in chosen):
        raise RequestError(
            f"search.slots={chosen}: expected different numbers from 0 to {slots - 1}, slots of model.pattern in"
            f" model.text.num_layers={model.text.num_layers} layers"
        )


def _check_row_shape(config: Config) -> None:
    vision, packing = config.model.vision, config.model.anyres.packing
    reduction = ReductionArchitecture(**vars(config.model.reduction))
    side = vision.tile_size // vision.patch_size // reduction.stride
    tokens = -(-side // (2 if packing == 4 else 1)) * -(-side // min(packing, 2))
    tokens = reduction.kept(tokens) if reduction.selects else tokens
    if config.data.visual_length < tokens + 1:
        packed = f", packed by {packing}," if packing > 1 else ""
        packed = f", reduced by {reduction.method}," if reduction.method != "none" else packed
        raise RequestError(
            f"data.visual_length={config.data.visual_length}: expected at least {tokens + 1}, the visual tokens of one"
            f" tile of {vision.tile_size} pixels in patches of {vision.patch_size}{packed} and a newline"
        )
    max_cells = max((rows * columns for rows, columns in parse_grids(config.model.anyres.pinpoints)), default=0)
    if max_cells and config.data.tiles < 2:
        raise RequestError(
            f"data.tiles={config.data.tiles}: expected 2 (the whole picture and its smallest grid) to {max_cells + 1}"
            f" (its largest grid), because model.anyres.pinpoints={config.model.anyres.pinpoints!r} cuts pictures"
        )


def _check_data(config: Config) -> None:
    data = config.data
    given = [name for name in ("path", "mixture", "parts") if getattr(data, name)]
    if len(given) > 1:
        raise RequestError(
            f"data.{given[0]} and data.{given[1]}: expected one of data.path, data.mixture and data.parts; empty the"
            f" other, as in --config.data.{given[0]}="
        )
    paths = [path for _, path, _, _ in data.parts]
    if data.question_part and paths.count(data.question_part) != 1:
        hint = nearest(data.question_part, paths)
        raise RequestError(
            f"data.question_part={data.question_part!r}: expected '' or the path of one part"
            f" ({', '.join(paths) or 'data.parts is empty'})" + (f"; {hint}" if hint else "")
        )
    if data.independent_turns and config.loss.targets != "answer":
        raise RequestError(
            f"loss.targets={config.loss.targets!r}: data.independent_turns=True trains on the answers only; expected"
            " 'answer', or data.independent_turns=False"
        )
    if data.sampling != "all" and given != ["path"]:
        raise RequestError(
            f"data.sampling={data.sampling!r}: chooses records of data.path; expected 'all', or in a mixture the"
            " strategy of each entry"
        )


def _check_packing(config: Config) -> None:
    data = config.data
    if not data.pack_window:
        for name, value, unused in (("pool_rows", data.pool_rows, 1), ("pool_tiles", data.pool_tiles, 0)):
            if value != unused:
                raise RequestError(
                    f"data.{name}={value}: has no effect while data.pack_window=0 gives each sample a row; set"
                    f" data.pack_window (64 is common), or leave data.{name} at {unused}"
                )
    elif data.pool_tiles < data.tiles:
        raise RequestError(
            f"data.pool_tiles={data.pool_tiles}: expected at least data.tiles={data.tiles}, the tiles of the"
            f" largest sample (about the mean number of tiles per row times data.pool_rows={data.pool_rows} wastes"
            " least)"
        )
    elif data.batch_size % data.pool_rows:
        raise RequestError(f"data.batch_size={data.batch_size}: expected a multiple of data.pool_rows={data.pool_rows}")


def _check_plan(config: Config) -> None:
    """Checks that the stages fit the plan.

    A dense plan trains only `DENSE_STAGES`, the stage 'dense' only a dense plan, and the policy needs a
    layer before the first slot.
    """
    for name, stages in (("stage", (config.stage,) if config.stage else ()), ("stages", config.stages)):
        for stage in stages:
            if config.model.plan == "dense" and stage not in DENSE_STAGES:
                raise RequestError(
                    f"{name}: {stage!r} needs model.plan='visor', and model.plan is 'dense'; expected only"
                    f" {', '.join(map(repr, DENSE_STAGES))}"
                )
            if config.model.plan == "visor" and stage == "dense":
                raise RequestError(f"{name}: 'dense' needs model.plan='dense', and model.plan is 'visor'")
    model = config.model
    if model.plan == "visor" and "policy" in {config.stage, *config.stages}:
        slots = Plan.visor(model.text.num_layers, model.pattern, model.head_layers).slots
        if slots[0] == 0:
            raise RequestError(
                f"model.pattern={model.pattern}: the stage 'policy' reads the question in the layers before the first"
                " slot, and there is none; expected a layer before the first 'self', model.head_layers of at least 1,"
                " or no 'policy'"
            )


def _check_mesh(config: Config) -> None:
    mesh = config.mesh
    sizes = {name: getattr(mesh, name) for name in MESH_AXES}
    if list(sizes.values()).count(-1) > 1:
        settings = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise RequestError(f"{settings}: expected -1 (all remaining devices) at most once")
    if (mesh.dcn_replica, mesh.dcn_fsdp) == (-1, -1):
        raise RequestError("mesh.dcn_replica=-1, mesh.dcn_fsdp=-1: expected -1 (all remaining slices) at most once")
    if mesh.tensor > 0:
        _divides("mesh.tensor", mesh.tensor, "model.text.num_heads", config.model.text.num_heads)
    _check_rows(config, "data.batch_size", config.data.batch_size)
    _check_rows(config, "evaluate.batch_size", config.evaluate.batch_size)


def _check_rows(config: Config, name: str, rows: int, pool_rows: int = 1, parts: int = 1) -> None:
    """Checks that rows divide over replicas and FSDP shards; a size of -1 counts as 1 until the devices are known."""
    mesh = config.mesh
    sizes = {field: getattr(mesh, field) for field in ("replica", "fsdp", "dcn_replica", "dcn_fsdp")}
    ways = math.prod(max(size, 1) for size in sizes.values())
    if rows % (ways * pool_rows * parts):
        pools = f", in pools of data.pool_rows={pool_rows}" if pool_rows > 1 else ""
        parts_text = f", and train.accumulate={parts} splits them once more" if parts > 1 else ""
        settings = ", ".join(f"mesh.{field}={n}" for field, n in sizes.items() if n != 1 or not field.startswith("dcn"))
        raise RequestError(
            f"{name}={rows}: expected a multiple of {ways * pool_rows * parts}, because {settings} split the"
            f" rows{pools}{parts_text}"
        )


def _check_average(config: Config, stage: str, settings: TrainConfig) -> None:
    """Checks that the average that is to be used is kept."""
    if settings.use_ema and not settings.ema_decay:
        raise RequestError(
            f"{_origin(config, stage, 'use_ema')}=True: there is no average while train.ema_decay=0; set it"
            " (0.999 is common), or use_ema=False"
        )


def _check_stage(config: Config, stage: str, settings: TrainConfig) -> None:
    name, data = _origin(config, stage, "batch_size"), config.data
    if data.pack_window and settings.objective == "answer":
        if settings.batch_size % data.pool_rows:
            raise RequestError(f"{name}={settings.batch_size}: expected a multiple of data.pool_rows={data.pool_rows}")
        _check_rows(config, name, settings.batch_size, data.pool_rows, settings.accumulate)
    _check_rows(config, name, settings.batch_size, parts=settings.accumulate)
    _check_average(config, stage, settings)
    runs = stage == config.stage if config.stage else stage in config.stages
    if runs and stage in DENSE_STAGES and settings.budgets != "full":
        raise RequestError(
            f"{_origin(config, stage, 'budgets')}={settings.budgets!r}: the stage {stage!r} trains a dense model, all"
            f" layers on; expected 'full', as stage_overrides.{stage}.budgets where train.budgets is another"
        )
    _check_start(config, stage, settings.init_from)
    _check_budgets(config, stage, settings.budgets)
    _check_curriculum(config, stage, settings)


def _check_curriculum(config: Config, stage: str, settings: TrainConfig) -> None:
    """Checks that the curriculum names parts of the data, and that a step has a fixed number of samples.

    The parts of a mixture file are checked when it is read (`visor_jax.data.curriculum`).
    """
    name, data = _origin(config, stage, "curriculum"), config.data
    if not settings.curriculum or (settings.objective != "answer" and name.startswith("train.")):
        return
    if settings.objective != "answer":
        raise RequestError(
            f"{name}: has no effect on objective={settings.objective!r}; expected objective='answer', or no curriculum"
        )
    if data.pack_window:
        raise RequestError(
            f"{name}: its phases begin after a number of steps, and with data.pack_window={data.pack_window} steps have"
            " no fixed number of samples; expected data.pack_window=0, or no curriculum"
        )
    if not data.parts and not data.mixture:
        raise RequestError(f"{name}: weighs the parts of the data; expected data.parts or data.mixture")
    if data.parts:
        check_part_names(name, settings.curriculum, [path for _, path, _, _ in data.parts])


def check_part_names(
    name: str, curriculum: Iterable[tuple[int, Iterable[tuple[str, float]]]], paths: list[str]
) -> None:
    """Checks that every part that a curriculum, the field `name`, weighs is exactly one of `paths`.

    Raises:
      RequestError: a part is unknown, or several have its path.
    """
    for part in (part for _, weights in curriculum for part, _ in weights):
        if part not in paths:
            hint = nearest(part, paths)
            raise RequestError(
                f"{name}: {part!r}: expected the path of a part, one of {', '.join(paths)}"
                + (f"; {hint}" if hint else "")
            )
        if paths.count(part) > 1:
            raise RequestError(f"{name}: {part!r}: is the path of {paths.count(part)} parts; expected that of one")


def _check_budgets(config: Config, stage: str, budgets: str) -> None:
    """Checks that a fixed budget has one bit for each slot of the model."""
    model = config.model
    slots = len(Plan.visor(model.text.num_layers, model.pattern, model.head_layers).slots)
    if budgets.startswith("0b") and len(budgets) != slots + 2:
        raise RequestError(
            f"{_origin(config, stage, 'budgets')}={budgets!r}: has {len(budgets) - 2} bits, the model has {slots}"
            f" slots; expected 0b and {slots} bits"
        )


def _check_start(config: Config, stage: str, start: str) -> None:
    """Checks `init_from`: "" (random weights), an earlier stage, a shipped checkpoint, or a folder (with a slash)."""
    if not start or "/" in start or start in SHIPPED:
        return
    earlier = [name for name in TRAINED_STAGES if STAGES.index(name) < STAGES.index(stage)]
    if start not in earlier:
        hint = nearest(start, [*earlier, *SHIPPED])
        raise RequestError(
            f"{_origin(config, stage, 'init_from')}={start!r}: expected '', a stage before {stage!r}"
            f" ({', '.join(earlier) or 'none'}), {', '.join(map(repr, SHIPPED))}, or the path of a stage folder or of a"
            f" checkpoint{'; ' + hint if hint else ''}"
        )


def _origin(config: Config, stage: str, field: str) -> str:
    """Returns the name of the field that sets `field` for a stage."""
    return f"stage_overrides.{stage}.{field}" if field in config.stage_overrides.of(stage) else f"train.{field}"


def _divides(name: str, value: int, whole_name: str, whole: int) -> None:
    if whole % value:
        raise RequestError(f"{name}={value}: expected a divisor of {whole_name}={whole}")
