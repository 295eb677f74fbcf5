"""Reductions of the visual tokens V(0) before the decoder; `api` applies the one that the architecture names."""
