"""Writes the model card of an exported folder: README.md with metadata for the hub.

In: a model, its parity result, and further facts (`About`). Out: the card's text. huggingface_hub formats the metadata
(license, base model, languages, tags, library, pipeline, metrics).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.budget import budget_name
from visor_jax.config.schema import TRAINED_STAGES, ExportConfig
from visor_jax.cost import decoder_flops, dense_decoder_flops
from visor_jax.data.anyres import visual_token_count, whole_token_count
from visor_jax.export.folder_files import has_own_processor
from visor_jax.export.parity import NEW_TOKENS, ExportedModel, Parity
from visor_jax.files.read_write import read_json
from visor_jax.workdir.folder import Workdir

OWN_LICENSE = "apache-2.0"  # of weights without a base model


@dataclass(frozen=True)
class About:
    """Facts for a model card that the model itself does not hold.

    Attributes:
      license: the weights' license, as the hub spells it.
      base_model: hub id of the model that the weights come from; "" for none.
      languages: two-letter codes.
      evaluation: result of `visor evaluate` for this stage, or empty.
    """

    license: str = OWN_LICENSE
    base_model: str = ""
    languages: Sequence[str] = ("en",)
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def about_stage(settings: ExportConfig, workdir: Workdir, stage: str) -> About:
    """Collects the facts about one stage's model from a workdir and the configuration's `export` fields."""
    folders = [workdir.stage(name) for name in TRAINED_STAGES]
    records = [read_json(folder.path / "complete.json") for folder in folders if folder.is_complete()]
    started = next((record for record in records if record.get("imported") or "origin" in record), None)
    origin = {} if started is None else {"license": "unknown", **started.get("origin", {})}
    result = workdir.path / "eval" / "test.json"
    evaluation = read_json(result) if result.exists() else {}
    return about(settings, origin, evaluation if evaluation.get("stage") == stage else {})


def about(settings: ExportConfig, origin: Mapping[str, str], evaluation: Mapping[str, Any]) -> About:
    """Combines the configuration's `export` fields, the recorded origin of an imported checkpoint, and an evaluation.

    A field that is set takes precedence; an empty one is taken from the base model (`visor_jax.hf.origin`).
    """
    base_model = settings.base_model or origin.get("base_model", "")
    license_id = settings.license or origin.get("license")
    license_id = license_id or ("unknown" if base_model else OWN_LICENSE)
    return About(license_id, base_model, settings.languages, evaluation)


# --- the text ---------------------------------------------------------------------------------------------------------

VISOR_CARD = """\
# VISOR

A LLaVA-OneVision style vision-language model with an adaptive visual budget (VISOR, arXiv 2603.23495): the decoder
keeps every visual token, but only few layers process them, and a policy decides how many for each question. Exported by
visor_jax after training stage `{stage}`, weights in {dtype}, license of the weights: {license}.

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model=DIR, trust_remote_code=True)
question = [{{"type": "image", "url": "photo.png"}}, {{"type": "text", "text": "What is in the picture?"}}]
print(ask([{{"role": "user", "content": question}}], return_full_text=False))
```

or step by step:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
inputs = processor(Image.open("photo.png"), "What is in the picture?")
tokens = model.generate(**inputs, budget="{default}", max_new_tokens=32)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:]))
```

This runs the Python files of this folder (torch, transformers 5.3 or newer and Pillow are all they need). Without
remote code, from an installation of visor_jax:

```python
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor

model = VisorForConditionalGeneration.from_pretrained(DIR).eval()
processor = VisorProcessor.from_pretrained(DIR)
```

Inputs are those of transformers' LLaVA-OneVision (`input_ids` with one `<image>` id for each visual token,
`pixel_values`, `image_sizes`, `batch_num_images`, `attention_mask`, `labels`) and `budget`:

- `"auto"`: the policy decides for each prompt{auto}; `dial=` above 0 makes it more expensive, below 0 cheaper;
- `"full"`, `"empty"`, or `"0b101"`: one bit for each of the {num_slots} slots, leftmost first;
- `"3"`: the best viable budget with three slots on;
- a list with one of these for each prompt.

`model.route(**inputs)` gives the policy's probabilities over the viable budgets.

## Budgets

Decoder GFLOPs for a prompt of {num_visual} visual and {num_text} text tokens, by formula (causal attention counts half,
the vision tower is excluded). A dense decoder of this size needs {dense:.4g}.

| budget | slots on | decoder GFLOPs | cheaper than dense |
| --- | --- | --- | --- |
{rows}

"""
DENSE_CARD = """\
# LLaVA-OneVision, dense

A LLaVA-OneVision model (stock `LlavaOnevisionForConditionalGeneration`, {code}), exported by visor_jax after
training stage `{stage}`, weights in {dtype}, license of the weights: {license}.

```python
from transformers import LlavaOnevisionForConditionalGeneration

model = LlavaOnevisionForConditionalGeneration.from_pretrained(DIR)
```

"""
STANDARDIZED = """\
**Pictures are standardized**: their pixels minus their mean, over their deviation. No processor of transformers does
this; the folder brings one, `AutoProcessor.from_pretrained(DIR, trust_remote_code=True)`.

"""
NO_GRIDS = """\
**This model does not split pictures into tiles** (`image_grid_pinpoints` is empty). transformers splits the picture of
every prompt that has only one, unless `batch_num_images` groups it with others: pass prompts in pairs with
`batch_num_images=[2]`, one tile `[3, S, S]` for each picture.

"""
EVALUATION = """\
## Accuracy

Benchmark {benchmark}, split {split}, {samples} questions; mean over the benchmark's tasks. GFLOPs per question of the
decoder alone and end to end, with the vision tower.

| budget | accuracy | decoder GFLOPs | end to end GFLOPs |
| --- | --- | --- | --- |
{rows}

"""
PROOF = """\
## Agreement with the JAX model

Measured during the export, on this folder after loading it (`parity.json`): logits differ by at most
{difference:.2g} (allowed {bound:g}) and {new_tokens} greedy tokens are {equal}, over {comparisons} pairs of prompt and
budget{auto}. Both were computed in float64{rounded}; in float32, rounding alone causes a difference of {float32:.2g}.

Pictures were resized by Pillow, as in training. transformers' torchvision backend resizes slightly differently (median
1 to 2 gray levels of 255, at most 27), so its logits deviate slightly.
"""


def write_card(path: Path, model: ExportedModel, proof: Parity, known: About, *, stage: str, dtype: str) -> None:
    """Writes README.md: description, loading, cost per budget, accuracy, and agreement with the JAX model."""
    arch = model.arch
    visor = arch.plan == "visor"
    shared = {"stage": stage, "dtype": dtype, "license": known.license}
    if visor:
        default, auto = (
            ("auto", " (the default)") if model.has_policy else ("full", " (not here: the policy is not trained yet)")
        )
        text = VISOR_CARD.format(**shared, default=default, auto=auto, num_slots=arch.num_slots, **_costs(model))
    else:
        own_processor = has_own_processor(arch)
        code = "remote code for the processor only" if own_processor else "no remote code"
        text = DENSE_CARD.format(**shared, code=code)
        text += STANDARDIZED if own_processor else ""
        text += "" if arch.anyres.pinpoints else NO_GRIDS
    text += _evaluation(known.evaluation)
    text += PROOF.format(
        difference=proof.max_logit_difference,
        float32=proof.float32_logit_difference,
        bound=proof.bound,
        new_tokens=NEW_TOKENS,
        equal="equal" if proof.greedy_tokens_equal else "not equal",
        comparisons=len(proof.comparisons),
        auto=", including `auto` with its routes" if visor and model.has_policy else "",
        rounded=" from the rounded weights" if dtype == "bfloat16" else "",
    )
    path.write_text(f"---\n{metadata(arch, known)}\n---\n\n{text}", encoding="utf-8")


def metadata(arch: Architecture, known: About) -> str:
    """Returns the card's metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for budget, row in known.evaluation.get("budgets", {}).items():
        if budget in ("auto", "full", "empty"):
            results.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=known.evaluation["benchmark"],
                    dataset_name=known.evaluation["benchmark"],
                    dataset_split=known.evaluation.get("split"),
                    metric_type="accuracy",
                    metric_name=f"accuracy, budget {budget}",
                    metric_value=_accuracy(row),
                )
            )
    tags = ["visor", "custom_code"] if arch.plan == "visor" else ["llava_onevision"]
    tags += ["custom_code"] if arch.plan == "dense" and has_own_processor(arch) else []
    scores: dict[str, Any] = (
        {"eval_results": results, "model_name": "VISOR", "metrics": ["accuracy"]} if results else {}
    )
    card = ModelCardData(
        license=known.license,
        base_model=known.base_model or None,
        language=list(known.languages),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*tags, "vision-language-model", "visor_jax"],
        **scores,
    )
    return card.to_yaml()


def _accuracy(row: Mapping[str, Any]) -> float:
    """Returns the mean over the tasks of one budget's row."""
    return round(sum(row["tasks"].values()) / len(row["tasks"]), 4)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """Returns the section on accuracy; empty without an evaluation."""
    if not evaluation.get("budgets"):
        return ""
    rows = [
        f"| `{name}` | {_accuracy(row):.3f} | {row['decoder_gflops']:.4g} | {row['end_to_end_gflops']:.4g} |"
        for name, row in evaluation["budgets"].items()
    ]
    first = next(iter(evaluation["budgets"].values()))
    return EVALUATION.format(
        benchmark=evaluation["benchmark"],
        split=evaluation.get("split", "test"),
        samples=first.get("samples", "?"),
        rows="\n".join(rows),
    )


def _costs(model: ExportedModel, num_text: int = 60) -> dict[str, Any]:
    """Builds the table of budgets, for one picture of a tile's size and `num_text` text tokens."""
    arch = model.arch
    size = (arch.vision.tile_size, arch.vision.tile_size)
    num_visual = visual_token_count(size, arch)
    dense = dense_decoder_flops(arch, whole_token_count([size], arch), num_text)
    rows = []
    for bits in model.viable_budgets:
        flops = decoder_flops(arch, bits, num_visual, num_text)
        rows.append(f"| `{budget_name(bits)}` | {sum(bits)} | {flops / 1e9:.4g} | {dense / flops:.1f}x |")
    return {"rows": "\n".join(rows), "dense": dense / 1e9, "num_visual": num_visual, "num_text": num_text}
