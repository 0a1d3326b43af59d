"""Pure tensor functions: no modules, no configs, no process groups.

An op that has a fast path is a folder: `naive.py` (at most 50 lines, the truth in any precision),
the fast ones, and the choice between them in `__init__.py`. Tests hold values and gradients
together.
"""
