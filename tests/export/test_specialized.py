"""`torch.export` programs of an exported model under one budget equal the model."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visor_jax import testing
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor
from visor_jax.export.torch_model.specialized_visor import export_programs, specialize

NEW = 4
SLOW = [("one", "full"), ("one", "empty"), ("two pictures", "0b01"), ("two prompts", "full"), ("text", "full")]


@pytest.fixture(scope="module")
def model(visor_folder) -> Any:
    """A model in float64, so that differences are mistakes, not rounding."""
    return VisorForConditionalGeneration.from_pretrained(visor_folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def processor(visor_folder) -> VisorProcessor:
    created = VisorProcessor.from_pretrained(visor_folder)
    created.dtype = np.dtype(np.float64)
    return created


def prompts(processor, count: int) -> dict[str, torch.Tensor]:
    """Inputs with one tiled picture, with two pictures, of two prompts of equal shape, or without a picture."""
    pictures = [Image.fromarray(testing.random_picture(20, 33, seed)) for seed in (0, 1)]
    cases = {
        "one": [(pictures[0], "Which digit?")],
        "two pictures": [(pictures, "Which digit?")],
        "two prompts": [(pictures[0], "Which digit?"), (pictures[1], "Which digit?")],
        "text": [([], "Which digit?")],
    }
    return dict(processor.batch(cases[count]))


@pytest.mark.parametrize(
    ("kind", "budget"),
    [
        ("one", "0b10"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_exported_programs_give_the_models_logits(model, processor, kind, budget):
    """Prefill, then steps over given tokens with a growing cache; the programs have no control flow."""
    inputs = prompts(processor, kind)
    programs = export_programs(model, inputs, budget)
    prefill, step = programs.prefill.module(), programs.step.module()
    nodes = [node for program in programs[:2] for node in program.graph.nodes]
    names = [str(node.target) for node in nodes if node.op == "call_function"]  # parameter names also match
    assert not [
        name for name in names if any(part in name for part in ("scalar_dense", "aten.item", "cond", "nonzero"))
    ]
    pixels = [inputs[name] for name in ("pixel_values",) if name in inputs]
    with torch.no_grad():
        logits, cache = prefill(inputs["input_ids"], *pixels)
        tokens = torch.arange(3, 3 + NEW).expand(len(logits), -1)
        rows = [logits]
        for number in range(NEW):
            position = torch.full((len(logits), 1), programs.start + number)
            logits, cache = step(tokens[:, number : number + 1], position, cache)
            rows.append(logits)
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        reference = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = model(**reference, budget=budget).logits
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_program_can_be_saved(model, processor, tmp_path):
    inputs = prompts(processor, "one")
    programs = export_programs(model, inputs, "full")
    torch.export.save(programs.prefill, tmp_path / "prefill.pt2")
    again = torch.export.load(tmp_path / "prefill.pt2").module()
    with torch.no_grad():
        first, second = (
            exported(inputs["input_ids"], inputs["pixel_values"])[0] for exported in (programs.prefill.module(), again)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "budget", "message"),
    [
        ({}, "auto", "model.route"),
        ({"attention_mask": torch.zeros(1, 1)}, "full", "padded"),
    ],
)
def test_what_leaves_a_choice_is_refused(model, processor, change, budget, message):
    with pytest.raises(ValueError, match=message):
        specialize(model, {**prompts(processor, "one"), **change}, budget)


def test_pictures_stand_in_the_same_columns(model, processor):
    pictures = [Image.fromarray(testing.random_picture(20, 33, seed)) for seed in (0, 1)]
    inputs = processor.batch([(pictures[0], "What?"), (pictures[1], "What?")])
    inputs["input_ids"][1] = inputs["input_ids"][1].flip(0)
    with pytest.raises(ValueError, match="same columns"):
        specialize(model, inputs, "full")
