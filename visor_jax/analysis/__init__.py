"""What each layer of a dense model does with the picture, and what a run's budgets cost and answer.

One file per analysis; `api.py` lists them, `base.py` is their interface, `write.py` runs them (docs/analyze.md).
"""
