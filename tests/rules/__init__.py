"""The rules of the house as tests: import order, size, tables, prose, docs."""
