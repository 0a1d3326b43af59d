"""Training: the step, its state, and the loop, written out from top to bottom.

`folder` is the run's place on the disk; what evaluates a model is handed in by the recipe.
"""
