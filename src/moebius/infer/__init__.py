"""Using a trained model: loading a run, decoding with each mixer's own state, sampling."""
