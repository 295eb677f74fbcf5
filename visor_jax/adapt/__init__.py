"""Makes a trained model adaptive: searches for viable budgets and labels questions for the policy."""
