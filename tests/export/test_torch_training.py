"""Training the exported module with PyTorch's tools: gradient checkpointing, Trainer, LoRA."""

import copy
from typing import Any

import pytest
import torch

from visor_jax.export.torch_model import VisorForConditionalGeneration
from visor_jax.export.torch_model.cache_visor import VisorCache

BUDGETS = ["full", "0b01", "empty"]


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def model(visor):
    return copy.deepcopy(visor).train()


@pytest.fixture
def batch(visor, tiny):
    prompts = [
        tiny.prompt(visor, [(20, 30)], before=2, seed=1),
        tiny.prompt(visor, [(16, 16), (30, 9)], before=1, after=1, seed=2),
        tiny.prompt(visor, [], after=9, seed=3),
    ]
    inputs = tiny.join(prompts, "right")
    targets = (inputs["input_ids"] != tiny.IMAGE) & inputs["attention_mask"].bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~targets, -100)}


def gradients_of(model, batch, **settings) -> dict[str, torch.Tensor]:
    """Returns the gradients of the loss, and of the policy's scores if the policy ran."""
    model.zero_grad()
    output = model(**batch, **settings)
    loss = output.loss if output.policy_logits is None else output.loss + output.policy_logits.square().sum()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("budget", ["auto", BUDGETS], ids=["auto", "mixed"])
def test_gradients_are_the_same_when_layers_run_again(model, batch, budget, reentrant):
    expected = gradients_of(model, batch, budget=budget)
    assert len(expected) > 100
    calls = []
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.vision_model.encoder.layers]:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**batch, budget=budget)
    once = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls.clear()
    actual = gradients_of(model, batch, budget=budget)
    assert len(calls) == 2 * once
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_no_cache_is_kept_while_layers_run_again(model, batch):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model(**batch).cache is None
    for given in ({"use_cache": True}, {"cache": VisorCache(model.config)}):
        with pytest.raises(ValueError, match="gradient checkpointing keeps no cache"):
            model(**batch, **given)


def test_a_model_in_training_still_generates(model, visor, tiny):
    inputs = tiny.prompt(visor, [(20, 30)])
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(**inputs, **tiny.greedily(5)), visor.generate(**inputs, **tiny.greedily(5)))


def train(model: Any, batch, folder, **settings) -> list[float]:
    """Returns the losses of eight steps of transformers' Trainer on one batch."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[0] * 8, data_collator=lambda _: batch)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_checkpointed_layers(model, batch, tmp_path, reentrant):
    plain = train(copy.deepcopy(model), batch, tmp_path / "plain")
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    losses = train(model, batch, tmp_path / "again", **settings)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(plain, rel=1e-3)


def test_lora_with_checkpointed_layers(model, visor, batch, tiny, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    losses = train(adapted, batch, tmp_path / "run", gradient_checkpointing=True)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(visor), tmp_path / "adapter").eval()
    inputs, adapted = tiny.prompt(visor, [(20, 30)]), adapted.eval()
    with torch.no_grad():
        expected = adapted(**inputs, budget="full").logits
        assert (expected - visor(**inputs, budget="full").logits).abs().max() > 1e-3
        assert (again(**inputs, budget="full").logits - expected).abs().max() <= 1e-5
        merged = again.merge_and_unload()
        assert isinstance(merged, VisorForConditionalGeneration)
        assert (merged(**inputs, budget="full").logits - expected).abs().max() <= 1e-4
    written = adapted.generate(**inputs, **tiny.greedily(4))
    assert written.shape[1] == inputs["input_ids"].shape[1] + 4
