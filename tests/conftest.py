"""What all tests share: a CPU that behaves the same everywhere, and a hypothesis profile without time limits."""

from __future__ import annotations

import os

# Before anything imports JAX. Several devices are simulated only where a test asks for them, in a process of its own.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from hypothesis import settings

# Shared machines stall now and then: a deadline would fail a test over its neighbours.
settings.register_profile("visor", deadline=None, print_blob=True)
settings.load_profile("visor")
