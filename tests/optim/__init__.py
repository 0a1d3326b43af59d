"""Tests of moebius.optim."""
