"""Evaluation: scoring under budgets, summaries with costs, metrics, the runner behind `visor evaluate`."""
