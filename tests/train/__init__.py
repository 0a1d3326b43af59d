"""Tests of moebius.train."""
