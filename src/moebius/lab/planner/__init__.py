"""The planner: what a recipe costs on a cluster, in training over all legal layouts, in decoding.

Nothing here runs a model: it is built on meta, and time follows from the one file of constants.
"""
