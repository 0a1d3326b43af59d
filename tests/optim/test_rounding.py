"""bf16 rounding: stochastic without bias and between neighbours, split with 16 bits kept."""

import torch

from moebius.optim.rounding import split, stochastic


def test_stochastic_rounding_is_unbiased_between_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator).repeat(4000, 1)
    rounded = stochastic(x, "a").float()
    unit = x.abs() * 2.0**-7
    assert ((rounded - x).abs() <= unit).all()
    assert all(len(column.unique()) == 2 for column in rounded.T)
    # The mean of 4000 draws of deviation at most unit / 2.
    assert ((rounded.mean(0) - x[0]).abs() < 5 * unit[0] / 2 / 4000**0.5).all()


def test_what_bf16_holds_stays_and_the_key_decides() -> None:
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), 2.0**-120])
    assert torch.equal(stochastic(exact, "a").float(), exact)
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stochastic(x, "a"), stochastic(x, "a"))
    assert not torch.equal(stochastic(x, "a"), stochastic(x, "b"))
    assert stochastic(x[:0], "a").shape == (0,)
    assert torch.equal(
        stochastic(x.view(7, 143).t(), "a").t().isfinite(), torch.ones(7, 143).bool()
    )


def test_split_keeps_sixteen_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    high, lost = split(x)
    assert ((high.float() + lost.float() - x).abs() <= x.abs() * 2.0**-16).all()
    assert (high.float() != x).any()
