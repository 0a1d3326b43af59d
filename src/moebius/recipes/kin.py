"""How the small kin of a published architecture are trained, the same way for every family.

`nano` takes quickstart's data for minutes on a CPU, `small` web text for a day on one GPU: Muon for
matrices and experts, AdamW for the rest, a long decay.
"""

import dataclasses

from moebius.data.config import DataConfig
from moebius.model.lm import ModelConfig
from moebius.optim.optimizer import OptimConfig, Role
from moebius.optim.roles import default_roles
from moebius.optim.schedules import Schedule
from moebius.optim.schedules.wsd import WSD
from moebius.train.run import Run

NANO_VOCAB, SMALL_VOCAB = 4096, 32768


def nano(
    name: str,
    model: ModelConfig,
    schedule: Schedule | None = None,
    *,
    expert_lr: float = 1.0,
    head_lr: float = 1.0,
) -> Run:
    """300 steps of 2,048 tokens of this machine's Python library."""
    return Run(
        name=name,
        model=model,
        data=DataConfig(path="python:stdlib"),
        optim=_optim(0.005, 40.0, schedule or WSD(decay="50%"), expert_lr, head_lr),
        steps=300,
        batch=4,
        sequence_length=512,
        vocab=NANO_VOCAB,
    )


def small(
    name: str,
    model: ModelConfig,
    schedule: Schedule | None = None,
    *,
    expert_lr: float = 1.0,
    head_lr: float = 1.0,
) -> Run:
    """10,000 steps of half a million tokens of educational web text: 26 a parameter in use."""
    return Run(
        name=name,
        model=model,
        data=DataConfig(path="hf:HuggingFaceFW/fineweb-edu", max_bytes=25_000_000_000),
        optim=_optim(0.002, 20.0, schedule or WSD(decay="30%"), expert_lr, head_lr),
        steps=10_000,
        batch=256,
        sequence_length=2048,
        vocab=SMALL_VOCAB,
        micro_batch=16,
        checkpoint_every=1000,
        log_every=10,
        measure_every=100,
    )


def roles_of(
    embedding_lr: float, *, router_lr: float = 0.03, expert_lr: float = 1.0, head_lr: float = 1.0
) -> dict[str, Role]:
    """A rule for every role; multiples of the rate for what is looked up and what routes."""
    roles = default_roles(expert_lr=expert_lr)
    # A tied matrix is a head that is looked up as well, and needs more than one that is not.
    roles["head"] = dataclasses.replace(roles["head"], lr=head_lr)
    # Vectors looked up by token see few gradients each; the router must not outrun its controller.
    roles["embedding"] = dataclasses.replace(roles["embedding"], lr=embedding_lr)
    roles["router"] = dataclasses.replace(roles["router"], lr=router_lr)
    return roles


def _optim(
    lr: float, embedding_lr: float, schedule: Schedule, expert_lr: float, head_lr: float
) -> OptimConfig:
    roles = roles_of(embedding_lr, expert_lr=expert_lr, head_lr=head_lr)
    return OptimConfig(lr=lr, weight_decay=0.1, clip=1.0, schedule=schedule, roles=roles)
