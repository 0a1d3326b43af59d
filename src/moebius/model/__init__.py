"""The decoder: four seams (mixers, ffn, block, ends), one context, weights that carry their role.

Nothing here knows about optimizers, distribution, precision recipes or checkpoints.
"""
