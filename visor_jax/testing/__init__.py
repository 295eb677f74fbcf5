"""A small model, small batches and a tokenizer, for tests: yours and ours.

    from visor_jax import testing

    arch = testing.tiny_architecture(num_layers=7)  # two super-blocks and one layer more
    params = testing.random_params(arch)  # every parameter matters, unlike a fresh initialization
    batch = testing.random_batch(arch)  # packed rows, padding, pictures in the middle of text
    logits = visor_jax.model.visor.logits(params, batch.arrays, [True, False], arch)

    config = testing.tiny_config()  # a run of all stages in seconds

All of it is a pure function of its arguments and runs in well under a second on a CPU. To try a configuration of your
own, build its `Architecture` with `visor_jax.config.architecture(config)` and use the same functions on it.
"""

from visor_jax.testing.config import tiny_config
from visor_jax.testing.data import (
    IMAGE_TOKEN,
    decoder_inputs,
    glyphs_tokenizer,
    questions_of,
    random_batch,
    random_example,
    random_picture,
    random_prompts,
    window_of,
)
from visor_jax.testing.models import fresh_params, other_plan, quick_jit, random_params, tiny_architecture

__all__ = [
    "IMAGE_TOKEN",
    "decoder_inputs",
    "fresh_params",
    "glyphs_tokenizer",
    "other_plan",
    "questions_of",
    "quick_jit",
    "random_batch",
    "random_example",
    "random_params",
    "random_picture",
    "random_prompts",
    "tiny_architecture",
    "tiny_config",
    "window_of",
]
