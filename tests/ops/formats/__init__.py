"""Number formats: bit by bit against exact rational arithmetic, torch's casts, and naive twins."""
