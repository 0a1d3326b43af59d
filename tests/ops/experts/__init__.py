"""The native expert kernel, by itself."""
