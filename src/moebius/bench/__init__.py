"""Benchmarks: interleaved, medians, beside the matmul ceiling; no ratio unless outputs agree."""
