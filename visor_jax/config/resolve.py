"""Configurations: from a `get_config()` file, overrides and the schema to a checked `ConfigDict`, and back to JSON.

Ground floor: no JAX import. In: `configs/X.py[:argument]` and `--config.field=value` overrides, or the JSON a workdir
keeps. Out: a locked `ml_collections.ConfigDict` of which every field has the schema's type and makes sense by itself
and beside the others. Every mistake is a `RequestError` of one line that names the field, its value and what is
expected.

The fields, their defaults and meanings are the table `SCHEMA` in `visor_jax.config.schema`.
"""

from __future__ import annotations

import ast
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
from visor_jax.config.schema import (
    ASSETS,
    BUILT_IN,
    OFFLINE_STAGES,
    SCHEMA,
    STAGE_DEFAULTS,
    STAGES,
    TRAINED_STAGES,
    Field,
    all_names,
    field_of,
    parse_grids,
    typed,
)
from visor_jax.errors import RequestError, nearest
from visor_jax.files.read_write import MAX_TOKENIZER_BYTES, as_path, parse_json, read_json, read_regular

log = logging.getLogger(__name__)

Config: TypeAlias = Any  # a ConfigDict, whose fields are the schema's: no type checker knows them

MOST_DEFAULT_POSITIONS = 32_768  # as Qwen2 has


# --- making one -------------------------------------------------------------------------------------------------------


def default_config() -> Config:
    """Every field of the schema at its default: what a `get_config()` starts from.

    `config.train` holds for all stages that train; `config.stage_overrides.<stage>` holds what differs in one of them.
    """
    config = ConfigDict(type_safe=False)  # types are the schema's business: its messages name the field
    for name, field in SCHEMA.items():
        _set(config, name, field.default)
    for stage in TRAINED_STAGES:
        for name, value in STAGE_DEFAULTS[stage].items():
            _set(config, f"stage_overrides.{stage}.{name}", value)
    return config


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


def config_from_file(file: str | os.PathLike[str], argument: str | None = None) -> Config:
    """What `get_config()` in `file` returns, unchecked: for configurations that start from another one.

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


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A checked copy of `config` with "--config.field=value" overrides; of a field given twice the last one counts.

    Raises:
      RequestError: an unknown field, a value of another type, or one that makes no sense.
    """
    changed = ConfigDict(config.to_dict(), type_safe=False)
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


def validate(config: Config) -> Config:
    """A checked, locked copy: every field known and present, of its type, sensible by itself and beside the others.

    Raises:
      RequestError: naming the first field that is not.
    """
    checked = ConfigDict(type_safe=False)
    for stage in TRAINED_STAGES:
        _set(checked, f"stage_overrides.{stage}", ConfigDict(type_safe=False))
    values = dict(_leaves(config))
    for name, value in values.items():
        field = field_of(name)
        if field is None:
            raise unknown_field(name, _shown(value))
        try:
            _set(checked, name, typed(value, field))
        except ValueError as error:
            raise _wrong(name, value, _shown(value), error) from error
    for name in SCHEMA:
        if name not in values:
            raise RequestError(f"{name}: missing; expected a configuration that starts from default_config()")
    check_together(checked, [(stage, stage_config(checked, stage)) for stage in TRAINED_STAGES])
    return checked.lock()


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


def stage_config(config: Config, stage: str) -> Config:
    """The training settings of a stage: `config.train` with what `config.stage_overrides.<stage>` changes.

    `batch_size` is never 0 in it, and an `init_from` that is a path is absolute.

    Raises:
      RequestError: there is no such stage, or it trains nothing.
    """
    if stage in OFFLINE_STAGES:
        raise RequestError(f"stage={stage!r}: trains nothing; expected one of {', '.join(TRAINED_STAGES)}")
    if stage not in TRAINED_STAGES:
        raise _request(f"stage={stage!r}", f"expected one of {', '.join(STAGES)}", nearest(stage, STAGES))
    merged = {**config.train.to_dict(), **config.stage_overrides[stage].to_dict()}
    settings: Config = ConfigDict(merged, type_safe=False)
    settings.batch_size = settings.batch_size or config.data.batch_size
    if "/" in settings.init_from and "://" not in settings.init_from:
        settings.init_from = os.path.abspath(os.path.expanduser(settings.init_from))
    return settings.lock()


def architecture(config: Config, stage: str = "") -> Architecture:
    """The model that `config.model` describes; a vocabulary size of 0 is read from the tokenizer's file.

    Stage "dense" has the dense plan, whatever the other stages have.

    Raises:
      RequestError: the tokenizer's file is needed and cannot be read.
    """
    model = config.model
    text = model.text.to_dict()
    text["vocab_size"] = text["vocab_size"] or _vocabulary_size(tokenizer_file(config.tokenizer.path))
    text["max_positions"] = text["max_positions"] or default_max_positions(config)
    tile = model.vision.tile_size
    return Architecture(
        text=TextArchitecture(**text),
        vision=VisionArchitecture(**model.vision.to_dict()),
        cross=CrossAttentionArchitecture(
            num_kv_heads=model.cross.num_kv_heads or model.text.num_kv_heads,
            init=model.cross.init,
            gate_init=model.cross.gate_init,
            kernel_size=model.cross.kernel_size,
        ),
        policy=PolicyArchitecture(**model.policy.to_dict()),
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


def to_json(config: Config) -> str:
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
        config = ConfigDict(default_config().to_dict(), type_safe=False)
        config.update(ConfigDict(dict(tree), type_safe=False))
    except (ValueError, TypeError) as error:  # a field's name holds a dot, or is no text
        raise RequestError(f"configuration: {error}") from error
    return validate(config)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _set(config: Config, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        if not isinstance(config.get(section), ConfigDict):
            config[section] = ConfigDict(type_safe=False)
        config = config[section]
    config[leaf] = value


def _leaves(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
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
        if not isinstance(field.default, tuple):
            return typed(_parse_scalar(text, type(field.default)), field)
        return typed(_parse_list(text, field.element), field)
    except ValueError as error:
        raise _wrong(name, text, _given(text), error) from error


def _parse_list(text: str, element: type | tuple[type, ...]) -> Any:
    """A Python literal such as (1, 2) or ["a", "b"], else items between commas."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, list | tuple):
        return value
    if isinstance(element, tuple):  # pairs have no other form
        return value if text.strip() else []
    return [_parse_scalar(item.strip(), element) for item in text.split(",") if item.strip()]


def _parse_scalar(text: str, kind: type) -> Any:
    """The text as a value of `kind`; as it stands where it is none, for the type check to refuse."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


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
