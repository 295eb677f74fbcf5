"""What each layer of a dense model does with the picture, and what a run's budgets cost and answer."""
