"""RMSNorm over a dim of which each rank has an equal part."""

import torch
from torch import Tensor

from moebius.ops.ranks import Group, added, size_of


def rms_norm_spread(x: Tensor, w_D: Tensor, eps: float, group: Group) -> Tensor:
    """See `moebius.ops.norm.rms_norm`; x and w_D are this rank's part."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = added(wide.square().sum(-1, keepdim=True), group) / (x.shape[-1] * size_of(group))
    return (wide * (square + eps).rsqrt()).to(x.dtype) * w_D.to(x.dtype)
