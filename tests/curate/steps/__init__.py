"""Tests of the steps of curation."""
