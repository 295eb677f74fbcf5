"""How commands are run or printed: no shell, one line per error, and a dry run that can be pasted into a shell."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from visor_jax.errors import RequestError, RunError
from visor_jax.launching.steps import Command, Runner, last_error


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sh(text: str, *arguments: str) -> Command:
    """Returns a command whose program does what the text says, with these arguments."""
    return Command(("sh", "-c", text, "sh", *arguments), "do it")


def test_arguments_reach_a_program_as_they_are(here: Path) -> None:
    words = ("a b", "$(touch ran)", "`touch ran`", "'\";&|<>", "new\nline", "\u00e9", "")
    done = Runner("first").run(sh('printf "%s|" "$@"', *words))
    assert done.out == "|".join([*words, ""]) and not (here / "ran").exists()


def test_what_a_dry_run_prints_runs_the_same_command(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    command = Command(
        ("sh", "-c", 'printf "%s|" "$A" "$@"', "sh", "a b", "$(touch ran)", "'"), "do it", "yes", "", (("A", "c d"),)
    )
    runner = Runner("first", dry_run=True)
    assert runner.run(command).out == "yes"
    done = subprocess.run(["bash", "-c", capsys.readouterr().out], capture_output=True, text=True, check=True)
    assert done.stdout == Runner("first").run(command).out == "c d|a b|$(touch ran)|'|"
    assert runner.shown == [command.argv] and not (here / "ran").exists()


@pytest.mark.parametrize("text", ["plain\n", "no new line", "VISOR_END\nVISOR_END_\ntouch ran\n", "$HOME `id` \\ '\n"])
def test_a_file_of_a_dry_run_is_the_file(text: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    path = Runner("first", dry_run=True).write("file.txt", text)
    assert not path.exists()
    subprocess.run(["bash", "-c", capsys.readouterr().out], check=True)
    assert path.read_text().rstrip("\n") == text.rstrip("\n") and not (here / "ran").exists()
    assert Runner("first").write("file.txt", text).read_text() == text


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "sh: could not do it: exit status 3"),
        ("echo fine; echo 'ERROR: (x) no quota' >&2; echo 'more help' >&2; exit 1", "do it: ERROR: (x) no quota"),
        ("printf 'first\\nlast \\033[31m' >&2; exit 1", "do it: last \\x1b[31m"),
    ],
)
def test_a_failure_is_one_line(script: str, message: str) -> None:
    with pytest.raises(RunError) as error:
        Runner("first").run(sh(script))
    assert str(error.value).endswith(message) and str(error.value).isprintable()


def test_an_expected_failure_is_a_result() -> None:
    done = Runner("first").run(sh("echo 'Error: Not Found' >&2; exit 5"), accept=("not found",))
    assert (done.status, done.err) == (5, "Error: Not Found\n")


def test_a_missing_program_and_missing_credentials_are_wrong_requests() -> None:
    with pytest.raises(RequestError, match="nothing-like-this: not found on PATH; buy it, or use --dry-run"):
        Runner("first").run(Command(("nothing-like-this",), "do it", missing="buy it"))
    with pytest.raises(RequestError, match=r"do it: .*active account.*; no credentials: "):
        Runner("first").run(sh("echo 'error: You do not currently have an active account' >&2; exit 1"))
    with pytest.raises(RequestError, match=r"do it: no project; give --project=ID"):
        Runner("first").run(sh("echo 'ERROR: parsing'; echo 'Failed to find attribute [project]. Set it:'; exit 1"))


def test_a_dry_run_says_so_and_only_a_dry_run_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    command = Command(("false",), "look", "x", premise="ready")
    for dry_run, marked in ((True, "visor (dry run): done\n"), (False, "visor: done\n")):
        runner = Runner("first", dry_run=dry_run)
        runner.say("done")
        assert capsys.readouterr().err == marked
    Runner("first", dry_run=True).run(command)
    assert "# look (assumed here: ready)\nfalse" in capsys.readouterr().out
    with pytest.raises(RunError, match="false: could not look: exit status 1"):
        Runner("first").run(command)


def test_output_to_show_goes_where_prints_go(capfd: pytest.CaptureFixture[str]) -> None:
    """With `--json`, to stderr."""
    Runner("first").show(sh("echo to stdout"))
    with contextlib.redirect_stdout(sys.stderr):
        Runner("first").show(sh("echo to stderr"))
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")


def test_the_last_error_of_a_client() -> None:
    assert last_error("") == "" and last_error("a\nb\n") == "b"
    assert len(last_error("error " + "x" * 1000)) == 400
