"""Meshes of ranks, and the plans that spread a model over them; it knows no model class."""
