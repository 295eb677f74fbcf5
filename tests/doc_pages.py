"""Reads the fenced code of a page of docs/, and runs it as a reader would: files, Python, and commands.

A block of code whose first line is a comment with a file's name ("# receipts.py") is that file. Other Python blocks are
executed in order, with the names of the blocks before them. Of `bash` blocks each line is a command: `visor` runs in
this process, anything else in a shell. A block after the comment `<!-- not run: why -->` is left out, and so are blocks
of other languages.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.__main__ import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?P<skip><!-- not run: .*? -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
FILE = re.compile(r"# (\S+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, and its text without the fences."""

    language: str
    text: str


def blocks(page: str, *languages: str) -> list[Block]:
    """Returns the blocks of a Markdown text that are to be run, of these languages."""
    found = [match for match in BLOCK.finditer(page) if not match["skip"]]
    return [Block(match["language"], match["text"]) for match in found if match["language"] in languages]


def commands(block: str) -> Iterator[str]:
    """Yields the command lines of a `bash` block; lines that end with a backslash go on in the next one."""
    for line in block.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield line


def run_command(line: str, package: Path = ROOT) -> None:
    """Runs a command line of a page in the current folder; `package` is the folder that has visor_jax."""
    words = shlex.split(line, comments=True)
    if words[0] == "visor" and package == ROOT:
        assert main(words[1:]) == 0, line
        return
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), "."]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = f'visor() {{ python -m visor_jax "$@"; }}\n{line}'
    done = subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def run_page(name: str, package: Path = ROOT) -> dict[str, Any]:
    """Runs a page of docs/ in the current folder and returns the names that its Python blocks define."""
    names: dict[str, Any] = {}
    for block in blocks((ROOT / "docs" / name).read_text(encoding="utf-8"), "python", "bash"):
        file = FILE.match(block.text)
        if file is not None:
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, name, "exec"), names)
        else:
            for line in commands(block.text):
                run_command(line, package)
    return names
