"""Recipes: the dial, published sizes against other code, small kin that keep the structure."""
