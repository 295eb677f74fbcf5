"""FLOPs and cache bytes: published figures, formulas compared with programs, and properties of the formulas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from visor_jax.architecture import (
    Architecture,
    CrossAttentionArchitecture,
    DroppingArchitecture,
    PolicyArchitecture,
    ReductionArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.budget import LayerKind, Plan, all_subsets, bit_string, budget_name
from visor_jax.cost import (
    cache_bytes,
    conditional_position_flops,
    decode_flops,
    decoder_flops,
    dense_cache_bytes,
    dense_decoder_flops,
    dropping_flops,
    reduction_flops,
    route_flops,
    tower_flops,
    visual_flops,
)
from visor_jax.model import incremental as caches
from visor_jax.model.connector import connector
from visor_jax.model.decoder import specialize
from visor_jax.model.dropping.api import run_dropping
from visor_jax.model.encoders.siglip import tower, tower_with_attention
from visor_jax.model.stream import TokenStream
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
    """Returns the dense plan's decoder FLOPs over a budget's, at 7,290 visual tokens."""
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
    """Decoder only, at 7,290 visual tokens, by number of text tokens: within one unit of the last printed digit."""
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
    """12,288 bytes per token in bfloat16 if every layer holds it; here 8 + 2 of 24 layers hold visual tokens."""
    dense = dataclasses.replace(OV_0P5B, plan="dense")
    assert cache_bytes(dense, (), 7290, 0, bytes_per_value=2) == 12_288 * 7290
    assert cache_bytes(OV_0P5B, slots_on(2), 0, 100, bytes_per_value=2) == 12_288 * 100
    assert cache_bytes(OV_0P5B, slots_on(2), 7290, 0, bytes_per_value=2) == 12_288 * 7290 * 10 // 24


# --- formula against program ------------------------------------------------------------------------------------------


def product_flops(program) -> float:
    """Returns the FLOPs of matrix products of a jaxpr with inner programs; a scan's body counts once per iteration."""
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
    """Returns the arguments of a specialized decoder: parameters, V, T and the stream."""
    size = architecture.text.hidden_size
    lengths = num_visual, num_visual, num_text, num_text, num_text
    stream = TokenStream(*(spec(1, length, dtype=jnp.int32) for length in lengths))
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
def test_decoder_formula_equals_the_specialized_program(run):
    """Matrix products are counted exactly, except that XLA also computes masked attention and the program no logits."""
    architecture, bits, num_visual, num_text = run
    actual = counted(specialize(bits, architecture), *decoder_specs(architecture, num_visual, num_text))
    formula = decoder_flops(architecture, bits, num_visual, num_text, num_logits=0, causal_half=False)
    kinds = Plan.of(architecture).under(bits)
    formula -= kinds.count(LayerKind.CROSS) * conditional_position_flops(architecture, num_visual)
    assert actual == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("bits", [(False,), (True,)], ids=budget_name)
def test_decoder_formula_is_within_two_percent_of_what_xla_counts(bits):
    """XLA's count includes norms, softmax, activations and the conditional position."""
    text = TextArchitecture(64, 256, 1024, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64)
    architecture = tiny_architecture(text=text)
    program = jax.jit(specialize(bits, architecture)).lower(*decoder_specs(architecture, 192, 64)).compile()
    formula = decoder_flops(architecture, bits, 192, 64, num_logits=0, causal_half=False)
    analysis = program.cost_analysis()
    assert analysis is not None
    assert analysis["flops"] == pytest.approx(formula, rel=0.02)


def unread_flops(architecture: Architecture, bits: Sequence[bool], num_visual: int, num_text: int) -> float:
    """In a prefill, the last layer that reads V computes only keys and values of V."""
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
    """Each step computes one token's logits; the cache's bytes equal the formula."""
    architecture, bits, num_visual, num_text = run
    params, visual, _, _ = decoder_specs(architecture, num_visual, num_text)
    arguments = params, visual, prompt_specs(num_visual, num_text)
    kinds = Plan.of(architecture).under(bits)
    position = kinds.count(LayerKind.CROSS) * conditional_position_flops(architecture, num_visual)
    formula = decoder_flops(architecture, bits, num_visual, num_text, causal_half=False) - position
    formula -= unread_flops(architecture, bits, num_visual, num_text)
    assert counted(prefill(architecture, bits, num_text), *arguments) == pytest.approx(formula, rel=1e-9)

    _, cache, _ = jax.eval_shape(prefill(architecture, bits, num_text + 5), *arguments)
    allocated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.layers, cache.cross)))
    assert allocated == cache_bytes(architecture, bits, num_visual, num_text + 5, bytes_per_value=4)

    step = functools.partial(caches.decode_step, bits=bits, arch=architecture)
    formula = decode_flops(architecture, bits, num_visual, num_text + 5)
    assert counted(step, params, spec(1, dtype=jnp.int32), cache) == pytest.approx(formula, rel=1e-9)


def test_route_formula_is_what_the_routing_token_adds():
    architecture, text = tiny_architecture(7), tiny_architecture(7).text
    params, visual, _, _ = decoder_specs(architecture, 200, 9)
    programs = [prefill(architecture, (False, False), 9, routed=routed) for routed in (False, True)]
    without, with_token = (counted(program, params, visual, prompt_specs(200, 9)) for program in programs)
    # Plain XLA also multiplies all ten queries by the routing token's key in two layers, and masks the result.
    masked = 2 * 10 * 4 * text.num_heads * text.head_dim
    assert with_token - without == route_flops(architecture, 200, 9) + masked


@pytest.mark.parametrize("num_tiles", [1, 3])
def test_tower_formula_equals_the_program(num_tiles):
    vision = VisionArchitecture(24, 4, 16, 24, num_layers=3, num_heads=2)
    architecture = tiny_architecture(vision=vision)

    def encode(params, tiles):
        return connector(params["connector"], tower(params["vision"], {"tiles": tiles}, vision, architecture.anyres))

    actual = counted(encode, parameter_specs(architecture), spec(1, num_tiles, 24, 24, 3, dtype=jnp.uint8))
    assert actual == pytest.approx(tower_flops(architecture, num_tiles), rel=1e-9)


@pytest.mark.parametrize("bits", all_subsets(2), ids=bit_string)
def test_formulas_of_another_pattern_equal_the_programs(bits):
    architecture = other_plan()
    assert decoder_flops(architecture, bits, 7, 5, num_logits=0, causal_half=False) - 2 * conditional_position_flops(
        architecture, 7
    ) == pytest.approx(counted(specialize(bits, architecture), *decoder_specs(architecture, 7, 5)), rel=1e-9)
    params, visual, _, _ = decoder_specs(architecture, 7, 5)
    _, cache, _ = jax.eval_shape(prefill(architecture, bits, 9), params, visual, prompt_specs(7, 5))
    allocated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.layers, cache.cross)))
    assert allocated == cache_bytes(architecture, bits, 7, 9, bytes_per_value=4)


# --- properties of the formulas ---------------------------------------------------------------------------------------


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


# --- VISOR-TR: the published savings with reduced tokens (docs/reduction.md) ------------------------------------------


def test_published_savings_with_reduced_tokens():
    """Two slots, key and value heads as many as query heads, 7,290 visual tokens of which a share remains."""

    def saving(share: float, num_text: int) -> float:
        reduced = decoder_flops(OV_0P5B_MULTI_HEAD, slots_on(2), round(7290 * share), num_text)
        return dense_decoder_flops(OV_0P5B_MULTI_HEAD, 7290, num_text) / reduced

    assert saving(1 / 4, 60) == pytest.approx(35.0, abs=0.1)
    assert saving(1 / 2, 60) == pytest.approx(18.4, abs=0.1) and saving(1 / 2, 76) == pytest.approx(17.8, abs=0.1)
    assert saving(0.234, 60) == pytest.approx(37, abs=0.1) and saving(0.22, 60) == pytest.approx(39, abs=0.1)


# --- reductions -------------------------------------------------------------------------------------------------------


def reduced(method: str, ratio: float = 0.25, **settings) -> Architecture:
    return dataclasses.replace(OV_0P5B, reduction=ReductionArchitecture(method, ratio, **settings))


def test_reduction_flops_by_hand():
    """One tile of 27 x 27 = 729 patches of width 1,152 in heads of 72, tokens of width 896; a fourth kept is 183."""
    logits = 2 * 729 * 729 * 1152  # queries and keys of all heads; likewise similarities of all features
    assert reduction_flops(OV_0P5B, 1, 730) == reduction_flops(reduced("m3"), 1, 170) == 0
    assert reduction_flops(reduced("vispruner"), 1, 183) == 2 * logits == 2_448_880_128
    projections = 2 * 2 * 729 * 1152 * 1152  # queries and keys of the first layer
    assert reduction_flops(reduced("hired"), 1, 184) == 2 * logits + projections
    contextual = 29  # 10/64 of 183
    assert reduction_flops(reduced("visionzip"), 3, 549) == 3 * (logits + 2 * 729 * contextual * 72)
    # Of 732 tokens each one's nearest other, and of each of the 183 kept ones the distance to all.
    assert reduction_flops(reduced("divprune"), 1, 183) == 2 * 896 * (732 * 732 + 183 * 732)


def test_a_reduction_adds_to_the_tower_and_merging_first_saves_projections():
    tower_cost = tower_flops(OV_0P5B, 2)
    for method in ("divprune", "vispruner", "hired", "m3"):
        arch = reduced(method)
        assert visual_flops(arch, 2, 366) == tower_cost + reduction_flops(arch, 2, 366)
    arch, projection = reduced("visionzip"), 2 * (1152 + 896) * 896
    saved = (2 * 729 - 366) * projection
    assert visual_flops(arch, 2, 366) == pytest.approx(tower_cost + reduction_flops(arch, 2, 366) - saved)
    assert visual_flops(OV_0P5B, 2, 1460) == tower_cost


@pytest.mark.parametrize("method", ["vispruner", "hired", "visionzip"])
def test_reduction_formulas_equal_the_programs(method):
    """The products of the attention weights, and of similarities as the methods compute them."""
    vision = VisionArchitecture(24, 4, 16, 24, num_layers=2, num_heads=1)
    arch = tiny_architecture(vision=vision, reduction=ReductionArchitecture(method, 0.25, contextual_share=0.25))
    tower_only = functools.partial(tower, arch=vision, anyres=arch.anyres)

    def choosing(params, tiles):
        features, seen = tower_with_attention(
            params["vision"], {"tiles": tiles}, vision, arch.anyres, with_first=method == "hired"
        )
        if method == "hired":
            return features, seen.last, seen.first
        if method == "vispruner":
            return features, seen.last, jnp.einsum("BnPD,BnQD->BnPQ", features, features)
        centers = seen.keys[:, :, : arch.reduction.contextual(arch.reduction.kept(36))]
        return features, seen.last, jnp.einsum("BnPE,BnCE->BnPC", seen.keys, centers)

    arguments = parameter_specs(arch), spec(1, 3, 24, 24, 3, dtype=jnp.uint8)
    plain = counted(lambda params, tiles: tower_only(params["vision"], {"tiles": tiles}), *arguments)
    assert counted(choosing, *arguments) - plain == pytest.approx(reduction_flops(arch, 3, 27), rel=1e-9)


# --- dropping tokens between layers -----------------------------------------------------------------------------------


def dropping(method: str, layers: tuple[int, ...], ratios: tuple[float, ...], **settings) -> Architecture:
    return dataclasses.replace(OV_0P5B, plan="dense", dropping=DroppingArchitecture(method, layers, ratios, **settings))


def of_layers(arch: Architecture, layers: int, visual: int, text: int) -> float:
    """FLOPs of so many layers of a dense plan over so many tokens."""
    one = dense_decoder_flops(arch, visual, text) - 2 * 896 * 151_936
    return layers / 24 * one


@pytest.mark.parametrize("score", ["code", "paper"])
def test_later_layers_read_what_a_drop_leaves(score):
    arch = dropping("fastv", (2,), (0.5,), score=score)
    queries = 7290 + 80 if score == "paper" else 80
    choosing = 2 * 896 * (queries * 896 + (7290 + 80) * 128) + 2 * queries * (7290 + 80) * 896
    assert dropping_flops(arch, 7290, 80) == choosing
    expected = of_layers(arch, 2, 7290, 80) + of_layers(arch, 22, 3645, 80) + choosing + 2 * 896 * 151_936
    assert decoder_flops(arch, (), 7290, 80) == pytest.approx(expected)
    assert dense_decoder_flops(arch, 7290, 80) == decoder_flops(
        dataclasses.replace(OV_0P5B, plan="dense"), (), 7290, 80
    )
    cached = cache_bytes(arch, (), 7290, 80, 2)
    assert cached == 2 * 2 * 128 * (2 * 7370 + 22 * 3725)
    assert dense_cache_bytes(arch, 7290, 80, 2) == 2 * 2 * 128 * 24 * 7370
    saved = decode_flops(dataclasses.replace(OV_0P5B, plan="dense"), (), 7290, 81) - decode_flops(arch, (), 7290, 81)
    assert saved == pytest.approx(22 * 4 * 3645 * 896)


def test_counts_of_each_drop_by_hand():
    arch = dropping("pyramiddrop", (6, 12, 18), (0.5, 0.25, 0.125))
    assert [arch.dropping.visual_in(layer, 577) for layer in (0, 5, 6, 12, 18, 23)] == [577, 577, 288, 144, 72, 72]
    sparse = DroppingArchitecture("sparsevlm", (3, 7, 16), (300 / 576, 200 / 576, 110 / 576))
    # 276 dropped: 83 best in 9 clusters; 109: 33 in 4; 94: 29 in 3. The authors' comments: 300, 200, 110 and clusters.
    assert [sparse.counts(drop, 576) for drop in range(3)] == [(300, 83, 9), (200, 33, 4), (110, 29, 3)]
    assert [sparse.visual_in(layer, 576) for layer in (2, 3, 7, 16)] == [576, 309, 204, 113]
    assert sparse.counts(2, 0) == (0, 0, 0) and sparse.counts(0, 1) == (0, 1, 1)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_dropping_formulas_equal_the_programs(method):
    """Products with every key, of a prompt of one chunk of queries."""
    layers, ratios = ((2,), (0.5,)) if method == "fastv" else ((1, 2), (0.5, 0.25))
    arch = tiny_architecture(3, plan="dense", dropping=DroppingArchitecture(method, layers, ratios))
    stream = TokenStream(*(spec(1, n, dtype=jnp.int32) for n in (64, 64, 32, 32, 32)))
    arguments = parameter_specs(arch), spec(1, 64, 32), spec(1, 32, 32), stream

    def run(params, visual, text, stream):
        return run_dropping(params, visual, text, stream, arch)[:2]

    head = 2 * arch.text.hidden_size * arch.text.vocab_size
    received = sum(2 * 32 * (32 + arch.dropping.visual_in(layer - 1, 64)) for layer in layers)  # raters x mean of heads
    expected = decoder_flops(arch, (), 64, 32, causal_half=False) - head + received
    assert counted(run, *arguments) == pytest.approx(expected, rel=1e-9)
