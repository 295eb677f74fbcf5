"""The report of a run: one self-contained HTML page and the picture of accuracy against cost."""
