"""Exported models with little memory: quantized, or with weights on the CPU or on disk, with every budget.

bitsandbytes and accelerate are not dependencies; `pip install accelerate bitsandbytes` enables these tests.
"""

import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from visor_jax import testing
from visor_jax.export.torch_model import VisorConfig, VisorForConditionalGeneration, VisorProcessor

ACCELERATE = importlib.util.find_spec("accelerate") is not None
BITSANDBYTES = ACCELERATE and importlib.util.find_spec("bitsandbytes") is not None
needs_accelerate = pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes and accelerate")
BUDGETS = ["auto", "full", "empty", "0b10"]


@pytest.fixture(scope="module")
def reference(visor_folder) -> Any:
    return load(visor_folder)


@pytest.fixture(scope="module")
def inputs(visor_folder) -> dict[str, torch.Tensor]:
    pictures = [Image.fromarray(testing.random_picture(20, 33, seed)) for seed in (0, 1)]
    processor = VisorProcessor.from_pretrained(visor_folder)
    return dict(processor.batch([(pictures[0], "Which digit?"), (pictures, "How many are there?"), ([], "And now?")]))


def load(folder, **options) -> Any:
    return VisorForConditionalGeneration.from_pretrained(folder, **options).eval()


def assert_close(actual: Any, expected: Any, share: float) -> None:
    """Asserts that logits differ on average by less than `share` of their standard deviation."""
    assert actual.logits.shape == expected.logits.shape
    assert actual.policy_logits is None or torch.isfinite(actual.policy_logits).all()
    spread = expected.logits.std()
    assert (actual.logits.float() - expected.logits).abs().mean() < share * spread


@pytest.mark.parametrize("budget", BUDGETS)
def test_dynamic_quantization(reference, inputs, budget):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it moves to another package
        small = torch.ao.quantization.quantize_dynamic(reference, {nn.Linear}, dtype=torch.qint8)
    actual = small(**inputs, budget=budget)
    fixed = actual.budgets.tolist()  # an 8-bit policy may choose differently if two budgets have nearly equal scores
    assert_close(actual, reference(**inputs, budget=fixed), share=0.2)
    tokens = small.generate(**inputs, budget=budget, max_new_tokens=3)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def wide(reference, tmp_path_factory) -> Any:
    """A model whose widths are multiples of 64, which 4-bit bitsandbytes requires."""
    fields = reference.config.to_dict()
    fields["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128}
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    VisorForConditionalGeneration(
        VisorConfig(**fields | {"policy_hidden_size": 64, "policy_max_budgets": 32})
    ).save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=load(folder))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("budget", BUDGETS)
def test_bitsandbytes(wide, inputs, bits, budget):
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    small = load(wide.folder, quantization_config=settings, dtype=torch.float32)
    assert any(type(module).__module__.startswith("bitsandbytes") for module in small.modules())
    actual = small(**inputs, budget=budget)
    assert_close(actual, wide.model(**inputs, budget=actual.budgets.tolist()), share=0.1 if bits == 8 else 0.5)
    assert small.generate(**inputs, budget=budget, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@needs_accelerate
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights_give_the_same(visor_folder, reference, inputs, tmp_path, place, budget):
    """Hooks also load the parameters outside linear layers: routing token, newline and gates."""
    import accelerate

    if place == "cpu_offload":
        model = accelerate.cpu_offload(load(visor_folder), execution_device=torch.device("cpu"))
    elif place == "disk_offload":
        model = accelerate.disk_offload(load(visor_folder), str(tmp_path), execution_device=torch.device("cpu"))
    else:
        memory = {
            "cpu": sum(2 * parameter.numel() for parameter in reference.parameters())
        }  # half of the float32 bytes
        model = load(visor_folder, device_map="auto", max_memory=memory, offload_folder=str(tmp_path))
    assert any(parameter.is_meta for parameter in model.parameters())
    expected, actual = (tested(**inputs, budget=budget) for tested in (reference, model))
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.budgets, expected.budgets)
    tokens = [tested.generate(**inputs, budget=budget, max_new_tokens=3) for tested in (reference, model)]
    assert torch.equal(*tokens)
    assert torch.equal(model.route(**inputs), reference.route(**inputs))


@needs_accelerate
def test_device_map_auto_loads(visor_folder, reference, inputs):
    model = load(visor_folder, device_map="auto")
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
