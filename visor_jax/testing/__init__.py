"""A small model, small batches and a tokenizer, for tests of this package and of its users.

    from visor_jax import testing

    arch = testing.tiny_architecture(num_layers=7)  # two super-blocks and one more layer
    params = testing.random_params(arch)  # every parameter affects the result, unlike after initialization
    batch = testing.random_batch(arch)  # packed rows, padding, pictures in the middle of text
    logits = visor_jax.model.visor.logits(params, batch.arrays, [True, False], arch)

    config = testing.tiny_config()  # runs all stages in seconds

These are pure functions of their arguments and take well under a second on a CPU. To test your own configuration,
build its `Architecture` with `visor_jax.config.architecture(config)` and pass it to the same functions.
"""

from visor_jax.testing.config import tiny_config
from visor_jax.testing.data import (
    IMAGE_TOKEN,
    almanac_source,
    almanac_tokenizer,
    decoder_inputs,
    questions_of,
    random_batch,
    random_example,
    random_picture,
    random_prompts,
    row_shape_of,
)
from visor_jax.testing.models import fresh_params, other_plan, quick_jit, random_params, tiny_architecture

__all__ = [
    "IMAGE_TOKEN",
    "almanac_source",
    "almanac_tokenizer",
    "decoder_inputs",
    "fresh_params",
    "other_plan",
    "questions_of",
    "quick_jit",
    "random_batch",
    "random_example",
    "random_params",
    "random_picture",
    "random_prompts",
    "row_shape_of",
    "tiny_architecture",
    "tiny_config",
]
