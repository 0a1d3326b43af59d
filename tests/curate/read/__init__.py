"""The readers, over whole and hostile input."""
