"""The exported PyTorch module: budgets, caches, batches, routes, and refusals."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch

from visor_jax.architecture import (
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.budget import all_subsets
from visor_jax.cost import cache_bytes, decoder_flops
from visor_jax.export.torch_model import VisorForConditionalGeneration
from visor_jax.export.torch_model.modeling_visor import choose
from visor_jax.model.policy import choose as choose_of_jax

jax_choose = jax.jit(choose_of_jax)
ALL = ["empty", "0b01", "0b10", "full"]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-5


def steps(model, inputs, count=6, **settings):
    """Returns logits after the prompt and each of `count` greedy tokens [B, count + 1, V], and the cache."""
    output = model(**inputs, **settings, use_cache=True)
    rows, cache, mask = [output.logits[:, -1]], output.past_key_values, inputs.get("attention_mask")
    for _ in range(count):
        token = rows[-1].argmax(-1, keepdim=True)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(token)], dim=1)
        rows.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(rows, dim=1), cache


@pytest.mark.parametrize("budget", ALL)
def test_cached_steps_equal_whole_passes(visor, tiny, budget):
    inputs = tiny.prompt(visor, [(20, 30)])
    cached, _ = steps(visor, inputs, budget=budget)
    ids = torch.cat([inputs["input_ids"], cached.argmax(-1)[:, :-1]], dim=1)
    close(visor(**{**inputs, "input_ids": ids}, budget=budget).logits[:, -7:], cached)


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch_equals_one_by_one(visor, tiny, side):
    prompts = [
        tiny.prompt(visor, [(20, 30)], before=2, seed=1),
        tiny.prompt(visor, [(16, 16), (30, 9)], before=1, after=1, seed=2),
        tiny.prompt(visor, [], after=9, seed=3),
        tiny.prompt(visor, [(48, 5)], before=0, seed=4),
    ]
    requested = ["full", "0b01", "0b10", "auto"]
    singles = [steps(visor, inputs_of, budget=budget)[0] for inputs_of, budget in zip(prompts, requested, strict=True)]
    batched, cache = steps(visor, tiny.join(prompts, side), budget=requested)
    close(batched, torch.cat(singles))
    assert cache.budgets[:3].tolist() == [[True, True], [False, True], [True, False]]


def test_generate_with_a_cache_equals_without(visor, tiny):
    inputs = tiny.join([tiny.prompt(visor, [(20, 30)], seed=1), tiny.prompt(visor, [(9, 9)], after=2, seed=2)])
    for budget in ["auto", 2, "0b01", ["full", "empty"], torch.tensor([[True, False], [False, True]])]:
        settings = tiny.greedily(8, budget=budget)
        cached = visor.generate(**inputs, **settings)
        assert torch.equal(cached, visor.generate(**inputs, **settings, use_cache=False))
        assert cached.shape[1] == inputs["input_ids"].shape[1] + 8


def test_beams_keep_their_prompts_pictures_and_budget(visor, tiny):
    prompts = [tiny.prompt(visor, [(20, 30), (9, 9)], seed=1), tiny.prompt(visor, [(9, 9)], seed=2)]
    settings = tiny.greedily(6, num_beams=3)
    singles = [
        visor.generate(**inputs_of, **settings, budget=budget)[0, -6:]
        for inputs_of, budget in zip(prompts, ["full", "0b01"], strict=True)
    ]
    batched = visor.generate(**tiny.join(prompts), **settings, budget=["full", "0b01"])[:, -6:]
    assert torch.equal(batched, torch.stack(singles))
    uncached = visor.generate(**tiny.join(prompts), **settings, budget=["full", "0b01"], use_cache=False)[:, -6:]
    assert torch.equal(batched, uncached)


def test_auto_is_the_budget_that_the_route_names_and_changes_no_answer(visor, tiny):
    inputs = tiny.prompt(visor, [(20, 30)])
    route = visor.route(**inputs)
    assert route.shape == (1, 4) and abs(route.sum() - 1) < 1e-5
    best = visor.config.viable_budgets[route.argmax()]
    routed, named = visor(**inputs), visor(**inputs, budget=best)
    assert torch.equal(routed.logits, named.logits)
    assert torch.equal(routed.budgets, named.budgets)
    assert named.policy_logits is None
    kept = visor(**inputs, budget=best, logits_to_keep=torch.tensor([0, 3]))
    close(kept.logits, named.logits[:, [0, 3]])


def test_an_unknown_argument_is_refused(visor, tiny):
    inputs = tiny.prompt(visor, [(9, 9)])
    for name in ("budgets", "position_ids", "output_router_logits"):
        with pytest.raises(TypeError, match=f"unexpected arguments {name}; slots are chosen by `budget`"):
            visor(**inputs, **{name: True})
    labels = inputs["input_ids"].clone()
    assert visor(**inputs, labels=labels, num_items_in_batch=4, output_router_logits=False).loss > 0


def test_the_route_ignores_labels(visor, tiny):
    inputs = tiny.prompt(visor, [(20, 30)], after=8)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    whole = visor(**inputs, labels=labels)
    requested = visor(**{**inputs, "input_ids": ids[:, :-4]})
    close(whole.policy_logits, requested.policy_logits)
    expected = torch.nn.functional.cross_entropy(whole.logits[0, -5:-1], ids[0, -4:])
    close(whole.loss, expected)


def test_a_higher_dial_never_selects_a_cheaper_budget(visor, tiny):
    inputs = tiny.prompt(visor, [(20, 30)])
    dials = (-1e300, -50.0, -1.0, 0.0, 1.0, 50.0, 1e38, 1e39, 1e300)
    sums = [int(visor(**inputs, budget="auto", dial=dial).budgets.sum()) for dial in dials]
    assert sums == sorted(sums) and sums[0] == 0 and sums[-1] == 2
    with pytest.raises(ValueError, match="dial=nan"):
        visor(**inputs, budget="auto", dial=float("nan"))


@hypothesis.given(
    scores=st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=4, max_size=4),
    costs=st.lists(st.integers(1, 2**20), min_size=4, max_size=4),
    dial=st.floats(-1e39, 1e39),
)
def test_the_choice_is_the_jax_models(scores, costs, dial):
    scores, costs = np.array([scores], np.float32), np.array([costs], np.float32)
    expected = jax_choose(scores, costs, np.float32(np.clip(dial, -1e38, 1e38)))
    chosen = choose(torch.tensor(scores), torch.tensor(costs), dial)
    assert costs[0, int(chosen[0])] == costs[0, int(expected[0])]


def test_a_slot_that_is_off_is_not_computed(tiny):
    model = tiny.randomize(VisorForConditionalGeneration(tiny.config()))
    inputs = tiny.prompt(model, [(20, 30)])
    parts = []
    original = type(model.model.language_model).run_part

    def spy(decoder, state, index, part, rows):
        parts.append((index, part))
        return original(decoder, state, index, part, rows)

    model.model.language_model.run_part = spy.__get__(model.model.language_model)
    model(**inputs, budget="0b10")
    assert [part for _, part in parts] == ["text", "text", "joint", "text", "text", "text", "text"]


def architecture_of(config) -> Architecture:
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads
    return Architecture(
        text=TextArchitecture(
            text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers, heads, 2, config.head_dim
        ),
        vision=VisionArchitecture(16, 4, vision.hidden_size, vision.intermediate_size, 2, 3),
        cross=CrossAttentionArchitecture(config.cross_num_key_value_heads),
        policy=PolicyArchitecture(16, 9),
        plan=config.plan,
        bidirectional_vision=config.bidirectional_vision,
    )


@pytest.mark.parametrize("budget", ALL)
def test_cache_bytes_equal_the_formula(visor, tiny, budget):
    inputs = tiny.prompt(visor, [(20, 30)])
    _, cache = steps(visor, inputs, count=3, budget=budget)
    visual = int((inputs["input_ids"] == tiny.IMAGE).sum())
    text = inputs["input_ids"].shape[1] - visual + 3
    bits = visor.config.resolve_budget(budget)
    assert cache.num_bytes() == cache_bytes(architecture_of(visor.config), bits, visual, text, 4)


@pytest.mark.parametrize("changes", [{}, {"plan": "dense"}, {"bidirectional_vision": True}])
def test_flops_are_those_of_the_budget_module(tiny, changes):
    config = tiny.config(**changes)
    for bits in all_subsets(config.num_slots):
        expected = decoder_flops(architecture_of(config), bits, 729, 60)
        assert config.decoder_flops(bits, 729, 60) == pytest.approx(expected, rel=1e-12)


def test_bidirectional_vision_lets_a_picture_see_ahead_but_not_text(tiny):
    model = tiny.randomize(VisorForConditionalGeneration(tiny.config(bidirectional_vision=True)))
    one_way = VisorForConditionalGeneration(tiny.config())
    one_way.load_state_dict(model.state_dict())
    inputs = tiny.prompt(model, [(20, 30)])
    assert (model(**inputs, budget="full").logits - one_way.eval()(**inputs, budget="full").logits).abs().max() > 1e-3
    ids = inputs["input_ids"].clone()
    ids[:, -1] += 1
    changed = model(**{**inputs, "input_ids": ids}, budget="full").logits
    assert torch.equal(changed[:, :-1], model(**inputs, budget="full").logits[:, :-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "0b111"}, "one bit for each of this model's 2 slots"),
        ({"budget": "most"}, "expected auto, full, empty"),
        ({"budget": "3"}, "no viable budget has 3 slots on"),
        ({"budget": [True]}, "1 booleans"),
        ({"budget": ["full", "empty"]}, "2 budgets for 1 samples"),
        ({"image_sizes": torch.tensor([[48, 48]])}, "image placeholders"),
        ({"image_sizes": None}, "image_sizes"),
        ({"batch_num_images": torch.tensor([2])}, "batch_num_images"),
        ({"pixel_values": torch.zeros(1, 1, 3, 16, 16)}, "image_sizes give"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(visor, tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        visor(**{**tiny.prompt(visor, [(20, 30)]), **changes})


def test_pictures_behind_a_cache_are_refused(visor, tiny):
    inputs = tiny.prompt(visor, [(20, 30)])
    cache = visor(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pictures can only come with the first tokens"):
        visor(**inputs, past_key_values=cache)


def test_auto_needs_a_policy(tiny):
    model = VisorForConditionalGeneration(tiny.config(has_policy=False)).eval()
    inputs = tiny.prompt(model, [(20, 30)])
    assert model(**inputs).budgets.all()
    with pytest.raises(ValueError, match="trained policy"):
        model(**inputs, budget="auto")
