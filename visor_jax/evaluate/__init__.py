"""Evaluation: scores under budgets, summaries with costs, benchmark metrics, and the runner of `visor evaluate`."""
