"""The command line: help, refusals with their exit status, and output of `--json`."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import visor_jax
from visor_jax import __main__ as cli
from visor_jax.commands import command_line
from visor_jax.config import load_config, to_json
from visor_jax.errors import RequestError, RunError

ROOT = Path(__file__).parents[1]
MINI = str(ROOT / "configs" / "almanac_mini.py")


@pytest.fixture
def command(monkeypatch):
    """Installs a command `probe`; returns its module, whose `main` tests set."""
    module = types.ModuleType("visor_probe", "A command for tests.\n\nSecond paragraph.")
    module.__spec__ = ModuleSpec("visor_probe", loader=None)  # importlib.util.find_spec reads it
    vars(module).update(
        HELP="probe the command line",
        CONFIG="optional",
        add_arguments=lambda parser: parser.add_argument("--image", type=int, default=0),
        main=lambda args, config: None,
    )
    monkeypatch.setitem(sys.modules, "visor_probe", module)
    monkeypatch.setitem(command_line.COMMANDS, "probe", "visor_probe")
    return module


def returns(value, calls: list | None = None):
    def main(args, config):
        if calls is not None:
            calls.append((args, config))
        if isinstance(value, BaseException):
            raise value
        return value

    return main


def complaint(capsys) -> str:
    """Returns stderr, which must be one line that starts with the program's name."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("visor: ")
    assert err.count("\n") == 1
    return err


# --- exit status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "status"), [(None, 0), (0, 0), (3, 3), ({"a": 1}, 0)])
def test_what_main_returns_is_the_status(command, capsys, value, status):
    command.main = returns(value)
    assert cli.main(["probe"]) == status
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("error", "status"), [(RequestError("a=1:\n no"), 2), (RunError("disk full"), 1)])
def test_errors_are_one_line(command, capsys, error, status):
    command.main = returns(error)
    assert cli.main(["probe"]) == status
    assert complaint(capsys) == f"visor: {' '.join(str(error).split())}\n"


def test_an_accelerator_that_cannot_be_used_is_one_line(command, capsys, monkeypatch, tmp_path):
    lock = tmp_path / "libtpu_lockfile"
    monkeypatch.setattr(command_line, "LOCK_FILE", lock)
    command.main = returns(RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use"))
    assert cli.main(["probe"]) == 1
    assert complaint(capsys).endswith("ABORTED: The TPU is already in use\n")
    lock.touch()
    assert cli.main(["probe"]) == 1
    assert f"already in use; remove {lock} once no program uses the TPU" in complaint(capsys)


@pytest.mark.parametrize(
    ("platform", "message"),
    [("cuda", "JAX_PLATFORMS=cuda: JAX finds no such device"), ("xyz", "Unable to initialize backend 'xyz'")],
)
def test_a_platform_that_is_not_installed_is_one_line(tmp_path, platform, message):
    arguments = f"train --config={MINI} --config.stage=base --workdir={tmp_path}/run".split()
    done = visor(*arguments, env={**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"visor: {message}")


def test_the_keyboard_stops_it_with_130(command):
    command.main = returns(KeyboardInterrupt())
    assert cli.main(["probe"]) == 130


def test_status_143_passes(command):
    command.main = returns(SystemExit(143))
    with pytest.raises(SystemExit) as caught:
        cli.main(["probe"])
    assert caught.value.code == 143


def test_a_defect_keeps_its_traceback(command):
    command.main = returns(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prbe"], "'prbe': unknown command; did you mean 'probe'?"),
        (["xyz"], "'xyz': unknown command; expected one of"),
        (["probe", "extra"], "probe: unexpected argument 'extra'"),
        (["probe", "--imge=3"], "probe: unexpected argument '--imge=3'; did you mean '--image'?"),
        (["generate", "--imgae=a.png"], "generate: unexpected argument '--imgae=a.png'; did you mean '--image'?"),
        (["generate", "--image=a", "--qeustion", "b"], "unexpected argument '--qeustion'; did you mean '--question'?"),
        (["train", "--workdr=a"], "train: unexpected argument '--workdr=a'; did you mean '--workdir'?"),
        (["probe", "--confg.train.steps=3"], "did you mean '--config.train.steps'?"),
        (["probe", "--im=3"], "probe: unexpected argument '--im=3'"),
        (["probe", "--image=x"], "invalid int value: 'x'"),
        (["probe", "--image"], "expected one argument"),
        (["probe", f"--config={MINI}", "--config.train.steps", "3"], "expected --config.train.steps=3"),
        (["probe", f"--config={MINI}", "--config.train.steps"], "expected --config.train.steps=VALUE"),
        (["probe", f"--config={MINI}", "--config.train.stepz=3"], "did you mean 'train.steps'?"),
        (["probe", "--config.train.steps=3"], "changes nothing without --config"),
        (["probe", "--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["probe", "--workdir=a\udcff"], "expected UTF-8"),
        (["--workdir=x", "probe"], "'--workdir=x': unknown command"),
    ],
)
def test_requests_that_are_wrong(command, capsys, arguments, expected):
    assert cli.main(arguments) == 2
    assert expected in complaint(capsys)


def test_a_flag_given_twice_is_said(command, caplog):
    calls = []
    command.main = returns(None, calls)
    assert cli.main(["probe", "--image=1", "--image=2"]) == 0
    assert calls[0][0].image == 2
    assert "--image is given 2 times: the last one counts" in caplog.text


def test_the_configuration_reaches_the_command(command):
    calls = []
    command.main = returns(None, calls)
    assert cli.main(["probe", f"--config={MINI}", "--workdir=w", "--config.seed=4", "--config.train.steps=3"]) == 0
    args, config = calls[0]
    assert (args.workdir, args.json, config.seed, config.train.steps, config.name) == ("w", False, 4, 3, "almanac_mini")


@pytest.mark.parametrize("source", ["workdir", "optional"])
def test_without_config_the_workdir_s_own_is_taken(command, tmp_path, source):
    config = load_config(MINI, ["seed=9"])
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": json.loads(to_json(config))}))
    calls = []
    command.CONFIG, command.main = source, returns(None, calls)
    assert cli.main(["probe", f"--workdir={tmp_path}", "--config.evaluate.samples=8"]) == 0
    assert (calls[0][1].seed, calls[0][1].evaluate.samples) == (9, 8)


def test_a_command_says_what_it_needs(command, capsys, tmp_path):
    command.CONFIG = "required"
    assert cli.main(["probe", f"--workdir={tmp_path}"]) == 2
    assert "--config is missing" in complaint(capsys)
    command.CONFIG = "workdir"
    assert cli.main(["probe"]) == 2
    assert "expected --workdir=DIR" in complaint(capsys)
    assert cli.main(["probe", f"--workdir={tmp_path}"]) == 2
    assert "config.json: no such file" in complaint(capsys)
    command.CONFIG, command.WORKDIR = "optional", "required"
    assert cli.main(["probe"]) == 2
    assert "--workdir is missing" in complaint(capsys)
    command.CONFIG, command.WORKDIR = "none", "optional"
    assert cli.main(["probe", "--config.seed=3"]) == 2
    assert "takes no configuration" in complaint(capsys)
    assert cli.main(["probe", f"--config={MINI}"]) == 2
    assert "unexpected argument '--config=" in complaint(capsys)


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "line"), [({"a": [1, 2.5]}, {"a": [1, 2.5]}), (None, {}), ({"loss": float("nan")}, {"loss": None})]
)
def test_json_is_all_there_is_on_stdout(command, capsys, result, line):
    def main(args, config):
        print("for people")
        return result

    command.main = main
    assert cli.main(["probe", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == line
    assert "for people" in err


def test_help_lists_what_is_installed(command, capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "probe the command line" in text
    for name, module in command_line.COMMANDS.items():
        there = (ROOT / Path(*module.split("."))).with_suffix(".py").exists() or name == "probe"
        assert (f"\n  {name} " in text) == there


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"visor_jax {visor_jax.__version__}\n"


def test_a_command_s_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["probe", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Second paragraph." in text
    assert "--config.FIELD" in text
    assert "--image" in text


def visor(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "visor_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def test_help_needs_no_jax():
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from visor_jax.__main__ import main; main([]); sys.exit('jax' in sys.modules)",
        ],
        capture_output=True,
        cwd=ROOT,
    )
    assert shown.returncode == 0


def test_the_program_itself():
    misspelled = visor("rnu")
    assert (misspelled.returncode, misspelled.stdout) == (2, "")
    assert misspelled.stderr.startswith("visor: 'rnu': unknown command")
    assert visor("--help").stdout.startswith("usage: visor COMMAND")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_a_reader_that_leaves_is_no_failure(arguments):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "visor_jax", *arguments]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        (">/dev/full", 1, "visor: standard output: No space left on device\n"),
        (">&-", 2, "visor: standard output: is closed; expected somewhere to write to, such as >/dev/null\n"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        ("<&- 2>&-", 0, ""),
    ],
)
@pytest.mark.parametrize("arguments", ["--version", f"plan --config={MINI} --image=64x64 --json"])
def test_standard_streams_that_are_full_or_closed(arguments, redirection, status, message):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m visor_jax {arguments} {redirection}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == status and done.stderr.endswith(message) and "Traceback" not in done.stderr
    assert done.stderr.count("visor: ") == bool(message)


def test_a_long_command_outlives_the_reader_of_its_output():
    script = (
        "import sys; from visor_jax.commands import command_line as c; "
        "from visor_jax.workdir.supervision import watched\n"
        "c.own_standard_streams()\nwith watched(600):\n for _ in range(9): print('x' * 9999, flush=True)\n"
        "print('done', file=sys.stderr)"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "done\n")


def test_text_that_no_terminal_can_show_is_printed_all_the_same(monkeypatch):
    script = (
        "import sys; from visor_jax.commands import command_line as c; c.own_standard_streams();"
        "print('\\ud800 gr\\u00fcn')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "\\ud800 gr\\xfcn\n"


def test_a_log_line_is_one_line_and_cannot_be_forged():
    record = logging.LogRecord("visor_jax", logging.WARNING, "", 0, "task %s", ("a\nvisor: \x1b[2Jdone",), None)
    assert command_line._OneLine("visor: %(message)s").format(record) == r"visor: task a visor: \x1b[2Jdone"


def test_tracebacks_are_those_of_our_own_defects():
    formatted = {}
    for name in ("orbax", "visor_jax"):
        try:
            raise OSError(28, "No space\nleft")
        except OSError:
            record = logging.LogRecord(name, logging.ERROR, "", 0, "saving %s", ("a",), sys.exc_info())
        formatted[name] = command_line._OneLine("visor: %(message)s").format(record)
    assert formatted["orbax"] == "visor: saving a: [Errno 28] No space left"
    assert formatted["visor_jax"].startswith("visor: saving a\nTraceback")


@pytest.mark.parametrize(
    ("name", "place", "is_printed"),
    [
        ("absl", "/site/orbax/checkpoint/handler.py", False),
        ("absl", "/site/grain/x.py", True),
        ("visor_jax", "/x", True),
    ],
)
def test_what_orbax_logs_of_a_failed_save_is_said_once(name, place, is_printed):
    assert command_line._is_news(logging.LogRecord(name, logging.ERROR, place, 0, "failed", None, None)) is is_printed


def test_errors_after_an_interrupt_are_the_interrupt_s(command, monkeypatch):
    """Libraries raise other errors for a KeyboardInterrupt."""

    def main(args, config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("cannot import") from None

    command.main = main
    assert cli.main(["probe"]) == 130


def test_an_error_of_the_system_is_one_line(command, capsys):
    command.main = returns(PermissionError(13, "Permission denied", "/some/where"))
    assert cli.main(["probe"]) == 2
    assert complaint(capsys) == "visor: /some/where: Permission denied\n"
    command.main = returns(OSError(9, "Bad file descriptor"))
    with pytest.raises(OSError, match="Bad file"):
        cli.main(["probe"])
