"""Tests of moebius.bench."""
