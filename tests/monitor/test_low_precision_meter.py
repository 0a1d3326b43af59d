"""The meter's summary of what low-precision formats lost, and who is observed when."""

import torch

from moebius.monitor.meters import Meter
from moebius.monitor.tap import observed, observing, silence


def test_shares_are_means_over_micro_batches_and_weights() -> None:
    meter = Meter()
    for place, share in (("a.w", 0.25), ("a.w", 0.75), ("b.w", 0.0)):
        meter.see(f"{place}/underflow/x", torch.tensor(share))
    meter.see("b.w/outliers/dy", torch.tensor(0.125))
    meter.see("layers/0/hidden", torch.ones(2))
    meter.see("layers/0/other", torch.ones(2))
    assert meter.rounding() == {
        "outliers/dy": {"mean": 0.125, "max": 0.125, "at": "b.w"},
        "underflow/x": {"mean": 0.25, "max": 0.5, "at": "a.w"},
    }
    assert meter.hidden_rms(1) == [1.0]


def test_nothing_was_rounded() -> None:
    assert Meter().rounding() == {}


def test_observed_is_who_watches_now() -> None:
    assert observed() is None
    meter = Meter()
    with observing(meter):
        assert observed() is meter
        with silence():
            assert observed() is None
    assert observed() is None
