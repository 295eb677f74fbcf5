"""What turns a trained model into an adaptive one: the search for viable budgets, and the labels of the policy."""
