"""Plans and budgets: optional layers, names of budgets, and refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.budget import Budget, LayerKind, Plan, all_subsets, bit_string, budget_name, by_count, parse_bits
from visor_jax.errors import RequestError
from visor_jax.testing import other_plan, tiny_architecture

# --- plans ------------------------------------------------------------------------------------------------------------


def test_visor_plan_of_the_paper():
    plan, first_slot = Plan.visor(24), (True,) + (False,) * 7
    assert plan.cross == tuple(range(1, 24, 3))
    assert plan.slots == tuple(range(2, 24, 3))
    assert plan.under(first_slot).count(LayerKind.SELF) == 1
    assert plan.under(first_slot)[2] is LayerKind.SELF
    assert plan.under(first_slot)[5] is LayerKind.TEXT


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
