"""One dial, the model width D, gives every width of a published architecture's small kin.

A family writes each number as published, at its published width D0. At D = D0 the dial returns it
as it is; below, it keeps the ratio to D and rounds:

- feed-forward and expert widths: n D / D0, to the nearest multiple of 32;
- latent ranks: n D / D0, up to a multiple of 32;
- a head's width: n / 2 (n / 4 below D = 512), up to a power of two;
- heads: all heads together keep their ratio to D, to the nearest even number of heads; key heads
  keep their ratio to heads, as far as it divides them;
- experts: n / 4 but at least 32 (n / 8 and 16 below D = 512), never more than published;
- experts chosen: as published, half of them below D = 512, at least one.

Depth is no width: each recipe states its layers.
"""

import dataclasses

GRAIN = 32
# Below this width a model is `nano`, a CPU trains it; below the second `small`, a GPU does.
NANO_BELOW, SMALL_BELOW = 512, 2048
NANO, SMALL = 256, 1024


@dataclasses.dataclass(frozen=True)
class Dial:
    """The width D of a model, and the width D0 at which its family's numbers were published."""

    width: int
    published: int

    def __post_init__(self) -> None:
        if self.width != self.published and (self.width < 64 or self.width % 64):
            raise ValueError(f"the dial takes multiples of 64, not {self.width}")
        if self.width != self.published and self.width >= SMALL_BELOW:
            raise ValueError(f"the dial goes below {SMALL_BELOW}; {self.width} is no small kin")

    @property
    def exact(self) -> bool:
        """Whether this is the published model itself."""
        return self.width == self.published

    @property
    def nano(self) -> bool:
        """Whether a CPU is to train it."""
        return self.width < NANO_BELOW

    def ffn(self, n: int) -> int:
        """A hidden width of a feed-forward or an expert."""
        return n if self.exact else max(GRAIN, GRAIN * round(self._scaled(n) / GRAIN))

    def rank(self, n: int) -> int:
        """The width of a latent."""
        return n if self.exact else GRAIN * -int(-self._scaled(n) // GRAIN)

    def head(self, n: int) -> int:
        """The width of one head, or of a part of it."""
        if self.exact:
            return n
        part = n / (4 if self.nano else 2)
        return next(2**power for power in range(n.bit_length() + 1) if 2**power >= part)

    def heads(self, n: int, head: int) -> int:
        """How many heads, of which `n` of width `head` were published."""
        if self.exact:
            return n
        return max(2, 2 * round(self._scaled(n * head) / self.head(head) / 2))

    def kv_heads(self, n: int, of: int, head: int) -> int:
        """How many key heads, of which `n` for `of` heads were published."""
        heads = self.heads(of, head)
        fitting = (count for count in range(1, heads + 1) if heads % count == 0)
        return min(fitting, key=lambda count: abs(count - heads * n / of))

    def experts(self, n: int) -> int:
        """How many experts there are."""
        if self.exact:
            return n
        return min(n, max(16, n // 8) if self.nano else max(32, n // 4))

    def chosen(self, n: int) -> int:
        """How many experts a token gets."""
        return max(1, n // 2) if self.nano else n

    def _scaled(self, n: int) -> float:
        return n * self.width / self.published
