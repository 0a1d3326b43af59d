"""What the runs of published size share: AdamW as published, and data that nobody published.

None of these models came with its corpus, so `data.path` is a public stand-in: choose your own.
What a source leaves open is filled in with Llama 3's or DeepSeek-V3's value, and said so there.
"""

from moebius.data.config import DataConfig
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.rules.adamw import AdamW
from moebius.optim.schedules import Schedule

STAND_IN = DataConfig(path="hf:HuggingFaceFW/fineweb")


def adamw(
    lr: float, schedule: Schedule, *, eps: float = 1e-8, expert_lr: float = 1.0
) -> OptimConfig:
    """AdamW (0.9, 0.95) for every weight, weight decay 0.1, clipping at 1."""
    rule = AdamW(beta1=0.9, beta2=0.95, eps=eps)
    roles = default_roles(rule, rule, expert_lr=expert_lr)
    return OptimConfig(lr=lr, weight_decay=0.1, clip=1.0, schedule=schedule, roles=roles)
