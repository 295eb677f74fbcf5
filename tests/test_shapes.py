"""Functions and records of kernels/, model/ and train/ declare the shapes of their arrays; the tests check them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import visor_jax.errors
from visor_jax.kernels.attention.merge_partials import merge_partials
from visor_jax.model.connector import stitch
from visor_jax.train.objectives.answers import turn_correct

PACKAGE = Path(visor_jax.errors.__file__).parent
MODULES = sorted(
    path.relative_to(PACKAGE) for folder in ("kernels", "model", "train") for path in (PACKAGE / folder).rglob("*.py")
)


# --- annotations ------------------------------------------------------------------------------------------------------


def public_annotations(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None]]:
    """Names and annotations: arguments and results of public functions, fields of public classes, aliases of types."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if argument.arg not in ("self", "cls"):
                    yield f"{node.name}({argument.arg}), line {argument.lineno}", argument.annotation
            if node.returns is not None:
                yield f"{node.name}() ->, line {node.lineno}", node.returns
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_annotations(node.body)
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    yield f"{node.name}.{ast.unparse(field.target)}, line {field.lineno}", field.annotation
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            yield f"{ast.unparse(node.targets[0])}, line {node.lineno}", node.value


def has_bare_array(annotation: ast.expr) -> bool:
    """Whether `annotation` contains an array type without a shape. Signatures of callables do not count."""
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value)
        if name == "Callable" or (isinstance(annotation.slice, ast.Tuple) and _is_shape(annotation.slice.elts[-1])):
            return False
    if ast.unparse(annotation) in ("Array", "jax.Array", "np.ndarray"):
        return True
    return any(has_bare_array(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))


def _is_shape(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_public_array_is_without_a_shape(path: Path) -> None:
    annotations = list(public_annotations(ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body))
    missing = [name for name, annotation in annotations if annotation is None]
    bare = [name for name, annotation in annotations if annotation is not None and has_bare_array(annotation)]
    assert not missing and not bare, (missing, bare)


@pytest.mark.parametrize(
    ("annotation", "bare"),
    [
        ("Array", True),
        ("jax.Array | None", True),
        ("dict[str, jax.Array]", True),
        ("tuple[np.ndarray, int]", True),
        ('Int[np.ndarray, " N"]', False),
        ('Float[Array, "B T"] | None', False),
        ('dict[str, Shaped[Array, "..."]]', False),
        ("Callable[..., Array]", False),
    ],
)
def test_what_counts_as_bare(annotation: str, bare: bool) -> None:
    assert has_bare_array(ast.parse(annotation, mode="eval").body) is bare


# --- checks at run time -----------------------------------------------------------------------------------------------


def test_tests_check_shapes_in_kernels() -> None:
    outs, log_sums = jnp.zeros((2, 3, 1, 4, 8)), jnp.zeros((2, 3, 1, 5))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"merge_partials[\s\S]*log_sums"):
        merge_partials(outs, log_sums)


def test_tests_check_shapes_in_the_model() -> None:
    features, newline, weights = jnp.zeros((2, 1, 9, 8)), jnp.zeros(8), jnp.zeros((2, 5, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"stitch[\s\S]*weights"):
        stitch(features, newline, jnp.zeros((2, 6, 4), jnp.int32), weights)


def test_tests_check_dtypes_in_training() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match=r"turn_correct[\s\S]*correct"):
        turn_correct(jnp.zeros((2, 5)), jnp.zeros((2, 6), jnp.int32), 3)


def test_tests_refuse_implicit_broadcasting_between_ranks() -> None:
    assert jax.config.jax_numpy_rank_promotion == "raise"
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)
