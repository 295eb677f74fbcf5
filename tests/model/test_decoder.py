"""The scan over super-blocks equals running the layers in sequence, for every budget, with one compiled program."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import Architecture
from visor_jax.model import mixed
from visor_jax.model.decoder import forward, run_layers, select_layer, specialize
from visor_jax.model.layers import Params
from visor_jax.model.mixed import chunk_size, mixed_self_attention
from visor_jax.model.remat import Remat
from visor_jax.model.super_block import cross_layer, joint_layer, text_layer

ARCH = testing.tiny_architecture(7)  # two super-blocks and one layer more
ROWS = (((3, 4), (2, 3)), ((2, 2, 3),))
EVERY_BUDGET = list(itertools.product((False, True), repeat=2))


@pytest.fixture(scope="module")
def inputs() -> tuple[Any, ...]:
    """Parameters of the layers, V, T and the stream; a packed row and a row with two pictures."""
    params = testing.random_params(ARCH)
    layers = {name: params[name] for name in ("blocks", "tail")}
    return layers, *testing.decoder_inputs(ARCH, testing.random_batch(ARCH, ROWS))


def by_hand(params: Params, visual, text, stream, bits) -> tuple[jax.Array, jax.Array]:
    """Runs the layers in sequence, by the definition of the method."""
    for block, on in enumerate(bits):
        layers = select_layer(params["blocks"], block)
        text = TEXT_LAYER(layers["text"], text, stream)
        text = CROSS_LAYER(layers["cross_attention"], layers["cross"], visual, text, stream)
        if on:
            visual, text = JOINT_LAYER(layers["self"], visual, text, stream)
        else:
            text = TEXT_LAYER(layers["self"], text, stream)
    for index in range(ARCH.num_tail_layers if "tail" in params else 0):
        text = TEXT_LAYER(select_layer(params["tail"], index), text, stream)
    return visual, text


def layer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` and its gradient once each; they serve all budgets."""
    program = testing.quick_jit(function)
    backward = testing.quick_jit(lambda arguments, cotangents: jax.vjp(function, *arguments)[1](cotangents))
    wrapped = jax.custom_vjp(program)
    wrapped.defvjp(lambda *arguments: (program(*arguments), arguments), backward)
    return wrapped


TEXT_LAYER = layer(lambda p, t, s: text_layer(p, t, s, ARCH.text)[0])
CROSS_LAYER = layer(lambda c, p, v, t, s: cross_layer(c, p, v, t, s, ARCH.text)[0])
JOINT_LAYER = layer(lambda p, v, t, s: joint_layer(p, v, t, s, ARCH)[:2])


def with_gradients(run: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """((V, T), gradients by parameters, V and T) of a way to run the decoder, for fixed random cotangents."""

    def function(params: Params, visual, text, stream, budget):
        def loss(params, visual, text):
            out = run(params, visual, text, stream, budget)
            return sum(jnp.vdot(x, random_like(x)) for x in out), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, visual, text)
        return out, gradients

    return function


def random_like(x: jax.Array) -> np.ndarray:
    return np.random.default_rng(x.shape[1]).standard_normal(x.shape, np.float32)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Every array within `tolerance` of its own largest magnitude."""
    chex.assert_trees_all_equal_shapes(found, expected)
    expected_leaves = jax.tree.leaves(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), expected_leaves, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        worst = np.max(np.abs(x - y)) / max(1.0, float(np.max(np.abs(y))))
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)} differs by {worst:.2e} of its scale"


@pytest.fixture(scope="module")
def scanned() -> Callable[..., Any]:
    return testing.quick_jit(with_gradients(lambda p, v, t, s, on: forward(p, v, t, s, on, ARCH)))


@pytest.mark.parametrize("bits", EVERY_BUDGET)
def test_scan_equals_unrolled_values_and_gradients(bits, inputs, scanned) -> None:
    expected = with_gradients(by_hand)(*inputs, bits)
    assert_close(scanned(*inputs, np.array(bits)), expected)
    assert_close(testing.quick_jit(specialize(bits, ARCH))(*inputs), expected[0])
    # Weights of every layer matter in every budget: a slot that is off still runs its layer over the text.
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(expected[1]))


def other_by_hand(params: Params, visual, text, stream, bits) -> tuple[jax.Array, jax.Array]:
    """`testing.other_plan`, written down: two text-only layers, two super-blocks of four, one layer over."""
    for index in range(2):
        text = TEXT_LAYER(select_layer(params["head"], index), text, stream)
    for block, on in enumerate(bits):
        layers = select_layer(params["blocks"], block)
        text = TEXT_LAYER(layers["text"]["layer_0"], text, stream)
        if on:
            visual, text = JOINT_LAYER(layers["self"], visual, text, stream)
        else:
            text = TEXT_LAYER(layers["self"], text, stream)
        text = TEXT_LAYER(layers["text"]["layer_1"], text, stream)
        text = CROSS_LAYER(layers["cross_attention"], layers["cross"], visual, text, stream)
    return visual, TEXT_LAYER(select_layer(params["tail"], 0), text, stream)


def test_another_pattern_scans_as_it_is_written_down() -> None:
    arch = testing.other_plan()
    inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    scan = testing.quick_jit(lambda p, v, t, s, on: forward(p, v, t, s, on, arch))
    expected = {bits: other_by_hand(*inputs, bits) for bits in EVERY_BUDGET}
    for bits in EVERY_BUDGET:
        assert_close(scan(*inputs, np.array(bits)), expected[bits])
        assert_close(testing.quick_jit(specialize(bits, arch))(*inputs), expected[bits])
    found = scan(*inputs, np.array([(False, True), (True, False)]))
    for row, bits in enumerate([(False, True), (True, False)]):
        assert_close(jax.tree.map(lambda x, row=row: x[row], found), tuple(x[row] for x in expected[bits]))


@pytest.mark.parametrize("pattern", [("self", "cross"), ("cross", "self", "self"), ("cross", "text", "cross", "self")])
def test_slots_and_cross_attention_may_stand_anywhere(pattern) -> None:
    """Several of a kind in a super-block, and a slot in front of everything: the scan is the layers one by one."""
    arch = testing.tiny_architecture(2 * len(pattern), pattern=pattern)
    inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    bits = tuple(slot % 2 == 0 for slot in range(arch.num_slots))
    expected = testing.quick_jit(specialize(bits, arch))(*inputs)
    assert_close(testing.quick_jit(lambda *x: forward(*x, np.array(bits), arch))(*inputs), expected)


def test_rematerialization_changes_nothing_but_memory() -> None:
    arch, on = testing.tiny_architecture(3), np.array([True])
    inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    inputs = {"blocks": inputs[0]["blocks"]}, *inputs[1:]
    remat = testing.quick_jit(with_gradients(lambda p, v, t, s, on: forward(p, v, t, s, on, arch, remat="full")))
    assert_close(remat(*inputs, on), with_gradients(by_hand)(*inputs, on))
    for policy in get_args(Remat):
        jaxpr = jax.make_jaxpr(lambda *x, p=policy: forward(*x, arch, remat=p))(*inputs, on)
        assert ("remat" in str(jaxpr)) == (policy != "none")


def test_budgets_per_sample_equal_one_by_one(inputs) -> None:
    params, *streams = inputs
    rows = (0, 1, 0, 1, 1, 0)
    batch = [jax.tree.map(lambda x: x[np.array(rows)], x) for x in streams]  # parts of two samples
    budgets = [(True, False), (False, True), (False, False), (True, True), (False, True), (False, True)]
    (visual, text), (of_params, *gradients) = testing.quick_jit(
        with_gradients(lambda p, v, t, s, on: forward(p, v, t, s, on, ARCH))
    )(params, *batch, np.array(budgets))

    def one_by_one(params, visual, text, stream, _):
        samples = [
            by_hand(params, *jax.tree.map(lambda x, row=row: x[row : row + 1], (visual, text, stream)), bits)
            for row, bits in enumerate(budgets)
        ]
        return tuple(jnp.concatenate(x) for x in zip(*samples, strict=True))

    alone, (alone_of_params, *alone_gradients) = with_gradients(one_by_one)(params, *batch, None)
    assert_close((visual, text, *gradients), (*alone, *alone_gradients))
    assert_close(of_params, alone_of_params)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", [(3,), (1,), (1, 2), (2, 3), (2, 2, 1)])
def test_a_budget_of_another_shape_is_refused(inputs, shape) -> None:
    with pytest.raises(
        ValueError, match=r"budget must have shape \[slots\] \(2,\) or \[samples, slots\] \(2, 2\), got"
    ):
        forward(*inputs, np.ones(shape, bool), ARCH)


def test_a_batch_of_no_samples(inputs) -> None:
    params, *streams = inputs
    none = jax.tree.map(lambda x: x[:0], streams)
    visual, text = forward(params, *none, np.ones((0, 2), bool), ARCH)
    assert visual.shape == none[0].shape and text.shape == none[1].shape


def test_one_program_serves_every_budget() -> None:
    arch = testing.tiny_architecture(8)  # two layers left over
    inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    traced = []

    def run(params, visual, text, stream, on):
        traced.append(on)
        return forward(params, visual, text, stream, on, arch)

    program = testing.quick_jit(run)
    outputs = {bits: program(*inputs, np.array(bits)) for bits in EVERY_BUDGET}
    assert len(traced) == 1, "a new budget must not compile anything"
    bits = (True, False)
    assert_close(outputs[bits], testing.quick_jit(specialize(bits, arch))(*inputs))
    texts = [np.asarray(text) for _, text in outputs.values()]
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.combinations(texts, 2)), "each budget, another answer"


def test_the_empty_budget_leaves_v_as_it_is(inputs, scanned) -> None:
    (visual, text), _ = scanned(*inputs, np.array([False, False]))
    np.testing.assert_array_equal(np.asarray(visual), inputs[1])
    assert not np.array_equal(np.asarray(text), inputs[2])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_dense_plan_may_be_shallower_than_a_super_block(num_layers: int) -> None:
    arch = testing.tiny_architecture(num_layers, plan="dense")
    inputs = testing.random_params(arch), *testing.decoder_inputs(arch, testing.random_batch(arch, ROWS))
    found = testing.quick_jit(lambda *x: forward(*x, (), arch))(*inputs)
    assert_close(found, testing.quick_jit(lambda *x: run_layers(*x, (), arch))(*inputs))


# --- slots that are off are not computed ------------------------------------------------------------------------------


def equations(jaxpr: Any, inside: tuple[str, ...] = (), times: int = 1):
    """Every equation, with the branches it lies in ("on", "off") and how often a scan repeats it."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield equation, inside, times
        repeats = times * equation.params["length"] if name == "scan" else times
        if name == "cond":
            for branch, label in zip(equation.params["branches"], ("off", "on"), strict=True):
                yield from equations(branch.jaxpr, (*inside, label), repeats)
            continue
        for value in equation.params.values():
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from equations(inner, inside, repeats)


def products(jaxpr: Any) -> list[tuple[tuple[str, ...], set[int], int]]:
    """(branches, sizes of all axes, FLOPs) of every matrix product in a program."""
    found = []
    for equation, inside, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
            flops = 2 * times * int(np.prod(shapes[2])) * int(np.prod([shapes[0][axis] for axis in left]))
            found.append((inside, set(itertools.chain(*shapes)), flops))
    return found


@pytest.fixture(scope="module")
def distinct() -> tuple[Architecture, int, int, tuple[Any, ...]]:
    """One sample whose numbers of visual positions and text tokens are the size of nothing else in the model."""
    arch = testing.tiny_architecture(7)
    batch = testing.random_batch(arch, (((6, 5),),), spare=3)
    visual, text, stream = testing.decoder_inputs(arch, batch)
    num_visual, num_text = visual.shape[1], text.shape[1]
    assert {num_visual, num_text, num_visual + num_text}.isdisjoint({1, 2, 4, 8, 16, 32, 48, 64})
    return arch, num_visual, num_text, (testing.random_params(arch), visual, text, stream)


def test_visual_work_of_a_slot_lives_only_in_its_branch(distinct) -> None:
    arch, num_visual, num_text, inputs = distinct
    found = products(jax.make_jaxpr(lambda *x: forward(*x, arch))(*inputs, np.array([True, False])).jaxpr)
    assert {inside for inside, _, _ in found} == {(), ("off",), ("on",)}
    for inside, sizes, _ in found:
        if inside == ("on",):
            continue
        assert num_visual + num_text not in sizes, "[V; T] is only ever formed where the slot is on"
        assert inside == () or num_visual not in sizes, "a slot that is off multiplies nothing of V"
    assert any(num_visual + num_text in sizes for inside, sizes, _ in found if inside == ("on",))


def test_a_slot_that_is_off_hands_v_through(distinct) -> None:
    arch, _, _, inputs = distinct
    jaxpr = jax.make_jaxpr(lambda *x: forward(*x, arch))(*inputs, np.array([True, False])).jaxpr
    (cond,) = [equation for equation, _, _ in equations(jaxpr) if equation.primitive.name == "cond"]
    off = cond.params["branches"][0].jaxpr
    assert off.outvars[0] in off.invars


def test_of_a_mixed_batch_only_as_many_rows_as_are_on_are_computed(distinct, monkeypatch) -> None:
    """The number of rows is rounded up to quarters of the batch; each row's result is the same as alone."""
    arch, num_visual, num_text, (params, *one) = distinct
    layer, rows = select_layer(params["blocks"], 0)["self"], 8
    several = jax.tree.map(lambda x: jnp.concatenate([x] * rows), one)
    several = [x + 0.1 * random_like(x) for x in several[:2]] + several[2:]
    alone = [testing.quick_jit(run)(layer, *several) for run in (joint_alone(arch), text_alone(arch))]
    computed: list[int] = []

    def counted(params, visual, *rest):
        jax.debug.callback(lambda: computed.append(visual.shape[0]))
        return joint_layer(params, visual, *rest)

    monkeypatch.setattr(mixed, "joint_layer", counted)
    slot = functools.partial(mixed_self_attention, arch=arch)
    jaxpr = jax.make_jaxpr(slot)(layer, *several[:2], jnp.ones(rows, bool), several[2]).jaxpr
    for inside, sizes, _ in products(jaxpr):
        assert inside == ("on", "on") or (num_visual not in sizes and num_visual + num_text not in sizes)
    program = testing.quick_jit(slot)
    for count in range(rows + 1):
        on = np.random.default_rng(count).permutation(rows) < count
        found = program(layer, *several[:2], jnp.asarray(on), several[2])
        for yes, no, x in zip(*alone, found, strict=True):
            assert_close(x, np.where(on[:, None, None], yes, no))
        jax.effects_barrier()
        assert computed == [2] * -(-count // 2)
        computed.clear()


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (2, 1), (4, 1), (5, 1), (6, 2), (7, 1), (8, 2), (64, 16)])
def test_parts_of_a_mixed_batch_are_equal(samples, size) -> None:
    assert chunk_size(samples) == size


@pytest.mark.parametrize("budget", [(True, False), ((True, False), (False, True))], ids=["all", "per sample"])
@pytest.mark.parametrize(
    "policy", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("attention", "products", "offload"))]
)
def test_recomputing_changes_no_gradient(inputs, budget, policy) -> None:
    layers, *streams = inputs

    def loss(layers, visual, text, stream, remat):
        return sum(
            jnp.sum(jnp.sin(x)) for x in forward(layers, visual, text, stream, np.array(budget), ARCH, remat=remat)
        )

    gradient = jax.jit(jax.grad(loss), static_argnums=4)
    chex.assert_trees_all_close(
        gradient(layers, *streams, policy), gradient(layers, *streams, "none"), rtol=1e-4, atol=1e-4
    )


def joint_alone(arch: Architecture) -> Callable[..., Any]:
    return lambda layer, visual, text, stream: joint_layer(layer, visual, text, stream, arch)[:2]


def text_alone(arch: Architecture) -> Callable[..., Any]:
    return lambda layer, visual, text, stream: (visual, text_layer(layer, text, stream, arch.text)[0])


def test_the_compiler_keeps_the_branch(distinct) -> None:
    """It must not compute both sides and select."""
    *_, inputs = distinct
    arch = testing.tiny_architecture(3)
    inputs = testing.random_params(arch), *inputs[1:]
    optimized = jax.jit(lambda *x: forward(*x, arch), compiler_options={"xla_backend_optimization_level": 3})
    compiled = optimized.lower(*inputs, np.array([True])).compile()
    assert " conditional(" in compiled.as_text()


def test_specialized_programs_contain_only_what_is_on(distinct) -> None:
    arch, num_visual, num_text, inputs = distinct
    text, cross = arch.text, arch.cross
    heads, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim

    def layer(tokens: int) -> int:
        weights = text.hidden_size * (2 * heads + 2 * kv + 3 * text.intermediate_size)
        return 2 * tokens * weights + 4 * heads * tokens**2

    keys_values = 4 * num_visual * text.hidden_size * cross.num_kv_heads * text.head_dim
    reading = 4 * num_text * text.hidden_size * heads + 4 * heads * num_text * num_visual
    for bits in itertools.product((False, True), repeat=2):
        found = products(jax.make_jaxpr(specialize(bits, arch))(*inputs).jaxpr)
        on = sum(bits)
        expected = (7 - on) * layer(num_text) + on * layer(num_visual + num_text) + 2 * (keys_values + reading)
        assert sum(flops for _, _, flops in found) == expected
        assert any(num_visual + num_text in sizes for _, sizes, _ in found) == any(bits)
