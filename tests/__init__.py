"""The tests, in the shape of the package; `tiny.py` and `running.py` serve several rooms."""
