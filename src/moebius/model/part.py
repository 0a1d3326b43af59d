"""What every part of a model is told at birth: the dims it shares with its neighbours."""

import dataclasses

from torch import Tensor, nn

from moebius.model.weight import Weight
from moebius.ops.norm import rms_norm


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a part stands: model width D, number of residual writes, layer index, norm epsilon."""

    width: int
    # How many sub-layers write to the residual stream; their outputs start at 1/sqrt of it.
    num_writes: int
    layer: int
    eps: float

    def into(self, fan_in: int) -> float:
        """Standard deviation that keeps variance through a matrix of `fan_in` inputs."""
        if fan_in < 1:
            raise ValueError(f"a matrix of {fan_in} inputs; every width must be at least 1")
        return fan_in**-0.5

    def back(self, fan_in: int) -> float:
        """The same for a matrix that writes to the residual stream."""
        return self.into(fan_in * self.num_writes)


class Norm(nn.Module):
    """RMSNorm with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.w_D = Weight((width,), "norm", constant=1.0)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.w_D, self.eps)
