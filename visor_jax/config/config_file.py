"""Reads a configuration file: a Python file with `get_config()`, which is executed, or a JSON file, which is data.

In: the path. Out: an unchecked `ConfigDict`, or the fields of a resolved configuration; `visor_jax.config.resolve`
checks them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from visor_jax.errors import RequestError, nearest
from visor_jax.files.read_write import as_path, read_json


def shipped_configs() -> dict[str, Path]:
    """Returns the configurations that come with the package, by name: {"llava_ov_0p5b": Path, ...}.

    In a checkout, `visor_jax/configs` is a link to `configs/`; a wheel holds copies.
    """
    folder = Path(__file__).resolve().parents[1] / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def config_path(given: str) -> str:
    """Returns the path that `--config=given` means: `given` itself, or the shipped file if `given` is a bare name.

    A bare name holds neither a folder nor a suffix, so it is never a configuration file of the user's.

    Raises:
      RequestError: `given` is a bare name, and neither a shipped configuration nor anything on disk has it.
    """
    if not given or Path(given).name != given or Path(given).suffix or not given.isprintable() or "~" in given:
        return given
    shipped = shipped_configs()
    if given in shipped:
        return os.fspath(shipped[given])
    if Path(given).exists():
        return given
    hint = nearest(given, shipped) or f"the shipped ones are {', '.join(shipped)}"
    raise RequestError(f"--config={given}: neither a file nor the name of a shipped configuration; {hint}")


def config_from_file(file: str | os.PathLike[str], argument: str | None = None) -> Any:
    """Returns the unchecked `ConfigDict` of `get_config()` in `file`, for configurations that start from another one.

    Raises:
      RequestError: the file does not exist or raises; the message names the file and, if known, the line.
    """
    source = as_path(file)
    where = f"--config={os.fspath(file)}"
    if source.is_file() and source.suffix != ".py":
        raise RequestError(f"{where}: expected a Python file that defines get_config(), or a JSON file")
    module = run_file(source, where, "get_config()")
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise RequestError(f"{where}: defines no function get_config()")
    _check_argument(where, make, argument)
    with _errors_of(source, where):
        config = make() if argument is None else make(argument)
    if not isinstance(config, ConfigDict):
        raise RequestError(f"{where}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    return config


def run_file(source: Path, where: str, defines: str) -> ModuleType:
    """Executes a Python file of the user's and returns the module.

    Args:
      source: the file.
      where: how messages name it, such as "--config=FILE".
      defines: what the file is expected to define, for messages.

    Raises:
      RequestError: the file does not exist or raises; the message names the file and, if known, the line.
    """
    if not source.is_file():
        if source.exists():
            raise RequestError(f"{where}: not a regular file; expected a Python file that defines {defines}")
        folder = source.parent if source.parent.is_dir() else Path()
        hint = nearest(where.partition("=")[2], map(str, folder.glob("*.py")))
        raise RequestError(f"{where}: no such file" + (f"; {hint}" if hint else ""))
    spec = importlib.util.spec_from_file_location(f"visor_file_{source.stem}", source)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    with _errors_of(source, where):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _errors_of(source: Path, where: str) -> Iterator[None]:
    """Turns what the code of `source` raises into a RequestError."""
    try:
        yield
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(source, error)
        text = " ".join(str(error).split())
        raise RequestError(f"{where}: {type(error).__name__}{line}: {text}") from error


def fields_from_file(file: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Returns the fields of a resolved configuration: a JSON object of them, or a workdir's `config.json`.

    Raises:
      RequestError: the file does not exist or is no such object.
    """
    value = read_json(as_path(file))
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        value = value["config"]
    if not isinstance(value, dict):
        raise RequestError(f"--config={os.fspath(file)}: expected a JSON object of configuration fields")
    return value


def refuse_unsafe(file: Path, given: str, workdir: str, flag: str = "--config") -> None:
    """Rejects URLs and files inside a workdir: a file that is executed is code, and those places hold data.

    Args:
      file: the file.
      given: as it was named on the command line, with `flag`.
      workdir: of the command; "" if it has none.
      flag: for messages.
    """
    if not given.isprintable():
        raise RequestError(f"{flag}={given!r}: expected a path of printable characters")
    if "://" in given:
        raise RequestError(f"{flag}={given}: is code, which is executed; expected a local file")
    folders = [folder for folder in file.resolve().parents if is_workdir(folder)]
    if workdir and "://" not in workdir and as_path(workdir).resolve() in file.resolve().parents:
        folders.append(as_path(workdir))
    if folders:
        raise RequestError(f"{flag}={given}: is in the workdir {folders[0]}; a workdir's files are not executed")


def is_workdir(folder: Path) -> bool:
    """Returns whether a folder is a workdir, judging by its `config.json`."""
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
    """Returns the line of `source` that raised the error, as " in line 12"; "" if unknown."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" in line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == source.resolve()]
    return f" in line {frames[-1].lineno}" if frames else ""
