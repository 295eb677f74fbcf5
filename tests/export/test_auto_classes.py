"""An exported folder in transformers' AutoProcessor, AutoModel and pipelines, with remote code."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from visor_jax import testing
from visor_jax.export.torch_export import write_folder
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor
from visor_jax.loading import Visor

PICTURE = Image.fromarray(testing.random_picture(20, 33))
CHAT = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Which digit?"}]}]


@pytest.fixture(scope="module")
def direct(visor_folder) -> tuple[Any, VisorProcessor]:
    """The same folder without remote code."""
    model: Any = VisorForConditionalGeneration.from_pretrained(visor_folder).eval()
    return model, VisorProcessor.from_pretrained(visor_folder)


def test_auto_processor_is_ours(visor_folder, direct):
    loaded_processor = transformers.AutoProcessor.from_pretrained(visor_folder, trust_remote_code=True)
    assert type(loaded_processor).__name__ == "VisorProcessor" and isinstance(
        loaded_processor, transformers.ProcessorMixin
    )
    assert type(loaded_processor).__module__.startswith("transformers_modules.")
    expected = direct[1](PICTURE, " Which digit? ")
    inputs = loaded_processor(PICTURE, " Which digit? ")
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())
    assert "VisorProcessor" in repr(loaded_processor) and loaded_processor.model_input_names[0] == "input_ids"


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForImageTextToText"])
def test_auto_models_generate(visor_folder, direct, auto):
    model, processor = direct
    inputs = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, add_generation_prompt=True)
    loaded = getattr(transformers, auto).from_pretrained(visor_folder, trust_remote_code=True).eval()
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5), model.generate(**inputs, max_new_tokens=5))


def test_pipeline_answers_as_the_model(visor_folder, direct, caplog):
    model, processor = direct
    ask = transformers.pipeline("image-text-to-text", model=str(visor_folder), trust_remote_code=True)
    for budget in ("auto", "0b10"):
        output = ask(CHAT, return_full_text=False, generate_kwargs={"budget": budget, "max_new_tokens": 5})
        inputs = processor(PICTURE, "Which digit?")
        tokens = model.generate(**inputs, budget=budget, max_new_tokens=5)
        expected = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert output[0]["generated_text"] == expected
    assert "not supported" not in caplog.text
    opened = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "It"}]}]
    continued = ask(opened, max_new_tokens=3)[0]["generated_text"][-1]
    assert continued["role"] == "assistant" and continued["content"][-1]["text"].startswith("It")
    several = ask([CHAT, CHAT], max_new_tokens=3, return_full_text=False)
    assert several[0] == several[1]
    rendered = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    by_text = ask(PICTURE, text=rendered, max_new_tokens=3, return_full_text=False)
    assert by_text[0]["generated_text"] == several[0][0]["generated_text"]


def test_without_trust_no_other_processor_is_loaded_silently(visor_folder):
    """transformers' processor is never used instead; its pixels and white space differ slightly."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoProcessor.from_pretrained(visor_folder, trust_remote_code=False)


def test_a_pipeline_reads_standardized_pictures(jax_model, tmp_path):
    """No image processor of transformers standardizes pictures; the pipeline uses the folder's own processor."""
    arch = dataclasses.replace(jax_model.arch, anyres=dataclasses.replace(jax_model.arch.anyres, standardize=True))
    model = Visor(jax_model.params, arch, jax_model.tokenizer, jax_model.viable_budgets, has_policy=True)
    write_folder(tmp_path, model, stage="policy", dtype="float32", max_shard_bytes=10**9)
    ask = transformers.pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True)
    assert ask.processor.tiler.standardize
    output = ask(CHAT, return_full_text=False, generate_kwargs={"budget": "full", "max_new_tokens": 5})
    assert output[0]["generated_text"] == model.answer(PICTURE, "Which digit?", "full", max_new_tokens=5).text
