"""Pages, docstrings and comments name only files, modules and names of this repository that exist.

Reads every Markdown page, shell script and template, and docstrings and comments of every Python file. The changelog
is excluded, because it names former files.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("visor_jax", "visor_jax_data", "tests", "docs", "configs", "benchmarks", "launch", "examples")
PAGES = (".md", ".sh", ".j2")

# A path or file name with one of these endings; data files are not listed, because most of them are outputs of a run.
FILE = re.compile(r"(?<![\w./$}*-])((?:[\w-]+/)*[\w-]+\.(?:py|md|sh|j2|toml))\b(?!/)")
FOLDER = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/(?:[\w-]+/)*)(?![\w<*{{])")
MODULE = re.compile(r"(?<![\w./-])visor_jax((?:\.[A-Za-z_]\w*)+)")
CODE = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\([^`]*\))?`")
WORD = re.compile(r"\w+")
LINK = re.compile(r"\]\(([^)#\s]+)")

LIBRARIES = ("jax", "jnp", "np", "nnx", "flax", "optax", "torch", "transformers", "huggingface_hub", "sklearn", "PIL")
# Names of other projects and placeholders that do not occur in code here.
FOREIGN = {
    "FILE.py",
    "EventFileWriter",
    "Fast",
    "Pil",
    "Qwen2RotaryEmbedding",
    "anyres_max_N",
    "apply_pooling",
    "configs/X.py",
    "convert_llava_onevision_weights_to_hf.py",
    "getrusage",
    "image_b",
    "jax_default_matmul_precision",
    "receipts.py",  # the example of docs/add_a_benchmark.md, with two more
    "make_receipts.py",
    "test_receipts.py",
    "shades.py",  # the example of docs/your_data.md
    "tests/model/reduction/test_even.py",  # the example of docs/add_a_reduction.md, with one more
    "visor_jax/model/reduction/even.py",
    "utils.py",
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Repository:
    """Existing files and names, and the prose that refers to them.

    Fields:
      files: paths relative to the root, and each of their tails ("api.py", "attention/api.py", ...).
      folders: likewise.
      names: words of code and its strings, stems of files and names of folders.
      members: path of a Python file, or name of a class in visor_jax -> names that it defines.
      prose: (path, line, text) of every docstring, comment and line of a page.
    """

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    members: dict[str, set[str]] = field(default_factory=dict)
    prose: list[tuple[str, int, str]] = field(default_factory=list)


def tails(path: str) -> Iterator[str]:
    parts = path.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def defined(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Returns the names that a module or class binds, with `self.name = ...` in the methods of a class."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            yield from defined(statement.body)
        else:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
                elif isinstance(node, ast.alias):
                    yield (node.asname or node.name).split(".")[0]


def members_of(node: ast.ClassDef, source: str) -> set[str]:
    """Returns the names that a class defines, and `*` if it inherits others."""
    class_source = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    return {*defined(node.body), *re.findall(r"\bself\.(\w+)", class_source), *("*" for _ in node.bases)}


def documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Returns the module, and its classes and functions at any depth."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, DOCUMENTED):
            yield node
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def read_python(repository: Repository, path: str, source: str) -> None:
    """Adds the words of the code, the definitions, the docstrings and the comments of a Python file."""
    tree = ast.parse(source)
    code = source.splitlines()
    if path.startswith("visor_jax/"):
        repository.members[path] = set(defined(tree.body))
    for node in documented(tree):
        if isinstance(node, ast.ClassDef) and path.startswith("visor_jax/"):
            repository.members.setdefault(node.name, set()).update(members_of(node, source))
        if (text := ast.get_docstring(node, clean=False)) is not None:
            first = node.body[0]
            repository.prose.append((path, first.lineno, text))
            code[first.lineno - 1 : first.end_lineno] = [""] * ((first.end_lineno or first.lineno) - first.lineno + 1)
    for number, line in enumerate(code, 1):
        before, mark, comment = line.partition("# ")
        if mark:
            repository.prose.append((path, number, comment))
        repository.names.update(WORD.findall(before))


@functools.cache
def repository() -> Repository:
    repo = Repository()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                add_file(repo, path)
    for path in sorted(ROOT.iterdir()):
        if path.is_file():
            add_file(repo, path)
    return repo


def add_file(repository: Repository, path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    repository.files.update(tails(name))
    repository.names.update([path.stem, *Path(name).parts])
    for folder in Path(name).parents[:-1]:
        repository.folders.update(tails(folder.as_posix()))
    if path.suffix == ".py" and name != "tests/test_docs.py":
        read_python(repository, name, path.read_text(encoding="utf-8"))
    elif path.suffix in PAGES and name != "CHANGELOG.md":
        lines = path.read_text(encoding="utf-8").splitlines()
        repository.prose += [(name, number, line) for number, line in enumerate(lines, 1)]


def unknown_module(dotted: str, repo: Repository) -> bool:
    """Returns whether "visor_jax.a.b.Class" does not exist; `unknown_name` checks attributes of the class."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        module = f"{path}.py" if f"{path}.py" in repo.members else f"{path}/__init__.py"
        if module in repo.members:
            rest = parts[end:]
            dunder = rest and rest[0].startswith("__")
            return bool(rest) and not dunder and rest[0] not in repo.members[module] | exported(module, repo)
    return True


def exported(module: str, repo: Repository) -> set[str]:
    """Returns the names that `visor_jax/__init__.py` imports when they are first used."""
    return {"load", "Visor", "Plan", "Budget"} & repo.names if module == "visor_jax/__init__.py" else set()


def unknown_name(dotted: str, repo: Repository) -> bool:
    """Returns whether a part of `a.b.c` does not occur in code, or a class of this package lacks the attribute."""
    parts = dotted.split(".")
    if dotted in FOREIGN or parts[0] in LIBRARIES:
        return False
    if any(part not in repo.names for part in parts):
        return True
    owner = repo.members.get(parts[0])
    if owner is None or len(parts) == 1 or "*" in owner:
        return False
    return parts[1] not in owner and not parts[1].startswith("__")


def unknown_references(text: str, repo: Repository) -> list[str]:
    """Returns the files, folders, modules and `names` in a text that this repository does not have."""
    unknown = [name for name in FILE.findall(text) if name not in repo.files | FOREIGN]
    unknown += [name for name in FOLDER.findall(text) if name.rstrip("/") not in repo.folders]
    unknown += [f"visor_jax{rest}" for rest in MODULE.findall(text) if unknown_module(f"visor_jax{rest}", repo)]
    unknown += [name for name in CODE.findall(text) if f"{name}" not in unknown and unknown_name(name, repo)]
    return unknown


def test_prose_names_only_what_exists() -> None:
    repo = repository()
    unknown = [f"{path}:{line}: {name}" for path, line, text in repo.prose for name in unknown_references(text, repo)]
    assert not unknown, "\n".join(["these do not exist:", *unknown])


def test_links_between_pages_lead_to_files() -> None:
    unknown = [
        f"{path}:{line}: {link}"
        for path, line, text in repository().prose
        if path.endswith(".md")
        for link in LINK.findall(text)
        if "://" not in link and not (ROOT / path).parent.joinpath(link).exists()
    ]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see visor_jax/vision.py and docs/kernels.md", ["visor_jax/vision.py"]),
        ("the tables (`splits.py`), `api.py`", ["splits.py"]),
        ("tests/hf/test_nothing.py, visor_jax/nowhere/", ["tests/hf/test_nothing.py", "visor_jax/nowhere/"]),
        ("visor_jax.errors.RequestError, visor_jax.errors.NoError", ["visor_jax.errors.NoError"]),
        ("`visor_jax.load`, visor_jax.api.load", ["visor_jax.api.load"]),
        ("`Workdir.claim`, `Workdir.looked_at`", ["Workdir.looked_at"]),
        ("`seed_sequence`, `seed_sequel(seed)`", ["seed_sequel"]),
        ("`transformers.Anything`, `model.text.vocab_size`, runs/x/report/index.html", []),
    ],
)  # fmt: skip
def test_a_reference_to_nothing_is_found(text: str, expected: list[str]) -> None:
    repo = repository()
    assert unknown_references(text, repo) == expected
