"""The cache of the exported module: both of its names, all operations, and decoding that removes tokens."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from visor_jax.export.torch_model import VisorForConditionalGeneration
from visor_jax.export.torch_model.cache_visor import VisorCache

NAMES = ["past_key_values", "cache"]
LOOKUP = {"prompt_lookup_num_tokens": 3, "eos_token_id": 60}  # 5.3 requires an end token
BUDGETS = ["full", "0b01", "empty"]


def three_prompts(visor, tiny, side="left"):
    """Returns three prompts with different pictures and lengths, and their batch."""
    prompts = [
        tiny.prompt(visor, [(20, 30)], before=2, seed=1),
        tiny.prompt(visor, [(16, 16), (30, 9)], before=1, after=1, seed=2),
        tiny.prompt(visor, [], after=9, seed=3),
    ]
    return prompts, tiny.join(prompts, side)


def decode(model, cache, tokens, mask=None, name="cache"):
    """Returns the logits after each of `tokens` [B, n], decoded one by one."""
    rows = []
    for column in tokens.T:
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        rows.append(model(input_ids=column[:, None], attention_mask=mask, **{name: cache}).logits[:, -1])
    return torch.stack(rows, dim=1)


@pytest.fixture
def inputs(visor, tiny):
    return tiny.prompt(visor, [(20, 30)])


@pytest.fixture
def tower_calls(visor, inputs):
    """A list that gets one entry per run of the vision tower, after `inputs` is made."""
    calls = []
    hook = visor.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_by_hand_reads_the_picture_once_under_either_name(visor, inputs, tower_calls, name):
    output, tokens = visor(**inputs), []
    budget = output.budgets
    for _ in range(6):
        tokens.append(output.logits[:, -1:].argmax(-1))
        assert output[name] is getattr(output, name) is output.get(name) and name in output
        output = visor(input_ids=tokens[-1], **{name: getattr(output, name)})
    assert len(tower_calls) == 1
    ids = torch.cat([inputs["input_ids"], *tokens], dim=1)
    reference = visor(**{**inputs, "input_ids": ids}, budget=budget, use_cache=False)
    assert reference.past_key_values is None and reference.cache is None
    assert torch.equal(reference.logits[:, -7:-1].argmax(-1), torch.cat(tokens, dim=1))
    assert (reference.logits[:, -1] - output.logits[:, -1]).abs().max() <= 1e-5


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}, LOOKUP])
def test_generate_reads_the_picture_once(visor, tiny, inputs, tower_calls, settings):
    visor.generate(**inputs, **tiny.greedily(6, **settings))
    assert len(tower_calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_behind_a_cache_under_either_name(visor, tiny, inputs, tower_calls, name):
    settings = tiny.greedily(3, return_dict_in_generate=True)
    first = visor.generate(**inputs, **settings)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    follow = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    mask = torch.ones_like(follow)
    second = visor.generate(follow, attention_mask=mask, **settings, **{name: first.past_key_values})
    assert len(tower_calls) == 1
    reference = visor.generate(
        **{**inputs, "input_ids": follow}, **tiny.greedily(3), budget=first.past_key_values.budgets
    )
    assert torch.equal(second.sequences, reference)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_the_next_step_are_the_new_tokens(visor, inputs, name):
    cache = visor(**inputs).past_key_values
    ids = torch.cat([inputs["input_ids"], torch.tensor([[7, 8]])], dim=1)
    pictures = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    for extra in ({"attention_mask": torch.ones_like(ids)}, {"next_sequence_length": 2}):
        step = visor.prepare_inputs_for_generation(ids, **{name: cache}, **extra, **pictures, budget="full")
        assert step["input_ids"].tolist() == [[7, 8]] and not set(step) & set(pictures)
        assert [step[each] for each in NAMES if each in step] == [cache]


def test_two_caches_and_other_kinds_of_cache_are_refused(visor, tiny, inputs):
    one, other = VisorCache(visor.config), VisorCache(visor.config)
    for call in (visor, visor.generate, visor.model):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(**inputs, past_key_values=one, cache=other)
        for name in NAMES:
            with pytest.raises(TypeError, match="a DynamicCache; expected a VisorCache"):
                call(**inputs, **{name: DynamicCache()})
    with pytest.raises(ValueError, match="cache_implementation: 'static'"):
        visor.generate(**inputs, **tiny.greedily(2), cache_implementation="static")
    with pytest.raises(NotImplementedError, match="own model's layers"):
        one.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)


def test_a_cache_given_empty_is_filled(visor, inputs):
    cache = VisorCache(visor.config)
    assert not cache and cache.batch_size == -1 and cache.get_seq_length() == 0
    output = visor(**inputs, cache=cache)
    assert output.cache is cache and cache and len(cache) == 7 and cache.batch_size == 1
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] == cache.get_mask_sizes(1)[0] - 1


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1], [2], [0, 2, 2, 1]], ids=str)
@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
def test_samples_are_reordered_with_their_budgets(visor, tiny, operation, rows):
    prompts, inputs = three_prompts(visor, tiny)
    cache = visor(**inputs, budget=BUDGETS).past_key_values
    getattr(cache, operation)(torch.tensor(rows))
    tokens = torch.randint(2, tiny.IMAGE, (len(rows), 4), generator=torch.Generator().manual_seed(0))
    actual = decode(visor, cache, tokens, inputs["attention_mask"][rows])
    for row, number in enumerate(rows):
        single = visor(**prompts[number], budget=BUDGETS[number]).past_key_values
        expected = decode(visor, single, tokens[row : row + 1])
        assert (actual[row] - expected[0]).abs().max() <= 1e-5


def test_a_mask_selects_and_repeats_are_adjacent(visor, tiny):
    _, inputs = three_prompts(visor, tiny)
    cache = visor(**inputs, budget=BUDGETS).past_key_values
    selected, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
    selected.batch_select_indices(torch.tensor([True, False, True]))
    assert selected.budgets.tolist() == [[True, True], [False, False]]
    repeated.batch_repeat_interleave(2)
    tokens = torch.arange(2, 8).reshape(6, 1)
    mask = inputs["attention_mask"].repeat_interleave(2, dim=0)
    actual = decode(visor, repeated, tokens, mask)
    for part in (0, 1):
        again = decode(visor, copy.deepcopy(cache), tokens[part::2], inputs["attention_mask"])
        assert (actual[part::2] - again).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_removed_tokens_leave_no_trace(visor, tiny, side):
    _, inputs = three_prompts(visor, tiny, side)
    length, cache = inputs["input_ids"].shape[1], visor(**inputs, budget=BUDGETS).past_key_values
    untouched = copy.deepcopy(cache)
    guesses = torch.randint(2, tiny.IMAGE, (3, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]])], dim=1)
    visor(input_ids=guesses, attention_mask=mask, cache=cache)
    cache.crop(0)
    assert cache.get_seq_length() == length + 4 and cache.is_croppable
    cache.crop(-3)
    cache.crop(length)
    assert cache.num_bytes() == untouched.num_bytes()
    tokens = torch.arange(2, 11).reshape(3, 3)
    actual, expected = (decode(visor, each, tokens, inputs["attention_mask"]) for each in (cache, untouched))
    assert torch.equal(actual, expected)


def test_pictures_are_not_cut_into_and_a_reset_starts_again(visor, tiny):
    inputs = tiny.prompt(visor, [(20, 30)], after=3)
    output = visor(**inputs, budget="full")
    cache, end = output.past_key_values, int((inputs["input_ids"] == tiny.IMAGE).nonzero()[-1, 1]) + 1
    with pytest.raises(ValueError, match=f"{end - 1} columns would be left, but the last picture ends at {end}"):
        cache.crop(end - 1)
    cache.crop(end)
    assert cache.get_seq_length() == end
    cache.reset()
    assert not cache and cache.num_bytes() == 0 and cache.budgets is None
    other = tiny.join([tiny.prompt(visor, [(9, 9)], seed=5), tiny.prompt(visor, [], after=9, seed=6)])
    assert torch.equal(visor(**other, budget="empty", cache=cache).logits, visor(**other, budget="empty").logits)
    text = visor(**tiny.prompt(visor, [], after=9)).past_key_values
    text.crop(-99)
    assert not text


@pytest.mark.parametrize("budget", ["auto", "0b01"])
@pytest.mark.parametrize("helper", ["itself", "another", "stock", "lookup"])
def test_assisted_decoding_writes_the_same_tokens(visor, tiny, budget, helper):
    inputs = tiny.prompt(visor, [(20, 30)], after=9)
    inputs["input_ids"][:, -4:] = inputs["input_ids"][:, -8:-4]  # a repetition that prompt lookup finds
    settings = tiny.greedily(12, budget=budget)
    expected = visor.generate(**inputs, **settings)
    if helper == "lookup":
        assert torch.equal(visor.generate(**inputs, **{**settings, **LOOKUP}), expected)
        return
    assistant = visor
    if helper == "another":
        assistant = tiny.randomize(VisorForConditionalGeneration(tiny.config()), seed=3)
    elif helper == "stock":  # a text model without budgets
        assistant = stock_text_model(tiny)
    inputs = {**inputs} if helper != "stock" else tiny.prompt(visor, [], after=9)
    expected = expected if helper != "stock" else visor.generate(**inputs, **tiny.greedily(12))
    settings = settings if helper != "stock" else tiny.greedily(12)
    actual = visor.generate(**inputs, **settings, assistant_model=assistant)
    assert torch.equal(actual, expected)


def stock_text_model(tiny):
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(tiny.config().text_config).eval()


def test_hidden_states_and_attentions(visor, tiny):
    prompts, inputs = three_prompts(visor, tiny)
    output = visor(**inputs, budget=BUDGETS, output_hidden_states=True)
    assert len(output.hidden_states) == 8 and output.attentions is None
    for row, (each, budget) in enumerate(zip(prompts, BUDGETS, strict=True)):
        single = visor(**each, budget=budget, output_hidden_states=True).hidden_states
        length = each["input_ids"].shape[1]
        for one, other in zip(output.hidden_states, single, strict=True):
            assert (one[row, -length:] - other[0]).abs().max() <= 1e-4
    assert (visor.lm_head(output.hidden_states[-1]) - output.logits).abs().max() <= 1e-5
    extra = visor.generate(**inputs, **tiny.greedily(2, output_hidden_states=True, return_dict_in_generate=True))
    assert [len(step) for step in extra.hidden_states] == [8, 8] and extra.hidden_states[1][0].shape == (3, 1, 32)
    with_attentions = {"output_attentions": True}
    for call in (
        lambda: visor(**inputs, **with_attentions),
        lambda: visor.generate(**inputs, **tiny.greedily(2), **with_attentions),
    ):
        with pytest.raises(ValueError, match="output_attentions: a VISOR model does not return attention weights"):
            call()


def test_embeddings_in_place_of_ids(visor, tiny, inputs):
    ids = inputs.pop("input_ids")
    embeddings = visor.get_input_embeddings()(ids)
    expected = visor(input_ids=ids, **inputs).logits
    assert torch.equal(visor(inputs_embeds=embeddings, **inputs).logits, expected)
    for both in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="input_ids and inputs_embeds: expected one of them"):
            visor(**both, **inputs)
    written = visor.generate(input_ids=ids, **inputs, **tiny.greedily(5))[:, -5:]
    assert torch.equal(visor.generate(inputs_embeds=embeddings, **inputs, **tiny.greedily(5)), written)


def test_a_tuple_holds_what_the_output_holds(visor, inputs):
    names = ["logits", "hidden_states", "budgets", "policy_logits"]
    output = visor(**inputs, use_cache=False, output_hidden_states=True)
    assert list(output) == names
    for one, other in zip(
        output.to_tuple(), visor(**inputs, use_cache=False, output_hidden_states=True, return_dict=False), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_pictures_features_come_as_transformers_gives_them(visor, inputs):
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    output = visor.get_image_features(**pictures, output_hidden_states=True)
    _, patches, size = output.last_hidden_state.shape
    assert (patches, size) == (16, 24) and len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert [each.shape[1] for each in output.pooler_output] == [32]
    assert visor.get_image_features(**pictures).hidden_states is None


def test_outputs_have_the_fields_of_transformers_in_their_order():
    from visor_jax.export.torch_model.generation_visor import VisorCausalLMOutput

    cache = object()
    output = VisorCausalLMOutput(logits=torch.zeros(1), hidden_states=(torch.ones(1),))
    output.cache = cache
    assert output.past_key_values is cache and output["past_key_values"] is cache
    stock = CausalLMOutputWithPast(logits=torch.zeros(1), hidden_states=(torch.ones(1),))
    assert list(stock) == [name for name in output if name in stock]
    with pytest.raises(AttributeError, match="no attribute 'caches'"):
        output.caches  # noqa: B018


def test_the_dense_plan_has_the_hidden_states_of_transformers(tiny):
    config = tiny.config("dense")
    ours = tiny.randomize(VisorForConditionalGeneration(config))
    inputs = tiny.prompt(ours, [(20, 47)])
    stock = tiny.stock_twin(ours)
    expected = stock(**inputs, output_hidden_states=True).hidden_states
    actual = ours(**inputs, output_hidden_states=True).hidden_states
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5
