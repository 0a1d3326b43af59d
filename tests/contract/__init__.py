"""Contract tests: every entry of every lazy table keeps to what its seam promises."""

import pytest

# So that the checks, which are not test files, report the values of a failed assertion.
pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in ("common", "flow", "decode")))
pytest.register_assert_rewrite(f"{__name__}.parts")
