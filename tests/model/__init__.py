"""The model against explicit formulas."""
