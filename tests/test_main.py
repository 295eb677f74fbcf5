"""The command line: what is listed, what is refused and with which status, and what `--json` promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
MINI = str(ROOT / "configs" / "glyphs_mini.py")


@pytest.fixture
def command(monkeypatch):
    """Installs a command called `probe`; returns the module, whose `main` a test sets."""
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


def returns(value, seen: list | None = None):
    def main(args, config):
        if seen is not None:
            seen.append((args, config))
        if isinstance(value, BaseException):
            raise value
        return value

    return main


def complaint(capsys) -> str:
    """What was said on stderr: one line that starts with the program's name."""
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
        (["xyz"], "'xyz': unknown command; there are"),
        (["probe", "extra"], "probe: unexpected argument 'extra'"),
        (["probe", "--imge=3"], "probe: unexpected argument '--imge=3'; did you mean '--image'?"),
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
    seen = []
    command.main = returns(None, seen)
    assert cli.main(["probe", "--image=1", "--image=2"]) == 0
    assert seen[0][0].image == 2
    assert "--image is given 2 times: the last one counts" in caplog.text


def test_the_configuration_reaches_the_command(command):
    seen = []
    command.main = returns(None, seen)
    assert cli.main(["probe", f"--config={MINI}", "--workdir=w", "--config.seed=4", "--config.train.steps=3"]) == 0
    args, config = seen[0]
    assert (args.workdir, args.json, config.seed, config.train.steps, config.name) == ("w", False, 4, 3, "glyphs_mini")


@pytest.mark.parametrize("source", ["workdir", "optional"])
def test_without_config_the_workdir_s_own_is_taken(command, tmp_path, source):
    config = load_config(MINI, ["seed=9"])
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": json.loads(to_json(config))}))
    seen = []
    command.CONFIG, command.main = source, returns(None, seen)
    assert cli.main(["probe", f"--workdir={tmp_path}", "--config.evaluate.samples=8"]) == 0
    assert (seen[0][1].seed, seen[0][1].evaluate.samples) == (9, 8)


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
    wrong = visor("rnu")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("visor: 'rnu': unknown command")
    assert visor("--help").stdout.startswith("usage: visor COMMAND")


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_a_reader_that_leaves_is_no_failure(arguments):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "visor_jax", *arguments]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
