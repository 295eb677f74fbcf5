"""Configurations: from a `get_config()` file, overrides and the schema to a checked `Config`, and back to JSON.

Ground floor: no JAX import. In: `configs/X.py[:argument]` and `--config.field=value` overrides, or the JSON a workdir
keeps. Out: a frozen `Config` of which every field has its type and makes sense by itself and beside the others. Every
mistake is a `RequestError` of one line that names the field, its value and what is expected.

An `ml_collections.ConfigDict` is what people write: `get_config()` starts from `default_config()` and returns one.
`validate` makes a `Config` of it, and the rest of the package reads only that. The fields, their defaults and meanings
are the dataclasses of `visor_jax.config.schema`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import logging
import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from visor_jax.architecture import (
    AnyResArchitecture,
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.config.checks import check_together
from visor_jax.config.rules import parse_grids
from visor_jax.config.schema import (
    ASSETS,
    BUILT_IN,
    OFFLINE_STAGES,
    SCHEMA,
    STAGES,
    TRAINED_STAGES,
    Config,
    TrainConfig,
    all_names,
    built,
    field_of,
)
from visor_jax.config.values import Field, from_text, typed
from visor_jax.errors import RequestError, nearest
from visor_jax.files.read_write import MAX_TOKENIZER_BYTES, as_path, parse_json, read_json, read_regular

log = logging.getLogger(__name__)

ConfigLike: TypeAlias = Config | ConfigDict  # a checked configuration, or what a `get_config()` returns

MOST_DEFAULT_POSITIONS = 32_768  # as Qwen2 has


# --- making one -------------------------------------------------------------------------------------------------------


def default_config() -> Any:
    """Every field of the schema at its default, a `ConfigDict`: what a `get_config()` starts from and changes.

    `config.train` holds for all stages that train; `config.stage_overrides.<stage>` holds what differs in one of them.
    """
    return _config_dict(Config())


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = (), workdir: str = "") -> Config:
    """The checked configuration of a file, with overrides.

    Args:
      path: a Python file that defines `get_config()`, or "FILE:ARGUMENT" for `get_config(ARGUMENT)`.
      overrides: "--config.train.steps=10" (or without the dashes), in order.
      workdir: the run's folder: a file in it would be code that came with data, and is not executed.

    Raises:
      RequestError: the file, a field or a combination of fields is wrong.
    """
    file, separator, argument = os.fspath(path).partition(":") if "://" not in os.fspath(path) else (path, "", "")
    _refuse_unsafe(Path(os.path.expanduser(file)), os.fspath(path), workdir)
    return apply_overrides(config_from_file(file, argument if separator else None), overrides)


def config_from_file(file: str | os.PathLike[str], argument: str | None = None) -> Any:
    """What `get_config()` in `file` returns, an unchecked `ConfigDict`: for configurations that start from another one.

    Raises:
      RequestError: no such file, or it raises; the message names the file, and the line where there is one.
    """
    source = as_path(file)
    where = f"--config={os.fspath(file)}"
    if not source.is_file():
        if source.exists():
            raise RequestError(f"{where}: is no regular file; expected a Python file that defines get_config()")
        folder = source.parent if source.parent.is_dir() else Path()
        raise _request(where, "no such file", nearest(os.fspath(file), map(str, folder.glob("*.py"))))
    if source.suffix != ".py":
        raise RequestError(f"{where}: expected a Python file that defines get_config()")
    spec = importlib.util.spec_from_file_location(f"visor_config_{source.stem}", source)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        if not callable(make):
            raise RequestError(f"{where}: defines no function get_config()")
        _check_argument(where, make, argument)
        config = make() if argument is None else make(argument)
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(source, error)
        text = " ".join(str(error).split())
        raise RequestError(f"{where}: {type(error).__name__}{line}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise RequestError(f"{where}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    return config


def apply_overrides(config: ConfigLike, overrides: Iterable[str]) -> Config:
    """A checked copy of `config` with "--config.field=value" overrides; of a field given twice the last one counts.

    Raises:
      RequestError: an unknown field, a value of another type, or one that makes no sense.
    """
    changed = _config_dict(config)
    seen: dict[str, str] = {}
    for override in overrides:
        name, separator, text = override.removeprefix("--").removeprefix("config.").partition("=")
        if not separator:
            raise RequestError(f"--config.{name}: expected --config.{name}=VALUE")
        field = field_of(name)
        if field is None:
            raise unknown_field(name, _given(text))
        if name in seen:
            log.warning("--config.%s is given twice: %r counts, not %r", name, text, seen[name])
        seen[name] = text
        _set(changed, name, _parse(name, text, field))
    return validate(changed)


# --- checking one -----------------------------------------------------------------------------------------------------


def validate(config: ConfigLike) -> Config:
    """The checked configuration: every field known and present, of its type, sensible by itself and beside the others.

    Raises:
      RequestError: naming the first field that is not.
    """
    checked: dict[str, Any] = {}
    for name, value in _leaves(_config_dict(config)):
        field = field_of(name)
        if field is None:
            raise unknown_field(name, _shown(value))
        try:
            checked[name] = typed(value, field)
        except ValueError as error:
            raise _wrong(name, value, _shown(value), error) from error
    for name in SCHEMA:
        if name not in checked:
            raise RequestError(f"{name}: missing; expected a configuration that starts from default_config()")
    result = built(checked)
    check_together(result, [(stage, stage_config(result, stage)) for stage in TRAINED_STAGES])
    return result


def as_config(config: ConfigLike) -> Config:
    """A `Config` as it is; of a `ConfigDict`, as a `get_config()` returns it, the checked one.

    Raises: as `validate`.
    """
    return config if isinstance(config, Config) else validate(config)


def unknown_field(name: str, shown: str) -> RequestError:
    """The error for a field that is not in the schema: the nearest names, else those that stand where it was sought."""
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
        hint = f"it is a section, of {', '.join(sections[name])}"
    elif section and section in sections:
        near = nearest(leaf, sections[section])
        hint = re.sub(r"'(\w+)'", rf"'{section}.\1'", near) or f"{section} has {', '.join(sections[section])}"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]!r}?"
    else:
        tops = dict.fromkeys(known.partition(".")[0] for known in SCHEMA)
        hint = nearest(name.partition(".")[0], tops) or f"there are {', '.join(tops)}"
    return _request(f"{name}={shown}", "unknown field", hint)


# --- reading one ------------------------------------------------------------------------------------------------------


def stage_config(config: ConfigLike, stage: str) -> TrainConfig:
    """The training settings of a stage: `config.train` with what `config.stage_overrides.<stage>` changes.

    `batch_size` is never 0 in it, and an `init_from` that is a path is absolute.

    Raises:
      RequestError: there is no such stage, or it trains nothing.
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
    """The model that `config.model` describes; a vocabulary size of 0 is read from the tokenizer's file.

    Stage "dense" has the dense plan, whatever the other stages have.

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
        ),
        plan="dense" if stage == "dense" else model.plan,
        bidirectional_vision=model.bidirectional_vision,
        pattern=tuple(model.pattern),
        head_layers=model.head_layers,
    )


def default_max_positions(config: Config) -> int:
    """How long a prompt may be where nothing is said: four rows of training, and the largest picture twice with text.

    Attention costs as the square of its length, and no row of training was longer than a window: what is longer by far
    takes minutes and comes to nothing.
    """
    model, data = config.model, config.data
    tile = (model.vision.tile_size // model.vision.patch_size) ** 2
    picture = tile * (model.anyres.max_tiles + 1 if model.anyres.pinpoints else 1)
    return min(max(4 * (data.visual_length + data.text_length), 2 * picture + 2048), MOST_DEFAULT_POSITIONS)


def tokenizer_file(path: str) -> Path:
    """The file that `tokenizer.path` names: a tokenizer that comes with the package, or a path."""
    return ASSETS / path / "tokenizer.json" if path in BUILT_IN else as_path(path)


def to_json(config: ConfigLike) -> str:
    """The configuration as an indented JSON object; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2, allow_nan=False)


def from_json(text: str) -> Config:
    """The checked configuration that `to_json` wrote.

    Raises:
      RequestError: no JSON object, or not one of this schema.
    """
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise RequestError(f"configuration: not valid JSON: {error}") from error
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The checked configuration of a nested dict as JSON gives it back; a field that it does not have is the default's.

    A workdir stays readable when a later version of this package has more fields.

    Raises:
      RequestError: it does not fit the schema.
    """
    if not isinstance(tree, Mapping):
        raise RequestError(f"configuration: expected a JSON object, got {type(tree).__name__}")
    try:
        config = default_config()
        config.update(ConfigDict(dict(tree), type_safe=False))
    except (ValueError, TypeError) as error:  # a field's name holds a dot, or is no text
        raise RequestError(f"configuration: {error}") from error
    return validate(config)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _config_dict(config: ConfigLike) -> ConfigDict:
    """A copy that may be changed. Types are the schema's business: its messages name the field."""
    return ConfigDict(config.to_dict(), type_safe=False)


def _set(config: ConfigDict, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    node: Any = config
    for section in sections:
        if not isinstance(node.get(section), ConfigDict):
            node[section] = ConfigDict(type_safe=False)
        node = node[section]
    node[leaf] = value


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, and of every empty section that the schema does not have."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, ConfigDict) and (len(value) or name.removeprefix("stage_overrides.") in TRAINED_STAGES):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _parse(name: str, text: str, field: Field) -> Any:
    """An override's text as a value of the field's type."""
    try:
        return typed(from_text(text, field), field)
    except ValueError as error:
        raise _wrong(name, text, _given(text), error) from error


def _wrong(name: str, value: Any, shown: str, error: ValueError) -> RequestError:
    field = field_of(name)
    choices = field.rule.expected.split("'")[1::2] if field and field.rule else []
    return _request(f"{name}={shown}", str(error), nearest(value, choices) if isinstance(value, str) else "")


def _request(subject: str, fault: str, hint: str) -> RequestError:
    return RequestError(f"{subject}: {fault}" + (f"; {hint}" if hint else ""))


def _shown(value: Any) -> str:
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _given(text: str) -> str:
    """An override's text as it was typed, where that is readable."""
    return text if text.isprintable() and len(text) <= 80 else _shown(text)


def _refuse_unsafe(file: Path, given: str, workdir: str) -> None:
    """A configuration is code: it is taken from where people put code, not from where runs and downloads put data."""
    if not given.isprintable():
        raise RequestError(f"--config={given!r}: expected a path of printable characters")
    if "://" in given:
        raise RequestError(f"--config={given}: a configuration is code and only read from a local file")
    folders = [folder for folder in file.resolve().parents if is_workdir(folder)]
    if workdir and "://" not in workdir and as_path(workdir).resolve() in file.resolve().parents:
        folders.append(as_path(workdir))
    if folders:
        raise RequestError(f"--config={given}: lies in the workdir {folders[0]}; a workdir's files are not executed")


def is_workdir(folder: Path) -> bool:
    """Whether a folder is a run's, as its `config.json` tells."""
    try:
        record = read_json(folder / "config.json")
    except RequestError:
        return False
    return isinstance(record, dict) and {"config", "format"} <= record.keys()


def _check_argument(where: str, make: Any, argument: str | None) -> None:
    try:
        inspect.signature(make).bind(*([] if argument is None else [argument]))
    except TypeError as error:
        takes = "no argument" if argument is not None else "an argument, given as FILE:ARGUMENT"
        raise RequestError(f"{where}: get_config() takes {takes}") from error


def _line_in(source: Path, error: BaseException) -> str:
    """Where in the file an error arose: " in line 12"."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" in line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == source.resolve()]
    return f" in line {frames[-1].lineno}" if frames else ""


def _vocabulary_size(file: Path) -> int:
    """One more than the largest token id of a tokenizer.json."""
    try:
        changed = file.stat().st_mtime_ns
    except OSError as error:
        raise RequestError(f"tokenizer.path={os.fspath(file)!r}: {error.strerror}") from error
    return _count_tokens(file, changed)


@functools.lru_cache(maxsize=8)
def _count_tokens(file: Path, changed: int) -> int:
    """`changed` is the file's time of change: a new file is read anew."""
    try:
        tokenizer = parse_json(read_regular(file, MAX_TOKENIZER_BYTES))
        vocabulary, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens", [])
        return 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"tokenizer.path={os.fspath(file)!r}: expected a tokenizer.json: {error}") from error
