"""The built-in home-command model: its contract, its training data and its training."""
