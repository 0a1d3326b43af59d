"""Tests of moebius.infer."""
