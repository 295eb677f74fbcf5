"""Answers to follow-up questions equal those of the exported PyTorch model, for the dense plan transformers' class.

PyTorch's prompts are made with the folder's chat template.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from visor_jax import testing
from visor_jax.export import torch_export
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor
from visor_jax.loading import Visor

pytestmark = pytest.mark.usefixtures("quick")
TOKENIZER = testing.almanac_tokenizer()
HISTORY = [("What colour is A?", "red"), ("Which digit is it?", "4")]
COUNT = 8
PICTURE, OTHER = (Image.fromarray(testing.random_picture(12, 15, seed=seed)) for seed in (0, 1))


@pytest.fixture(scope="module", params=["visor", "dense"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Visor, Path]:
    arch = testing.tiny_architecture(4, plan=request.param)
    arch = dataclasses.replace(arch, text=dataclasses.replace(arch.text, vocab_size=TOKENIZER.vocab_size))
    viable = [(False,), (True,)] if request.param == "visor" else []
    policy = request.param == "visor"
    model = Visor(testing.random_params(arch), arch, TOKENIZER, viable, has_policy=policy, system="Be brief.")
    folder = tmp_path_factory.mktemp(request.param)
    torch_export.write_folder(folder, model, stage="policy", dtype="float32", max_shard_bytes=10**9)
    return model, folder


def messages(pictures: list[Image.Image], question: str) -> list[dict[str, Any]]:
    """Returns the conversation as messages of transformers, with the pictures in the first turn."""
    first: list[dict[str, Any]] = [{"type": "image"} for _ in pictures]
    turns: list[dict[str, Any]] = []
    for earlier_question, answer in [*HISTORY, (question, "")]:
        turns.append({"role": "user", "content": [*first, {"type": "text", "text": earlier_question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        first = []
    return turns[:-1]


def answer_in_torch(folder: Path, dense: bool, pictures: list[Image.Image], question: str) -> tuple[str, np.ndarray]:
    """Returns the exported model's answer to the conversation, and the logits of its first token under "full"."""
    kind = LlavaOnevisionForConditionalGeneration if dense else VisorForConditionalGeneration
    model: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
    processor = VisorProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages(pictures, question), add_generation_prompt=True, return_dict=False)
    lengths = iter([processor.num_visual_tokens((p.height, p.width), len(pictures)) for p in pictures])
    placeholder = TOKENIZER.image_token_id
    ids = [i for token in ids for i in [token] * (next(lengths) if token == placeholder else 1)]
    inputs = dict(processor.batch([(pictures, "<image>" * len(pictures))])) if pictures else {}
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    auto, full = ({}, {}) if dense else ({"budget": "auto"}, {"budget": "full"})
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False, **auto)
        first = model(**inputs, **full).logits[0, -1].numpy()
    return TOKENIZER.decode(tokens[0, len(ids) :].tolist()), first


@pytest.mark.parametrize("pictures", [[PICTURE], [PICTURE, OTHER], []], ids=["one picture", "two", "text only"])
def test_a_conversation_has_the_exported_models_answer(
    exported: tuple[Visor, Path], pictures: list[Image.Image]
) -> None:
    model, folder = exported
    dense = model.arch.plan == "dense"
    text, first = answer_in_torch(folder, dense, pictures, "And where?")
    assert model.answer(pictures, "And where?", history=HISTORY, max_new_tokens=COUNT).text == text
    bits = () if dense else (True,)
    with_history, without = (
        model._engine.logits(model._prompt(pictures, "And where?", history), bits)[-1] for history in (HISTORY, ())
    )
    np.testing.assert_allclose(with_history, first, atol=1e-5)
    assert np.abs(without - first).max() > 0.01, "the history matters"
