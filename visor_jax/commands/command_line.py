"""The command line of `visor`: one table from commands to modules, parsing, and the exit status.

In: the arguments. Out: the exit status: 0 complete, 1 failed while running, 2 wrong request (one line on stderr),
143 stopped by SIGTERM after saving, 130 interrupted from the keyboard. `visor_jax.commands` describes the interface of
a command module.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from visor_jax import __version__
from visor_jax.commands import processes
from visor_jax.errors import ABORTED, INTERRUPTED, RequestError, RunError, from_os_error, nearest, one_line
from visor_jax.files.bucket import describe, is_bucket_error
from visor_jax.scale.xla_flags import set_flags_of_host
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.supervision import Stop, is_watched, was_interrupted

if TYPE_CHECKING:
    from visor_jax.config import Config

COMMANDS = {
    name: f"visor_jax.commands.{module}"
    for name, module in {
        "run": "run",
        "train": "train",
        "search": "search",
        "label": "label",
        "evaluate": "evaluate",
        "generate": "generate",
        "report": "report",
        "export": "export",
        "import": "import_",
        "data": "data",
        "plan": "plan",
        "launch": "launch",
        "bench": "bench",
        "analyze": "analyze",
    }.items()
}


def run(argv: list[str], stop: Stop) -> int:
    """Runs one command and returns its exit status; a defect is raised with its traceback.

    Args:
      argv: the arguments, without the program's name.
      stop: the signals of this process.
    """
    try:
        status, message = _status(argv, stop)
    except SystemExit as leaving:
        processes.finish(leaving.code if isinstance(leaving.code, int) else 1)
        raise
    except BaseException as error:
        if processes.distributed() is not None:
            traceback.print_exc()
            processes.finish(1, f"{type(error).__name__}: {one_line(str(error))}")
        raise
    processes.finish(status, message)
    return status


def _status(argv: list[str], stop: Stop) -> tuple[int, str]:
    """Runs one command and converts expected errors to an exit status and a message."""
    try:
        status = _run(argv, stop)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status, ""
    except KeyboardInterrupt:
        return INTERRUPTED, ""
    except BrokenPipeError:
        _drop_output()
        return 0, ""  # the reader of our output closed it
    except Exception as error:
        if was_interrupted():  # libraries convert a KeyboardInterrupt into other errors
            return INTERRUPTED, ""
        expected = error if isinstance(error, RequestError | RunError) else None
        if isinstance(error, OSError):
            expected = from_os_error(error)
            if error.filename == _STDOUT:
                _drop_output()
        elif is_bucket_error(error):
            expected = RunError(f"a bucket could not be reached: {describe(error)}")
        if (
            expected is None
            and (distributed := processes.distributed()) is not None
            and distributed.is_lost_peer(error)
        ):
            _print_error(RunError(f"another process of this run is gone: {str(error).splitlines()[0]}"))
            return ABORTED, ""
        expected = expected or _no_device(error)
        if expected is None:
            raise
        _print_error(expected)
        return 2 if isinstance(expected, RequestError) else 1, str(expected)


def _run(argv: list[str], stop: Stop) -> int:
    if sys.stdout is None:
        raise RequestError(f"{_STDOUT}: is closed; expected somewhere to write to, such as >/dev/null")
    for argument in argv:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise RequestError(f"argument {argument!r}: expected UTF-8")
    _set_up_logging()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"visor_jax {__version__}")
        return 0
    name, *rest = argv
    module = _command(name)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    parser = _parser(name, module)
    flags = [argument for argument in rest if not argument.startswith("--config.")]
    _refuse_unknown_flags(name, flags, overrides, parser)
    args, stray = parser.parse_known_args(flags)
    if stray:
        raise RequestError(_stray(name, stray[0], overrides, parser))
    _warn_of_repeats(rest, parser)
    set_flags_of_host()  # before JAX is imported
    if processes.start(stop):
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_OneLine(f"visor [process {processes.index()}]: %(message)s"))
    config = _configuration(name, module, args, overrides)
    processes.check_request(name, args, config)
    fault_point("imported")
    if not getattr(module, "WATCHED", False):
        stop.started()
    if (distributed := processes.distributed()) is None:
        return _call(module, args, config)
    if getattr(module, "PROCESSES", "one") == "one":
        return distributed.once(lambda: _call(module, args, config))
    if distributed.is_main():
        return _call(module, args, config)
    args.json = False  # it would send what the command prints to standard error
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # process 0 prints the results
        return _call(module, args, config)


def _call(module: ModuleType, args: argparse.Namespace, config: Config | None) -> int:
    """Calls a command's `main`, prints its result, and returns its exit status."""
    try:
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            result = module.main(args, config)
    except RunError as error:
        if args.json and error.result is not None:
            _print_json(error.result)
        raise
    if isinstance(result, int):
        return result
    for row in result if isinstance(result, Iterator) else [result or {}]:  # a chat yields its results as it runs
        if args.json:
            _print_json(row)
    return 0


LOCK_FILE = Path("/tmp/libtpu_lockfile")


def _no_device(error: Exception) -> RunError | None:
    """Returns the error for an accelerator that JAX cannot use; None for any other error.

    Another program has it, or JAX_PLATFORMS names one that this machine does not have; for CUDA JAX only asserts.
    """
    if isinstance(error, AssertionError) and traceback.extract_tb(error.__traceback__)[-1].filename.endswith(
        "bridge.py"
    ):
        return RunError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such device on this machine"
        )
    if not str(error).startswith("Unable to initialize backend"):
        return None
    lock = f"; remove {LOCK_FILE} once no program uses the TPU" if "'tpu'" in str(error) and LOCK_FILE.exists() else ""
    return RunError(f"{error}{lock}")


# --- output -----------------------------------------------------------------------------------------------------------


def _print_json(result: Any) -> None:
    from visor_jax.files.read_write import finite_or_null

    print(json.dumps(finite_or_null(result), allow_nan=False), flush=True)


# --- standard streams -------------------------------------------------------------------------------------------------

_STDOUT = "standard output"


class _Output(io.FileIO):
    """Standard output whose errors name it, so that they are not mistaken for errors of our files.

    If the reader closes the pipe, a command that only prints ends; a long one continues, because its results are files.
    """

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            if not is_watched():
                raise
            _drop_output()
            return len(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, _STDOUT) from error


class _ErrorOutput(io.FileIO):
    """Standard error that ignores write errors, because they cannot be reported anywhere."""

    def write(self, data: Any, /) -> int | None:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def own_standard_streams() -> None:
    """Prepares the standard streams of the process: every text is encodable, and closed streams are replaced.

    Otherwise the next opened file would get a closed descriptor 0 or 2, and messages would be written into it.
    """
    for descriptor in (0, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is not None:
        raw = _Output(sys.stdout.fileno(), "w", closefd=False)
        encoding = sys.stdout.encoding
        # Line buffering also for files and pipes, because an immediate exit does not flush.
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
    if sys.stderr is not None:
        raw, encoding = _ErrorOutput(sys.stderr.fileno(), "w", closefd=False), sys.stderr.encoding
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
    sys.unraisablehook = _log_unraisable
    logging.captureWarnings(True)


def _log_unraisable(problem: Any) -> None:
    """Logs an unraisable error as one line, except follow-up errors of a failed save, which is reported elsewhere."""
    if not isinstance(problem.exc_value, RuntimeError) or "Event loop is closed" not in str(problem.exc_value):
        what = f"{problem.err_msg or 'ignored'}: {type(problem.exc_value).__name__}: {problem.exc_value}"
        logging.getLogger("visor_jax").warning("%s", what)


def _drop_output() -> None:
    """Redirects a closed standard output to /dev/null, so that Python's flush at exit does not fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- parsing ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{self.prog.partition(' ')[2]}: {message}")


def _available() -> dict[str, str]:
    """Returns command -> module of the installed commands."""
    return {name: module for name, module in COMMANDS.items() if importlib.util.find_spec(module)}


def _command(name: str) -> ModuleType:
    available = _available()
    if name not in available:
        hint = nearest(name, available) or f"expected one of {', '.join(available)}"
        raise RequestError(f"{name!r}: unknown command; {hint}")
    return importlib.import_module(available[name])


def _parser(name: str, module: ModuleType) -> _Parser:
    parser = _Parser(
        prog=f"visor {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = parser.add_argument_group("for every command")
    common.add_argument("--workdir", metavar="DIR", help="the run's folder")
    if _source(module) != "none":
        given = "" if _source(module) in ("required", "given") else " (default: the workdir's)"
        common.add_argument(
            "--config",
            metavar="FILE[:ARG]",
            help=f"get_config() in Python, or JSON{given}",
        )
        # Only for the help text; overrides are removed before argparse parses the line.
        common.add_argument("--config.FIELD", metavar="VALUE", help="change a field, such as --config.train.steps=100")
    common.add_argument("--json", action="store_true", help="the result as one JSON object, the last line of stdout")
    module.add_arguments(parser)
    return parser


def _stray(name: str, argument: str, overrides: list[str], parser: argparse.ArgumentParser) -> str:
    if bare := [override for override in overrides if "=" not in override]:
        return f"{name}: {bare[0]} {argument}: expected {bare[0]}={argument}"
    flag = argument.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    hint = nearest(flag, known, "--") if flag.startswith("-") else ""
    first, dot, field = flag.partition(".")
    if dot and nearest(first, ["--config"]):
        hint = f"did you mean '--config.{field}'?"
    return f"{name}: unexpected argument {argument!r}" + (f"; {hint}" if hint else f"; see visor {name} --help")


def _refuse_unknown_flags(name: str, flags: list[str], overrides: list[str], parser: argparse.ArgumentParser) -> None:
    """Raises for a mistyped flag, before argparse reports the intended flag as missing."""
    known = {option for action in parser._actions for option in action.option_strings}
    for argument in flags:
        if argument == "--":
            return
        if argument.startswith("--") and argument.partition("=")[0] not in known:
            raise RequestError(_stray(name, argument, overrides, parser))


def _warn_of_repeats(arguments: list[str], parser: argparse.ArgumentParser) -> None:
    """Warns of repeated flags, of which the last one counts; `--config.field` warns itself."""
    once = {o for a in parser._actions if type(a).__name__ == "_StoreAction" for o in a.option_strings}
    for flag, times in Counter(argument.partition("=")[0] for argument in arguments).items():
        if times > 1 and flag in once:
            logging.getLogger("visor_jax").warning("%s is given %d times: the last one counts", flag, times)


# --- the configuration ------------------------------------------------------------------------------------------------


def _source(module: ModuleType) -> str:
    return getattr(module, "CONFIG", "optional")


def _configuration(name: str, module: ModuleType, args: argparse.Namespace, overrides: list[str]) -> Any:
    """Returns the command's checked configuration; None if it takes or finds none."""
    if getattr(module, "WORKDIR", "optional") == "required" and args.workdir is None:
        raise RequestError(f"{name}: --workdir is missing; expected --workdir=DIR, the run's folder")
    source, path = _source(module), getattr(args, "config", None)
    if source == "none":
        if overrides:
            raise RequestError(f"{name}: unexpected argument {overrides[0]!r}; {name} takes no configuration")
        return None
    from visor_jax.config import apply_overrides, from_dict, load_config
    from visor_jax.data.sources import check_source

    if source == "given":
        args.overrides = tuple(overrides)
    if path is not None:
        config = load_config(path, overrides, workdir=args.workdir or "")
        check_source(config)
        return config
    if source == "given":
        if overrides:
            raise RequestError(f"{name}: {overrides[0]!r} changes nothing without --config")
        return None
    if source == "required":
        raise RequestError(
            f"{name}: --config is missing; expected a file with get_config(), or a shipped name such as llava_ov_0p5b"
        )
    if args.workdir is not None:
        from visor_jax.workdir.folder import Workdir

        workdir = Workdir(args.workdir)
        if source == "workdir" or (workdir.path / "config.json").exists():
            config = apply_overrides(from_dict(workdir.config()), overrides)
            check_source(config)
            return config
    if source == "workdir":
        raise RequestError(f"{name}: expected --workdir=DIR, a run's folder, or --config=FILE")
    if overrides:
        raise RequestError(f"{name}: {overrides[0]!r} changes nothing without --config or --workdir")
    return None


# --- output -----------------------------------------------------------------------------------------------------------


def _overview() -> str:
    modules = {name: importlib.import_module(module) for name, module in _available().items()}
    width = max(map(len, modules), default=0)
    lines = [f"  {name:<{width}}  {module.HELP}" for name, module in modules.items()]
    return "\n".join(
        [
            "usage: visor COMMAND [--config=FILE[:ARG]] [--workdir=DIR] [--config.FIELD=VALUE ...] [--json] ...",
            "",
            "Vision-language models with an adaptive visual budget: train, search budgets, evaluate, answer, export.",
            "",
            *lines,
            "",
            "`visor COMMAND --help` lists a command's arguments.",
        ]
    )


def _print_error(error: Exception) -> None:
    print(f"visor: {one_line(str(error))}", file=sys.stderr)


class _OneLine(logging.Formatter):
    """Formats each record as one line; keeps the traceback of our own defects.

    Tracebacks of other libraries are dropped, because their errors are raised and reported as well.
    """

    def format(self, record: logging.LogRecord) -> str:
        if not record.name.startswith("visor_jax") and (record.exc_info or record.stack_info):
            error = record.exc_info[1] if record.exc_info else None
            record = logging.makeLogRecord({**vars(record), "exc_info": None, "exc_text": None, "stack_info": None})
            record.msg, record.args = f"{record.getMessage()}: {error}" if error else record.getMessage(), None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)


def _is_news(record: logging.LogRecord) -> bool:
    """Returns whether to log a record: not Orbax's four records of a failed save, which we report once."""
    return not (record.name == "absl" and f"{os.sep}orbax{os.sep}" in record.pathname)


def _set_up_logging() -> None:
    """Logs our records from INFO and other libraries' from WARNING to stderr."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_OneLine("visor: %(message)s"))
        handler.addFilter(_is_news)
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("visor_jax").setLevel(logging.INFO)
    # A failed save leaves a dozen tasks, for each of which asyncio would log a traceback.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
