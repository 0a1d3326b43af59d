"""Tests of moebius.eval."""
