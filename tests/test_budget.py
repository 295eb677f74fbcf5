"""Plans, budgets and their cost: the paper's figures, counted FLOPs of the real programs, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from visor_jax.architecture import (
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.budget import Budget, LayerKind, Plan, all_subsets, bit_string, budget_name, by_count, parse_bits
from visor_jax.cost import (
    cache_bytes,
    conditional_position_flops,
    decode_flops,
    decoder_flops,
    dense_decoder_flops,
    route_flops,
    tower_flops,
)
from visor_jax.errors import RequestError
from visor_jax.model import incremental as caches
from visor_jax.model.connector import connector
from visor_jax.model.decoder import specialize
from visor_jax.model.encoders.siglip import tower
from visor_jax.model.stream import Stream
from visor_jax.model.visor import abstract_params
from visor_jax.testing import other_plan, tiny_architecture

OV_0P5B = Architecture(
    text=TextArchitecture(151_936, 896, 4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64),
    vision=VisionArchitecture(384, 14, 1152, 4304, num_layers=26, num_heads=16),
    cross=CrossAttentionArchitecture(num_kv_heads=2),
    policy=PolicyArchitecture(hidden_size=256),
)
OV_0P5B_MULTI_HEAD = dataclasses.replace(OV_0P5B, cross=CrossAttentionArchitecture(num_kv_heads=14))


def slots_on(count: int, num_slots: int = 8) -> tuple[bool, ...]:
    return tuple(i < count for i in range(num_slots))


# --- the published figures (method.md section 7) ----------------------------------------------------------------------


def decoder_saving(architecture, count: int, num_text: int) -> float:
    """How many times cheaper the decoder is than the dense plan, at 7,290 visual tokens."""
    dense = dense_decoder_flops(architecture, 7290, num_text)
    return dense / decoder_flops(architecture, slots_on(count), 7290, num_text)


@pytest.mark.parametrize(
    ("architecture", "count", "published"),
    [
        (OV_0P5B, 0, {100: "62", 60: "90"}),
        (OV_0P5B, 1, {100: "17", 60: "19"}),
        (OV_0P5B, 2, {100: "10.1", 60: "10.6"}),
        (OV_0P5B, 3, {100: "7.1", 60: "7.4"}),
        (OV_0P5B, 4, {100: "5.5"}),
        (OV_0P5B, 8, {100: "2.9"}),
        (OV_0P5B_MULTI_HEAD, 2, {100: "8.4", 60: "8.7"}),
    ],
)
def test_savings_of_the_paper(architecture, count, published):
    """Decoder only, at 7,290 visual tokens, by number of text tokens: within one unit of the last digit printed."""
    for num_text, figure in published.items():
        unit = 0.1 if "." in figure else 1.0
        decoder = decoder_saving(architecture, count, num_text)
        assert decoder == pytest.approx(float(figure), abs=unit)


def test_dense_decoder_and_tower_of_the_paper():
    assert dense_decoder_flops(OV_0P5B, 7290, 80) == pytest.approx(7.6e12, rel=0.01)
    assert tower_flops(OV_0P5B, 1) == pytest.approx(0.64e12, rel=0.01)
    assert tower_flops(OV_0P5B, 31) == pytest.approx(20e12, rel=0.01)


def test_end_to_end_saving_counts_the_tower():
    tower_cost = tower_flops(OV_0P5B, 31)
    dense, ours = dense_decoder_flops(OV_0P5B, 7290, 80), decoder_flops(OV_0P5B, slots_on(2), 7290, 80)
    assert (dense + tower_cost) / (ours + tower_cost) < 1.4 < 10 < dense / ours


def test_cache_of_the_paper():
    """12,288 bytes a token in bfloat16 where every layer holds it; visual ones in 8 + 2 of 24 layers here."""
    dense = dataclasses.replace(OV_0P5B, plan="dense")
    assert cache_bytes(dense, (), 7290, 0, bytes_per_value=2) == 12_288 * 7290
    assert cache_bytes(OV_0P5B, slots_on(2), 0, 100, bytes_per_value=2) == 12_288 * 100
    assert cache_bytes(OV_0P5B, slots_on(2), 7290, 0, bytes_per_value=2) == 12_288 * 7290 * 10 // 24


# --- formula against program ------------------------------------------------------------------------------------------


def product_flops(program) -> float:
    """FLOPs of the matrix products of a jaxpr, inner programs included, those of a scan once for each turn."""
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            terms = 1
            for axis in contracted:
                terms *= lhs[axis]
            total += 2.0 * terms * equation.outvars[0].aval.size
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                total += turns * product_flops(inner)
    return total


def counted(function: Callable, *shapes) -> float:
    return product_flops(jax.make_jaxpr(function)(*shapes))


def spec(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


parameter_specs = functools.cache(abstract_params)


def decoder_specs(architecture: Architecture, num_visual: int, num_text: int):
    """Arguments of a specialised decoder: parameters, V, T and the stream."""
    size = architecture.text.hidden_size
    lengths = num_visual, num_visual, num_text, num_text, num_text
    stream = Stream(*(spec(1, length, dtype=jnp.int32) for length in lengths))
    return parameter_specs(architecture), spec(1, num_visual, size), spec(1, num_text, size), stream


def prompt_specs(num_visual: int, num_text: int) -> dict[str, jax.ShapeDtypeStruct]:
    fields = {f"visual_{name}": spec(1, num_visual, dtype=jnp.int32) for name in ("positions", "segments")}
    fields |= {f"text_{name}": spec(1, num_text, dtype=jnp.int32) for name in ("tokens", "positions", "segments")}
    return {**fields, "routing_position": spec(1, dtype=jnp.int32)}


def prefill(architecture: Architecture, bits: Sequence[bool], capacity: int, *, routed: bool = False) -> Callable:
    def program(params, visual, batch):
        prefix, scores = caches.prefill_prefix(params, visual, batch, 2, architecture, routed=routed)
        return *caches.prefill_rest(params, prefix, batch, bits, capacity, architecture), scores

    return program


architectures = st.builds(
    lambda layers, plan, cross_heads, both_ways, pattern: tiny_architecture(
        layers,
        **pattern,
        plan=plan,
        cross=CrossAttentionArchitecture(num_kv_heads=cross_heads),
        bidirectional_vision=both_ways,
    ),
    st.integers(4, 8),
    st.sampled_from(["visor", "dense"]),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.sampled_from([{}, {"pattern": ("text", "self", "cross"), "head_layers": 1}]),
)


@st.composite
def runs(draw) -> tuple[Architecture, tuple[bool, ...], int, int]:
    """An architecture, a budget of it, and numbers of visual and text tokens."""
    architecture = draw(architectures)
    bits = tuple(draw(st.lists(st.booleans(), min_size=architecture.num_slots, max_size=architecture.num_slots)))
    return architecture, bits, draw(st.integers(1, 300)), draw(st.integers(1, 100))


@settings(max_examples=10, deadline=None)
@given(run=runs())
def test_decoder_formula_equals_the_specialised_program(run):
    """Matrix products are counted exactly; XLA's attention computes what causality hides, and the program no logits."""
    architecture, bits, num_visual, num_text = run
    found = counted(specialize(bits, architecture), *decoder_specs(architecture, num_visual, num_text))
    formula = decoder_flops(architecture, bits, num_visual, num_text, num_logits=0, causal_half=False)
    kinds = Plan.of(architecture).under(bits)
    formula -= kinds.count(LayerKind.CROSS) * conditional_position_flops(architecture, num_visual)
    assert found == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("bits", [(False,), (True,)], ids=budget_name)
def test_decoder_formula_is_within_two_percent_of_what_xla_counts(bits):
    """Norms, softmax, activations and the conditional position are in XLA's count."""
    text = TextArchitecture(64, 256, 1024, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64)
    architecture = tiny_architecture(text=text)
    program = jax.jit(specialize(bits, architecture)).lower(*decoder_specs(architecture, 192, 64)).compile()
    formula = decoder_flops(architecture, bits, 192, 64, num_logits=0, causal_half=False)
    analysis = program.cost_analysis()
    assert analysis is not None
    assert analysis["flops"] == pytest.approx(formula, rel=0.02)


def unread_flops(architecture: Architecture, bits: Sequence[bool], num_visual: int, num_text: int) -> float:
    """What a prompt spares: the last layer that reads V need not change it, so its V has keys and values only."""
    text, kinds = architecture.text, Plan.of(architecture).under(bits)
    readers = [kind for kind in kinds if kind is not LayerKind.TEXT]
    if readers[-1] is not LayerKind.SELF:
        return 0.0
    width = text.num_heads * text.head_dim
    per_token = 2 * text.hidden_size * (2 * width + 3 * text.intermediate_size)
    return num_visual * (per_token + 4.0 * width * (num_visual + num_text))


@settings(max_examples=5, deadline=None)
@example(run=(tiny_architecture(3), (True,), 7, 5))
@given(run=runs())
def test_prefill_and_decode_step_formulas_equal_the_programs(run):
    """The logits of one token each; the cache holds the bytes that the formula says."""
    architecture, bits, num_visual, num_text = run
    params, visual, _, _ = decoder_specs(architecture, num_visual, num_text)
    arguments = params, visual, prompt_specs(num_visual, num_text)
    kinds = Plan.of(architecture).under(bits)
    position = kinds.count(LayerKind.CROSS) * conditional_position_flops(architecture, num_visual)
    formula = decoder_flops(architecture, bits, num_visual, num_text, causal_half=False) - position
    formula -= unread_flops(architecture, bits, num_visual, num_text)
    assert counted(prefill(architecture, bits, num_text), *arguments) == pytest.approx(formula, rel=1e-9)

    _, cache, _ = jax.eval_shape(prefill(architecture, bits, num_text + 5), *arguments)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.layers, cache.cross)))
    assert held == cache_bytes(architecture, bits, num_visual, num_text + 5, bytes_per_value=4)

    step = functools.partial(caches.decode_step, bits=bits, arch=architecture)
    formula = decode_flops(architecture, bits, num_visual, num_text + 5)
    assert counted(step, params, spec(1, dtype=jnp.int32), cache) == pytest.approx(formula, rel=1e-9)


def test_route_formula_is_what_the_routing_token_adds():
    architecture, text = tiny_architecture(7), tiny_architecture(7).text
    params, visual, _, _ = decoder_specs(architecture, 200, 9)
    programs = [prefill(architecture, (False, False), 9, routed=routed) for routed in (False, True)]
    without, with_token = (counted(program, params, visual, prompt_specs(200, 9)) for program in programs)
    # Plain XLA also multiplies all ten queries by the routing token's key, in two layers, only to mask the result.
    masked = 2 * 10 * 4 * text.num_heads * text.head_dim
    assert with_token - without == route_flops(architecture, 200, 9) + masked


@pytest.mark.parametrize("patch_local", [False, True])
@pytest.mark.parametrize("num_tiles", [1, 3])
def test_tower_formula_equals_the_program(patch_local, num_tiles):
    vision = VisionArchitecture(24, 4, 16, 24, num_layers=3, num_heads=2, patch_local=patch_local)
    architecture = tiny_architecture(vision=vision)

    def encode(params, tiles):
        return connector(params["connector"], tower(params["vision"], tiles, vision, architecture.anyres))

    found = counted(encode, parameter_specs(architecture), spec(1, num_tiles, 24, 24, 3, dtype=jnp.uint8))
    assert found == pytest.approx(tower_flops(architecture, num_tiles), rel=1e-9)


# --- how the formulas behave ------------------------------------------------------------------------------------------


@given(run=runs(), slot=st.integers(0, 7))
def test_turning_a_slot_on_always_costs(run, slot):
    architecture, bits, num_visual, num_text = run
    if architecture.plan == "dense":
        return
    slot %= len(bits)
    more = tuple(bit or i == slot for i, bit in enumerate(bits))
    for cost in (decoder_flops, decode_flops, functools.partial(cache_bytes, bytes_per_value=2)):
        before, after = cost(architecture, bits, num_visual, num_text), cost(architecture, more, num_visual, num_text)
        assert after == before if bits[slot] else after > before


def test_bidirectional_vision_sees_the_other_half_too():
    both_ways = dataclasses.replace(OV_0P5B, bidirectional_vision=True)
    more = decoder_flops(both_ways, slots_on(2), 7290, 80) - decoder_flops(OV_0P5B, slots_on(2), 7290, 80)
    assert more == 2 * 4 * 0.5 * 7290**2 * 14 * 64


def test_logits_are_counted_per_token():
    one, all_text = (decoder_flops(OV_0P5B, slots_on(2), 7290, 80, num_logits=n) for n in (1, 80))
    assert all_text - one == 79 * 2 * 896 * 151_936


def test_a_dense_plan_has_no_route():
    assert route_flops(dataclasses.replace(OV_0P5B, plan="dense"), 7290, 80) == 0


def test_bits_must_fit_the_plan():
    with pytest.raises(ValueError, match="8 slots, got 3"):
        decoder_flops(OV_0P5B, (True,) * 3, 7290, 80)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_visor_plan_of_the_paper():
    plan = Plan.visor(24)
    assert plan.cross == tuple(range(1, 24, 3))
    assert plan.slots == tuple(range(2, 24, 3))
    assert plan.under(slots_on(1)).count(LayerKind.SELF) == 1
    assert plan.under(slots_on(1))[2] is LayerKind.SELF
    assert plan.under(slots_on(1))[5] is LayerKind.TEXT


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7, 8, 28])
def test_what_three_does_not_divide_is_text_only(num_layers):
    plan = Plan.visor(num_layers)
    assert len(plan.kinds) == num_layers
    assert len(plan.cross) == len(plan.slots) == num_layers // 3
    assert all(kind is LayerKind.TEXT for kind in plan.kinds[num_layers // 3 * 3 :])


def test_another_pattern_repeats_after_its_head_layers():
    plan = Plan.of(other_plan())
    unit = ["text", "self", "text", "cross"]
    assert [str(kind) for kind in plan.kinds] == ["text", "text", *unit, *unit, "text"]
    assert plan.slots == (3, 7) and plan.cross == (5, 9)
    assert other_plan().shared_layers == range(3)
    paths = [place.path for place in other_plan().layers[1:5]]
    assert paths == ["head", "blocks/text/layer_0", "blocks/self", "blocks/text/layer_1"]


@pytest.mark.parametrize("bits", all_subsets(2), ids=bit_string)
def test_formulas_of_another_pattern_equal_the_programs(bits):
    architecture = other_plan()
    assert decoder_flops(architecture, bits, 7, 5, num_logits=0, causal_half=False) - 2 * conditional_position_flops(
        architecture, 7
    ) == pytest.approx(counted(specialize(bits, architecture), *decoder_specs(architecture, 7, 5)), rel=1e-9)
    params, visual, _, _ = decoder_specs(architecture, 7, 5)
    _, cache, _ = jax.eval_shape(prefill(architecture, bits, 9), params, visual, prompt_specs(7, 5))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.layers, cache.cross)))
    assert held == cache_bytes(architecture, bits, 7, 9, bytes_per_value=4)


def test_dense_plan_has_nothing_optional():
    plan = Plan.dense(5)
    assert plan.kinds == (LayerKind.SELF,) * 5 == plan.under(())
    assert plan.slots == plan.cross == ()


@pytest.mark.parametrize("kind", ["visor", "dense"])
def test_plan_of_an_architecture(kind):
    architecture = tiny_architecture(7, plan=kind)
    plan = Plan.of(architecture)
    assert plan == getattr(Plan, kind)(7)
    assert len(plan.slots) == architecture.num_slots


def test_only_self_attention_is_optional():
    with pytest.raises(ValueError, match=r"layers \[0\] are not"):
        Plan((LayerKind.TEXT, LayerKind.SELF), slots=(0, 1))


# --- budgets ----------------------------------------------------------------------------------------------------------

VIABLE = [(False,) * 3, (False, True, False), (True, True, False), (False, True, True), (True,) * 3]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("empty", (False,) * 3),
        ("0", (False,) * 3),
        ("full", (True,) * 3),
        ("3", (True,) * 3),
        ("1", (False, True, False)),
        ("2", (True, True, False)),
        ("0b000", (False,) * 3),
        ("0b100", (True, False, False)),
        ("0b101", (True, False, True)),
        ("0b111", (True,) * 3),
    ],
)
def test_resolving(text, bits):
    assert Budget.parse(text).resolve(3, VIABLE) == bits


@pytest.mark.parametrize("text", ["empty", "full", "0", "3", "0b011"])
def test_resolving_without_a_search(text):
    assert len(Budget.parse(text).resolve(3)) == 3


@pytest.mark.parametrize(
    "text", ["0b2", "99", "", "-1", "0b", "0b1" + 64 * "0", "1.5", "0x3", "Full", " 3", "\uff13", "0b1\n", "9" * 5000]
)
def test_what_is_no_budget(text):
    with pytest.raises(RequestError) as error:
        Budget.parse(text)
    assert repr(text) in str(error.value)
    assert "expected auto, full, empty, a number of slots such as 3, or one bit per slot" in str(error.value)


def test_a_slip_gets_its_nearest_word():
    with pytest.raises(RequestError, match="did you mean 'empty'"):
        Budget.parse("emtpy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0b10", "'0b10' has 2 bits, the model has 3 slots"),
        ("0b1010", "'0b1010' has 4 bits, the model has 3 slots"),
        ("4", "'4' asks for more slots than the model has: expected 0 to 3"),
        ("auto", "'auto' is decided for each sample"),
    ],
)
def test_what_does_not_fit_the_model(text, message):
    with pytest.raises(RequestError, match=message):
        Budget.parse(text).resolve(3, VIABLE)


def test_a_number_without_a_viable_budget():
    with pytest.raises(RequestError, match=r"'1' .*\(viable: empty, full\)"):
        Budget.parse("1").resolve(3, [VIABLE[0], VIABLE[-1]])
    with pytest.raises(RequestError, match="the search has not run"):
        Budget.parse("1").resolve(3)


@given(bits=st.lists(st.booleans(), min_size=1, max_size=64).map(tuple))
def test_names_round_trip(bits):
    name = budget_name(bits)
    assert str(Budget.of(bits)) == name
    assert Budget.parse(name).resolve(len(bits)) == bits
    assert Budget.of(bits).resolve(len(bits)) == bits


@given(text=st.sampled_from(["auto", "full", "empty"]) | st.integers(0, 64).map(str))
def test_requests_round_trip(text):
    assert str(Budget.parse(text)) == text


@given(text=st.text())
def test_any_text_is_a_budget_or_a_request_error(text):
    try:
        budget = Budget.parse(text)
    except RequestError:
        return
    assert Budget.parse(str(budget)) == budget or str(budget) in ("empty", "full")


def test_names():
    assert [budget_name(bits) for bits in VIABLE] == ["empty", "0b010", "0b110", "0b011", "full"]


@pytest.mark.parametrize("num_slots", [0, 1, 3, 8])
def test_all_subsets(num_slots):
    subsets = all_subsets(num_slots)
    assert len(set(subsets)) == len(subsets) == 2**num_slots
    assert subsets == sorted(subsets, key=lambda bits: (sum(bits), bits))
    assert subsets[0] == (False,) * num_slots and subsets[-1] == (True,) * num_slots


def test_by_count():
    assert by_count(0) == [()]
    assert [bit_string(bits) for bits in by_count(3)] == ["0b000", "0b100", "0b110", "0b111"]


@given(st.lists(st.booleans(), max_size=12))
def test_bit_strings_are_read_back(bits):
    assert parse_bits(bit_string(bits)) == tuple(bits)


def test_needs_no_jax():
    code = "import sys, visor_jax.budget; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
