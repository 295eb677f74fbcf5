"""The JAX model and the exported module agree on random weights: logits under every budget, and routes."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from visor_jax import testing
from visor_jax.budget import all_subsets
from visor_jax.data.collate import RowShape, encode_tokens, make_prompt_batch
from visor_jax.export.torch_export import visor_tensors
from visor_jax.export.torch_model import VisorConfig, VisorForConditionalGeneration, VisorProcessor
from visor_jax.hf.config import write_config
from visor_jax.model import incremental as caches
from visor_jax.model import visor

TINY = testing.tiny_architecture()
VARIANTS = {
    "grouped queries, one extra layer": TINY,
    "tied, no grids, two extra layers": testing.tiny_architecture(
        8,
        text=dataclasses.replace(TINY.text, num_layers=8, tie_word_embeddings=True),
        anyres=dataclasses.replace(TINY.anyres, pinpoints=()),
    ),
    "bidirectional, multi-head cross-attention, no extra layer": testing.tiny_architecture(
        6,
        bidirectional_vision=True,
        cross=dataclasses.replace(TINY.cross, num_kv_heads=4),
        anyres=dataclasses.replace(TINY.anyres, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)),
    ),
    "another pattern, standardized pictures": testing.other_plan(
        anyres=dataclasses.replace(TINY.anyres, standardize=True)
    ),
    "dense": testing.tiny_architecture(7, plan="dense"),
}
PICTURES = [
    [(11, 16)],
    [(8, 8), (3, 20)],
    [],
    [(16, 16)],
]  # sizes of each prompt's pictures; the last one's tokens are shrunk


def tokens_of(row: int, pictures) -> list[int]:
    """Returns random token ids with one placeholder per picture."""
    rng = np.random.default_rng(row)
    ids = rng.integers(2, TINY.text.vocab_size, 3 + row).tolist()
    for _ in pictures:
        ids += [testing.IMAGE_TOKEN, *rng.integers(2, TINY.text.vocab_size, 2).tolist()]
    return ids


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def case(request):
    """The same four prompts in both models: architecture, parameters, JAX batch, PyTorch model and its inputs."""
    arch = VARIANTS[request.param]
    params = testing.random_params(arch)
    images = [[testing.random_picture(*size, seed=row) for size in sizes] for row, sizes in enumerate(PICTURES)]
    ids = [tokens_of(row, sizes) for row, sizes in enumerate(PICTURES)]
    prompts = [
        encode_tokens(tokens, pictures, testing.IMAGE_TOKEN, arch) for tokens, pictures in zip(ids, images, strict=True)
    ]
    row_shape = RowShape(*(max(getattr(p.size, name) for p in prompts) + 2 for name in ("tiles", "visual", "text")))
    batch = make_prompt_batch(prompts, row_shape, arch)
    model, inputs = torch_twin(arch, params, ids, images)
    return SimpleNamespace(arch=arch, params=params, arrays=batch.arrays, prompts=prompts, model=model, inputs=inputs)


def torch_twin(arch, params, ids, images):
    """Returns the PyTorch model with these parameters, and its inputs."""
    values = write_config(
        arch,
        image_token_id=testing.IMAGE_TOKEN,
        system=None,
        viable_budgets=all_subsets(arch.num_slots),
        has_policy=True,
        stage="policy",
        dtype="float32",
    )
    config = VisorConfig(**{**values, "plan": arch.plan})
    model = VisorForConditionalGeneration(config)
    weights = {key: torch.from_numpy(get()) for key, (_, get) in visor_tensors(params, arch).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if arch.text.tie_word_embeddings else [])
    model.tie_weights()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(testing.almanac_tokenizer().text))
    statistics = arch.anyres.image_mean, arch.anyres.image_std
    processor = VisorProcessor(config, tokenizer, *statistics, standardize=arch.anyres.standardize)
    return model.eval(), torch_inputs(processor, ids, images)


def torch_inputs(processor, ids, images) -> dict[str, torch.Tensor]:
    """Returns one left-padded batch of prompts."""
    rows, tiles, sizes, counts = [], [], [], []
    for tokens, pictures in zip(ids, images, strict=True):
        lengths = iter(processor.num_visual_tokens(picture.shape[:2], len(pictures)) for picture in pictures)
        rows.append([t for token in tokens for t in [token] * (next(lengths) if token == testing.IMAGE_TOKEN else 1)])
        tiles += processor.tiles([Image.fromarray(picture) for picture in pictures])
        sizes += [picture.shape[:2] for picture in pictures]
        counts += [len(pictures)] if pictures else []
    longest, most = max(map(len, rows)), max(map(len, tiles))
    padded = [np.pad(tile, ((0, most - len(tile)), (0, 0), (0, 0), (0, 0))) for tile in tiles]
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.from_numpy(np.stack(padded)),
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor(counts),
    }


def test_logits_agree_under_every_budget(case):
    program = jax.jit(partial(visor.logits, arch=case.arch))
    subsets = all_subsets(case.arch.num_slots)
    is_text = case.inputs["attention_mask"].bool() & (case.inputs["input_ids"] != testing.IMAGE_TOKEN)
    for turn in range(len(subsets)):
        # Each prompt has a different budget, so one compiled program and one batch cover all of them.
        bits = [subsets[(turn + row) % len(subsets)] for row in range(len(PICTURES))]
        expected = np.asarray(program(case.params, case.arrays, jnp.asarray(bits, bool)))
        budget = {"budget": [list(slots) for slots in bits]} if case.arch.plan == "visor" else {}
        outputs = case.model(**case.inputs, **budget).logits
        for row, prompt in enumerate(case.prompts):
            difference = outputs[row][is_text[row]].numpy() - expected[row, : prompt.size.text]
            assert np.abs(difference).max() <= 1e-5, (bits[row], PICTURES[row])


def test_routes_agree(case):
    if case.arch.plan == "dense":
        with pytest.raises(ValueError, match="no policy"):
            case.model.route(**case.inputs)
        return
    count = len(all_subsets(case.arch.num_slots))

    def scores(params, arrays):
        visual_tokens = visor.encode(params, arrays, case.arch)
        return caches.prefill_prefix(params, visual_tokens, arrays, count, case.arch, routed=True)[1]

    expected = np.asarray(jax.jit(scores)(case.params, case.arrays))[:, :count]
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(case.model(**case.inputs, budget="auto").policy_logits, expected, atol=1e-5)
