"""The floors of the package: which room may import which, read from the import statements.

An import refers to a lower floor or to its own room. Every import counts, also in functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import visor_jax.errors

PACKAGE = Path(visor_jax.errors.__file__).parent

# Bottom to top. Rooms of one floor do not import each other, except the ground floor, where each file may import
# earlier ones.
GROUND = ("errors", "files", "tree", "architecture", "budget", "cost")
FLOORS = (
    *((name,) for name in GROUND),
    ("config",),
    ("workdir", "kernels"),
    ("scale",),
    ("data", "model"),
    ("hf",),
    ("checkpoint",),
    ("generate",),
    ("loading",),
    ("evaluate",),
    ("adapt", "train"),
    ("export", "report", "planning"),
    ("analysis",),
    ("launching",),
    ("testing", "commands"),
    ("__init__", "__main__"),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FILES = 450, 9


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Returns (line, room) of every import of this package's modules in one of its files."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside = ["visor_jax", *path.parts][: -node.level]
            names = [".".join([*inside, *filter(None, [node.module])])]
        elif isinstance(node, ast.ImportFrom) and node.module == "visor_jax":
            names = [f"visor_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] == "visor_jax":
                room = name.split(".")[1] if "." in name else "__init__"
                yield node.lineno, room if room in FLOOR_OF else "__init__"


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_an_import_goes_down_or_stays_in_its_room(path: Path) -> None:
    room = room_of(path)
    if path.parts[:2] == ("export", "torch_model"):  # copied into exported folders, where visor_jax is not installed
        pieces = {"data"} if path.name == "template_visor.py" else set()  # from data/chat_template.py
        assert {to for _, to in imported(path)} <= {"export", *pieces}
    wrong = [
        f"line {line} imports {to}"
        for line, to in imported(path)
        if to != room
        and FLOOR_OF[to] >= FLOOR_OF[room]
        and not (to == "__init__" and room in ("commands", "launching"))
    ]
    assert not wrong, f"visor_jax/{path} is on the floor of {room}: {'; '.join(wrong)}"


def test_every_room_stands_on_a_floor() -> None:
    assert {room_of(path) for path in MODULES} <= FLOOR_OF.keys()


def test_the_hall_is_small_and_files_are_short() -> None:
    hall = [path.name for path in PACKAGE.iterdir() if path.is_file()]
    assert len(hall) <= MAX_FILES, hall
    lines = {str(path): len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_the_architecture_page_shows_these_floors() -> None:
    """Each row of the table in docs/architecture.md lists the existing rooms of one floor."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("| floor, bottom to top |")[1].split("\n\n")[0]
    shown = [
        {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`(\w+(?:\.py|/))`", row.split("|")[2])}
        for row in table.splitlines()[2:]
    ]
    rooms = {room_of(path) for path in MODULES}
    assert shown == [rooms & set(GROUND), *(rooms & set(floor) for floor in FLOORS[len(GROUND) :])]


def test_tests_mirror_the_package() -> None:
    """Every folder of tests corresponds to one of the package or of the repository, or has tests of whole runs."""
    here = Path(__file__).parent
    outside = {
        "benchmarks",
        "benchmarks/paper",
        "examples",
        "faults",
        "launch",
        "launch/slurm",
        "export/peer",
        "visor_jax_data",
    }
    folders = {path.relative_to(here) for path in here.rglob("*") if path.is_dir() and any(path.glob("test_*.py"))}
    assert {str(path) for path in folders if not (PACKAGE / path).is_dir()} <= outside
