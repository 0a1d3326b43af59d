"""Keeping fp32 numbers in bf16: to the nearest, stochastically, or with what was lost beside them.

A moving average that changes by less than half a unit in the last place (1/256 in bf16) stands
still when rounded to the nearest: all do from beta = 0.996 on. Stochastic rounding moves it with
the right probability; Kahan's compensation keeps the remainder in a second bf16 number.
"""

import hashlib

import torch
from torch import Tensor


def stochastic(x: Tensor, key: str) -> Tensor:
    """x (fp32) in bf16, up with the probability of its remainder; always alike for one `key`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(x.device).manual_seed(seed)
    # One draw of 64 bits serves four elements.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    noise = draws.view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32).bitwise_and_(0xFFFF)
    noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    return noise.view(torch.float32).bfloat16()


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (fp32) as the sum of two bf16 numbers, exact to 16 bits: its nearest and what is lost."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()
