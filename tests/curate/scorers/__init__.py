"""Tests of the scorers of curation."""
