"""The laboratory: experiments on whole runs, and what changes a run into another.

`grow` stacks or upcycles a run; `growth` measures whether stacking pays.
"""
