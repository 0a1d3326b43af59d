"""The laboratory: growth of runs, and the experiment on it."""
