"""Writes docs/paper.md from the entries and the results that are there.

In: the folder of the results. Out: the page: for every entry what it shows, the paper's numbers beside ours, the
commands, and the same table on the embedded data set. A test compares the page with what this file writes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from visor_jax.files.read_write import write_text

from .base import BY_FORMULA, UNKNOWN, Entry, Settings, comparison, markdown, small_table
from .collected import collected
from .entries import ENTRIES
from .runs import VARIABLES
from .savings import COMMAND
from .small import Claimed

WIDTH = 118
SCALES = (1.0, 3.0)  # how many times the steps of the shipped configuration


def write(results: Path, docs: Path) -> None:
    """Writes the page."""
    write_text(docs / "paper.md", page(results))


def page(results: Path) -> str:
    """Returns the page's Markdown."""
    shown: dict[str, str] = {}
    lines = [*introduction()]
    for entry in ENTRIES:
        lines += section(entry, results, shown)
    return "\n".join(lines)


def introduction() -> list[str]:
    """Returns the page's first lines."""
    variables = [f"{name}=...".ljust(12) + f"  # {about}" for name, about in VARIABLES.items()]
    return [
        "# Reproduce the paper",
        "",
        *paragraph(
            "*VISion On Request* (arXiv 2603.23495), table by table and figure by figure: what is run, the paper's"
            " numbers beside ours, and the same table on the data set that this package embeds. Made by `python"
            " benchmarks/paper/run.py --page`; a test parses every command below and compares this page with its"
            " entries in `benchmarks/paper/`."
        ),
        *paragraph(
            "**Nobody has run the paper's scale with this package**: it needs accelerators and the paper's 4 M and"
            f" 3.2 M samples. Our cells there are empty, except those with {BY_FORMULA}: savings by formula, for a page"
            " of 1700 x 2200 pixels (7,353 visual tokens) and 60 text tokens unless the entry says otherwise."
            f' "{UNKNOWN}": the paper has the number,'
            " or may have it, and this project does not. What tables 6 and 7 and figures 5, 8 and 9 show is not known"
            " here."
        ),
        "```bash",
        "python benchmarks/paper/run.py --list",
        "python benchmarks/paper/run.py --entry table2                 # its commands, and the table",
        "python benchmarks/paper/run.py --entry table2 --collect=$RUNS # keeps what they have measured",
        "python benchmarks/paper/run.py --entry table2 --small         # on the embedded data set, hours on a CPU",
        "python benchmarks/paper/run.py --entry table2 --small --dry-run",
        "```",
        "",
        *paragraph(
            "`--small` takes the results of [claims.md](claims.md) that are there and trains what is missing;"
            " `--steps-scale=0.02 --runs=/tmp/x --results=/tmp/x/benchmarks/results` is a trial. On the embedded data"
            ' set a model has six layers and two slots, a picture is one tile of 64 visual tokens, and "hard" are the'
            " hard questions that count (claims.md); so savings and accuracies are of another size. They can show the"
            " order of the rows, not the paper's numbers. The means are over the seeds that all variants of a"
            " table have."
        ),
        "Run the blocks in their order; each continues from the ones before and from these variables:",
        "",
        "```bash",
        *variables,
        "```",
        "",
        "`" + COMMAND + "`",
        "prints the savings by formula.",
        "",
    ]


def section(entry: Entry, results: Path, shown: dict[str, str]) -> list[str]:
    """Returns the section of an entry.

    Args:
      shown: commands of earlier sections, which are not repeated: {command: ""}, and {variable: the line that set it}.
    """
    commands = entry.paper.commands()
    new = [line for line in commands if line not in shown and not assigned(line)]
    used = [line for line in commands if assigned(line) and any(f"${assigned(line)}" in command for command in new)]
    block = [line for line in commands if line in new or (line in used and shown.get(assigned(line)) != line)]
    shown.update(dict.fromkeys(new, "") | {assigned(line): line for line in used})
    lines = [f"## {entry.title}", "", *paragraph(entry.about)]
    lines += [*markdown(list(comparison(entry, collected(entry, results)))), ""]
    if block:
        lines += ["```bash", *(part for line in block for part in folded(line)), "```", ""]
    if any(line.startswith("visor") and line not in new for line in commands):
        lines += ["Runs that stand above are not repeated." if new else "The runs stand above.", ""]
    return lines + small_section(entry, results)


def small_section(entry: Entry, results: Path) -> list[str]:
    """Returns the tables of the embedded data set: the whole one, and of longer training the rows that were run."""
    lines: list[str] = []
    for scale in SCALES if isinstance(entry.small, Claimed) else SCALES[:1]:
        cells = entry.small.read(Settings((1,), scale, 1024, results, Path("runs")))
        if cells:
            times = "" if scale == 1 else f", {scale:g} times as many training steps"
            keys = ["", *(row.key for row in entry.small_rows or entry.rows)]  # of the heading, then of the rows
            rows = zip(keys, small_table(entry, cells), strict=True)
            table = [row for key, row in rows if scale == 1 or not key or key in cells]
            lines += [f"On the embedded data set{times}:", "", *markdown(table), ""]
    return lines


def assigned(line: str) -> str:
    """Returns the variable that a line sets; "" if it sets none."""
    name, mark, _ = line.partition('="')
    return name if mark and name.isidentifier() else ""


def paragraph(prose: str) -> list[str]:
    """Returns prose as lines, and an empty line; nothing for no prose."""
    return [*textwrap.wrap(prose, WIDTH, break_long_words=False, break_on_hyphens=False), ""] if prose else []


def folded(command: str) -> Iterator[str]:
    """Yields a command in lines that fit the page."""
    indent = ""
    while len(indent + command) > WIDTH:
        cut = command.rfind(" ", 0, WIDTH - len(indent) - 2)
        cut = cut if cut > 0 else len(command)
        if cut == len(command):
            break
        yield f"{indent}{command[:cut]} \\"
        command, indent = command[cut + 1 :], "  "
    yield indent + command


def unfolded(lines: Sequence[str]) -> list[str]:
    """Returns the commands of a block, each in one line: the reverse of `folded`."""
    return "\n".join(lines).replace(" \\\n  ", " ").splitlines()
