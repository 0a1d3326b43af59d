"""The default choice of a rule for each role: Muon for matrices and experts, AdamW for the rest.

As in Moonlight and nanochat: Muon's orthogonal updates suit hidden matrices; embeddings, head,
router, norms and biases stay with AdamW. What is not a matrix, and the embedding, does not decay.
"""

from moebius.optim.optimizer import Role
from moebius.optim.rules import Rule
from moebius.optim.rules.adamw import AdamW
from moebius.optim.rules.muon import Muon


def default_roles(
    matrix: Rule | None = None, other: Rule | None = None, *, expert_lr: float = 1.0
) -> dict[str, Role]:
    """A rule for every role. `matrix` (Muon) moves matrices and experts, `other` (AdamW) the rest.

    The embedding, norms, biases and scalars have no weight decay; `expert_lr` multiplies the
    learning rate of the routed experts (Hunyuan-Large uses 0.31).
    """
    matrix, other = matrix or Muon(), other or AdamW()
    return {
        "embedding": Role(other, weight_decay=0.0),
        "head": Role(other),
        "matrix": Role(matrix),
        "expert": Role(matrix, lr=expert_lr),
        "router": Role(other),
        "norm": Role(other, weight_decay=0.0),
        "bias": Role(other, weight_decay=0.0),
        "scalar": Role(other, weight_decay=0.0),
    }
