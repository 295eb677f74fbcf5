"""A decoder for TFDS that leaves a feature as it is stored, also inside sequences. Importing this imports TFDS."""

from __future__ import annotations

from typing import Any

import tensorflow_datasets as tfds


class Undecoded(tfds.decode.SkipDecoding):
    """Leaves pictures encoded, so that `visor_jax.data.images` checks and decodes them."""

    def decode_batch_example_np(self, serialized_example: Any) -> Any:
        """Returns the stored values of a sequence."""
        return serialized_example

    decode_ragged_example_np = decode_batch_example_np
