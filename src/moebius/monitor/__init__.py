"""Watching a run: taps and meters inside the model, alarms, sinks, the display and the report."""
