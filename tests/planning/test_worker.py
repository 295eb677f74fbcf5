"""What the compiling process reads from the compiler's messages."""

from __future__ import annotations

import pytest

from visor_jax.planning.worker import out_of_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.50G of"
            " 15.75G hbm. Exceeded hbm capacity by 8.75G.",
            (24.5, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (150.68G)"
            " exceeds available HBM (95.74G).",
            (150.68, 95.74),
        ),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_bytes_of_a_program_that_does_not_fit(message: str, sizes: tuple[float, float] | None) -> None:
    found = out_of_memory(message)
    assert found == (sizes and tuple(round(size * GIB) for size in sizes))
