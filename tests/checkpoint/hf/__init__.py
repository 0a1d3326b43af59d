"""Import and export of HF folders; a package, so that the families share `parity`."""
