"""Judging a model: what it scores, and what scores it must beat.

`baselines` measures how well plain compressors and a byte n-gram do on the same bytes.
"""
