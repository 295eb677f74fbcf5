"""Public functions annotate the shapes of their array arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import visor_jax.errors

PACKAGE = Path(visor_jax.errors.__file__).parent
# Functions of modules whose names end in _kernels run inside Pallas kernels, on references and blocks.
MODULES = sorted(
    path.relative_to(PACKAGE)
    for room in ("kernels", "model", "train")
    for path in (PACKAGE / room).rglob("*.py")
    if not path.stem.endswith("_kernels")
)


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)


def has_bare_array(annotation: ast.expr | None) -> bool:
    """Returns whether an annotation has `Array` without a shape, except in the arguments of a callable."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value)
        if name == "Callable" or (isinstance(annotation.slice, ast.Tuple) and _is_shape(annotation.slice.elts[-1])):
            return False
    if ast.unparse(annotation) in ("Array", "jax.Array"):
        return True
    return any(has_bare_array(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def _is_shape(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_public_array_argument_is_without_a_shape(path: Path) -> None:
    body = ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body
    bare = [
        f"{function.name}({argument.arg}: {ast.unparse(argument.annotation)}), line {function.lineno}"
        for function in public_functions(body)
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and has_bare_array(argument.annotation)
    ]
    assert not bare, bare


@pytest.mark.parametrize(
    ("annotation", "bare"),
    [
        ("Array", True),
        ("jax.Array | None", True),
        ("dict[str, jax.Array]", True),
        ('Float[Array, "B T"] | None', False),
        ('dict[str, Shaped[Array, "..."]]', False),
        ("Callable[..., Array]", False),
    ],
)
def test_what_counts_as_bare(annotation: str, bare: bool) -> None:
    assert has_bare_array(ast.parse(annotation, mode="eval").body) is bare
