"""The dense plan of the exported module equals transformers' LLaVA-OneVision with the same weights."""

import pytest
import torch

from visor_jax.export.torch_model import VisorForConditionalGeneration


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request, tiny):
    """(transformers' model, ours): seven layers, grouped queries, at most two tiles' worth of stitched tokens."""
    with torch.no_grad():
        config = tiny.config("dense", tie_word_embeddings=request.param == "tied")
        ours = tiny.randomize(VisorForConditionalGeneration(config))
        return tiny.stock_twin(ours), ours


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(16, 16)], id="one tile"),
        pytest.param([(20, 47)], id="wide"),
        pytest.param([(200, 3)], id="very tall"),
        pytest.param([(100, 90)], id="shrunk"),
        pytest.param([(16, 16), (20, 47), (100, 90)], id="three pictures"),
        pytest.param([], id="text only"),
    ],
)
def test_logits_and_loss_equal_transformers(pair, tiny, sizes):
    stock, ours = pair
    inputs = tiny.prompt(ours, sizes)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == tiny.IMAGE, -100)
    expected, actual = stock(**inputs, labels=labels), ours(**inputs, labels=labels)
    assert (expected.logits - actual.logits).abs().max() <= 1e-5
    assert abs(expected.loss - actual.loss) <= 1e-5


def test_batches_and_generation_equal_transformers(pair, tiny):
    stock, ours = pair
    prompts = [tiny.prompt(ours, [(20, 47)], seed=1), tiny.prompt(ours, [(9, 9)], after=2, seed=2)]
    inputs = tiny.join(prompts)
    kept = inputs["attention_mask"].bool()
    difference = (stock(**inputs).logits - ours(**inputs).logits)[kept]
    assert difference.abs().max() <= 1e-5
    settings = tiny.greedily(8)
    for extra in ({}, {"use_cache": False}, {"num_beams": 2}):
        assert torch.equal(stock.generate(**inputs, **settings, **extra), ours.generate(**inputs, **settings, **extra))
