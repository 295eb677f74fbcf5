"""Loads, validates and serializes configurations. No JAX import.

The input is `configs/X.py[:argument]` with `--config.field=value` overrides, or the JSON in a workdir. The output is a
frozen `Config` whose fields have the right types and values and fit together. Every mistake is a one-line
`RequestError` that names the field, its value and what is expected.

Users write an `ml_collections.ConfigDict`: `get_config()` starts from `default_config()`, changes it and returns it.
`validate` turns it into a `Config`, which is all that the rest of the package reads. The dataclasses of
`visor_jax.config.schema` declare the fields, their defaults and meanings.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from visor_jax.architecture import (
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    DroppingArchitecture,
    PolicyArchitecture,
    ReductionArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.config.checks import check_together
from visor_jax.config.config_file import config_from_file, config_path, fields_from_file, refuse_unsafe
from visor_jax.config.data_fields import ASSETS, BUILT_IN
from visor_jax.config.former import without_former
from visor_jax.config.rules import parse_grids
from visor_jax.config.schema import (
    DENSE_STAGES,
    OFFLINE_STAGES,
    SCHEMA,
    STAGES,
    TRAINED_STAGES,
    Config,
    all_names,
    build_config,
    field_of,
)
from visor_jax.config.train_fields import TrainConfig
from visor_jax.config.values import Field, convert, from_text
from visor_jax.errors import RequestError, nearest
from visor_jax.files.read_write import MAX_TOKENIZER_BYTES, as_path, parse_json, read_regular

log = logging.getLogger(__name__)

ConfigLike: TypeAlias = Config | ConfigDict  # a checked configuration, or what `get_config()` returns

MAX_DEFAULT_POSITIONS = 32_768  # as in Qwen2


# --- making one -------------------------------------------------------------------------------------------------------


def default_config() -> Any:
    """Returns a `ConfigDict` with every field at its default, for `get_config()` to change.

    `config.train` applies to all trained stages; `config.stage_overrides.<stage>` overrides it for one of them.
    """
    return _config_dict(Config())


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = (), workdir: str = "") -> Config:
    """Loads a configuration file, applies overrides and validates the result.

    Args:
      path: a Python file that defines `get_config()`, or "FILE:ARGUMENT" for `get_config(ARGUMENT)`; the bare name of a
        shipped configuration, such as "llava_ov_0p5b", in place of FILE; or a JSON file with a resolved configuration,
        such as a workdir's `config.json`, which is read as data.
      overrides: "--config.train.steps=10" (or without the dashes), in order.
      workdir: the run's folder; a file in it may have come with data, so it is not executed.

    Raises:
      RequestError: the file, a field or a combination of fields is wrong.
    """
    file, separator, argument = os.fspath(path).partition(":") if "://" not in os.fspath(path) else (path, "", "")
    if os.fspath(file).endswith(".json") and "://" not in os.fspath(path):
        if separator:
            raise RequestError(f"--config={os.fspath(path)}: a JSON file takes no argument; expected {file}")
        return apply_overrides(from_dict(fields_from_file(file)), overrides)
    if "://" not in os.fspath(path):
        file = config_path(os.fspath(file))
    refuse_unsafe(Path(os.path.expanduser(file)), os.fspath(path), workdir)
    return apply_overrides(config_from_file(file, argument if separator else None), overrides)


def apply_overrides(config: ConfigLike, overrides: Iterable[str]) -> Config:
    """Returns a checked copy of `config` with "--config.field=value" overrides; the last value of a field wins.

    Raises:
      RequestError: a field is unknown, or a value has the wrong type or breaks a rule.
    """
    changed = _config_dict(config)
    texts: dict[str, str] = {}  # field name to its override's text
    for override in overrides:
        name, separator, text = override.removeprefix("--").removeprefix("config.").partition("=")
        if not separator:
            raise RequestError(f"--config.{name}: expected --config.{name}=VALUE")
        field = field_of(name)
        if field is None:
            raise unknown_field(name, _given(text))
        if name in texts:
            log.warning("--config.%s is given twice: using %r, not %r", name, text, texts[name])
        texts[name] = text
        _set(changed, name, _parse(name, text, field))
    return validate(changed)


# --- checking one -----------------------------------------------------------------------------------------------------


def validate(config: ConfigLike) -> Config:
    """Checks that every field is known, present, of its type and within its rules, and returns the `Config`.

    Raises:
      RequestError: names the first field that is wrong.
    """
    checked: dict[str, Any] = {}
    for name, value in _leaves(_config_dict(config)):
        field = field_of(name)
        if field is None:
            raise unknown_field(name, _shown(value))
        try:
            checked[name] = convert(value, field)
        except ValueError as error:
            raise _wrong(name, value, _shown(value), error) from error
    for name in SCHEMA:
        if name not in checked:
            raise RequestError(f"{name}: missing; expected a configuration that starts from default_config()")
    result = build_config(checked)
    check_together(result, [(stage, stage_config(result, stage)) for stage in TRAINED_STAGES])
    return result


def as_config(config: ConfigLike) -> Config:
    """Returns a `Config` unchanged, and a `ConfigDict` validated.

    Raises: as `validate`.
    """
    return config if isinstance(config, Config) else validate(config)


def unknown_field(name: str, shown: str) -> RequestError:
    """Returns the error for a field that is not in the schema; it suggests similar names, else lists the section's."""
    section, _, leaf = name.rpartition(".")
    sections: dict[str, list[str]] = {}
    for known in all_names():
        above, _, last = known.rpartition(".")
        sections.setdefault(above, []).append(last)
    elsewhere = [known for known in SCHEMA if known.rpartition(".")[2] == leaf]
    if section.startswith("stage_overrides.") and section not in sections:
        stage = section.split(".")[1]
        hint = nearest(stage, TRAINED_STAGES) or f"the stages are {', '.join(TRAINED_STAGES)}"
    elif name in sections:
        hint = f"it is a section with {', '.join(sections[name])}"
    elif section and section in sections:
        near = nearest(leaf, sections[section])
        hint = re.sub(r"'(\w+)'", rf"'{section}.\1'", near) or f"{section} has {', '.join(sections[section])}"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]!r}?"
    else:
        tops = dict.fromkeys(known.partition(".")[0] for known in SCHEMA)
        hint = nearest(name.partition(".")[0], tops) or f"the top-level names are {', '.join(tops)}"
    return _request(f"{name}={shown}", "unknown field", hint)


# --- reading one ------------------------------------------------------------------------------------------------------


def stage_config(config: ConfigLike, stage: str) -> TrainConfig:
    """Returns the training settings of a stage: `config.train` with `config.stage_overrides.<stage>` applied.

    A `batch_size` of 0 becomes `data.batch_size`, and an `init_from` that is a path becomes absolute.

    Raises:
      RequestError: the stage does not exist or does not train.
    """
    if stage in OFFLINE_STAGES:
        raise RequestError(f"stage={stage!r}: trains nothing; expected one of {', '.join(TRAINED_STAGES)}")
    if stage not in TRAINED_STAGES:
        raise _request(f"stage={stage!r}", f"expected one of {', '.join(STAGES)}", nearest(stage, STAGES))
    config = as_config(config)
    settings = dataclasses.replace(config.train, **config.stage_overrides.of(stage))
    start = settings.init_from
    if "/" in start and "://" not in start:
        start = os.path.abspath(os.path.expanduser(start))
    return dataclasses.replace(settings, batch_size=settings.batch_size or config.data.batch_size, init_from=start)


def architecture(config: ConfigLike, stage: str = "") -> Architecture:
    """Returns the `Architecture` of `config.model`; a vocabulary size of 0 is read from the tokenizer's file.

    `DENSE_STAGES` always have the dense plan.

    Raises:
      RequestError: the tokenizer's file is needed and cannot be read.
    """
    config = as_config(config)
    model = config.model
    text = dataclasses.asdict(model.text)
    text["vocab_size"] = text["vocab_size"] or _vocabulary_size(tokenizer_file(config.tokenizer.path))
    text["max_positions"] = text["max_positions"] or default_max_positions(config)
    tile = model.vision.tile_size
    return Architecture(
        text=TextArchitecture(**text),
        vision=VisionArchitecture(**dataclasses.asdict(model.vision)),
        cross=CrossAttentionArchitecture(
            num_kv_heads=model.cross.num_kv_heads or model.text.num_kv_heads,
            init=model.cross.init,
            gate_init=model.cross.gate_init,
            kernel_size=model.cross.kernel_size,
        ),
        policy=PolicyArchitecture(**dataclasses.asdict(model.policy)),
        anyres=AnyResArchitecture(
            pinpoints=tuple((rows * tile, columns * tile) for rows, columns in parse_grids(model.anyres.pinpoints)),
            max_tiles=model.anyres.max_tiles,
            image_mean=model.anyres.image_mean,
            image_std=model.anyres.image_std,
            packing=model.anyres.packing,
            packing_kind=model.anyres.packing_kind,
            standardize=model.anyres.standardize,
            small_pictures=config.data.small_pictures,
        ),
        reduction=ReductionArchitecture(**dataclasses.asdict(model.reduction)),
        dropping=DroppingArchitecture(**dataclasses.asdict(model.dropping)),
        plan="dense" if has_dense_plan(config, stage) else model.plan,
        bidirectional_vision=model.bidirectional_vision,
        pattern=tuple(model.pattern),
        head_layers=model.head_layers,
    )


def has_dense_plan(config: Config, stage: str) -> bool:
    """Returns whether the model of a stage ("": of none in particular) is dense."""
    return config.model.plan == "dense" or stage in DENSE_STAGES


def default_max_positions(config: Config) -> int:
    """Returns the default limit on visual positions and text tokens of a prompt with its answer.

    The limit is four training rows or, if larger, two of the largest pictures plus 2048, and at most
    `MAX_DEFAULT_POSITIONS`. Attention cost grows with the square of the length, and prompts far longer than a training
    row are answered badly.
    """
    model, data = config.model, config.data
    tile = (model.vision.tile_size // model.vision.patch_size) ** 2
    picture = tile * (model.anyres.max_tiles + 1 if model.anyres.pinpoints else 1)
    return min(max(4 * (data.visual_length + data.text_length), 2 * picture + 2048), MAX_DEFAULT_POSITIONS)


def tokenizer_file(path: str) -> Path:
    """Returns the file for a `tokenizer.path`: a built-in tokenizer's name, or a path."""
    return ASSETS / path / "tokenizer.json" if path in BUILT_IN else as_path(path)


def to_json(config: ConfigLike) -> str:
    """Serializes the configuration as an indented JSON object; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, allow_nan=False)


def from_json(text: str) -> Config:
    """Reads and validates what `to_json` wrote.

    Raises:
      RequestError: the text is not a JSON object, or it does not fit the schema.
    """
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise RequestError(f"configuration: not valid JSON: {error}") from error
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Validates a nested dict, as JSON gives it back; missing fields take their defaults.

    A workdir therefore stays readable when a later version of this package has more fields, or fewer (`former`).

    Raises:
      RequestError: the dict does not fit the schema.
    """
    if not isinstance(tree, Mapping):
        raise RequestError(f"configuration: expected a JSON object, got {type(tree).__name__}")
    tree, config = without_former(tree), default_config()
    _check_sections(config, tree)
    try:
        config.update(ConfigDict(dict(tree), type_safe=False))
    except (ValueError, TypeError) as error:  # a field's name has a dot or is not a string
        raise RequestError(f"configuration: {error}") from error
    return validate(config)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _config_dict(config: ConfigLike) -> ConfigDict:
    """Returns a mutable copy without type checks; the schema checks types, with better messages."""
    return ConfigDict(config.to_dict(), type_safe=False)


def _check_sections(config: ConfigDict, tree: Mapping[str, Any], prefix: str = "") -> None:
    """Raises RequestError where `tree` has another value in place of a section of `config`."""
    for name, value in tree.items():
        section = config.get(name) if isinstance(name, str) else None
        if not isinstance(section, ConfigDict):
            continue
        if not isinstance(value, Mapping):
            raise unknown_field(f"{prefix}{name}", _shown(value))
        _check_sections(section, value, f"{prefix}{name}.")


def _set(config: ConfigDict, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    node: Any = config
    for section in sections:
        if not isinstance(node.get(section), ConfigDict):
            node[section] = ConfigDict(type_safe=False)
        node = node[section]
    node[leaf] = value


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field, and of every empty section that the schema does not have."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, ConfigDict) and (len(value) or name.removeprefix("stage_overrides.") in TRAINED_STAGES):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _parse(name: str, text: str, field: Field) -> Any:
    """Converts an override's text to the field's type, or raises the `RequestError` for it."""
    try:
        return convert(from_text(text, field), field)
    except ValueError as error:
        raise _wrong(name, text, _given(text), error) from error


def _wrong(name: str, value: Any, shown: str, error: ValueError) -> RequestError:
    field = field_of(name)
    names = field.rule.expected.partition("such as")[0] if field and field.rule else ""  # without examples
    choices = names.split("'")[1::2]
    return _request(f"{name}={shown}", str(error), nearest(value, choices) if isinstance(value, str) else "")


def _request(subject: str, fault: str, hint: str) -> RequestError:
    return RequestError(f"{subject}: {fault}" + (f"; {hint}" if hint else ""))


def _shown(value: Any) -> str:
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _given(text: str) -> str:
    """Returns an override's text for a message: unchanged if it is printable and short, else as `repr`."""
    return text if text.isprintable() and len(text) <= 80 else _shown(text)


def _vocabulary_size(file: Path) -> int:
    """Returns the largest token id of a tokenizer.json plus one."""
    try:
        changed = file.stat().st_mtime_ns
    except OSError as error:
        raise RequestError(f"tokenizer.path={os.fspath(file)!r}: {error.strerror}") from error
    return _count_tokens(file, changed)


@functools.lru_cache(maxsize=8)
def _count_tokens(file: Path, changed: int) -> int:
    """Implements `_vocabulary_size`; `changed`, the modification time in ns, invalidates the cache."""
    try:
        tokenizer = parse_json(read_regular(file, MAX_TOKENIZER_BYTES))
        vocabulary, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens", [])
        return 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"tokenizer.path={os.fspath(file)!r}: expected a tokenizer.json: {error}") from error
