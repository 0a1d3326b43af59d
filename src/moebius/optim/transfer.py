"""Learning rates carried over from a narrow model to a wide one (LongCat-Flash 3.1.1, Table 1).

"Adam LR Full Align" of Everett et al. 2024 (arXiv 2407.05872) in the standard parameterisation:
with s = width / width tuned at, hidden matrices and the head take rate / s^e, all else the rate as
it is. The other half of the rule, variances / s for the same weights, holds already: matrices are
initialised with variance 1/fan_in.
"""

import dataclasses

from moebius.optim.optimizer import OptimConfig

# Weights that multiply a vector as wide as the model. LongCat's released training code gives norms
# and biases, of which its table is silent, the embedding's constant rate.
MATRICES = ("matrix", "expert", "router", "head")


def transferred(config: OptimConfig, width: int) -> OptimConfig:
    """The rates of a model of `width`; unchanged without `transfer_from_width`.

    e is the exponent of the role's rule: 1 for Adam and all whose updates' elements do not depend
    on width, 1/2 for Muon with match_rms, 0 for its other scales. The product of rate and weight
    decay is kept, so that a weight's memory of 1 / (lr * wd) steps is the same at every width (Wang
    and Aitchison 2024, arXiv 2405.13698; the paper is silent): decays are multiplied by s^e.
    """
    if config.transfer_from_width is None:
        return config
    scale = width / config.transfer_from_width
    roles = dict(config.roles)
    for name in MATRICES:
        if name in roles:
            role = roles[name]
            factor = scale ** role.rule.width_exponent()
            roles[name] = dataclasses.replace(
                role, lr=role.lr / factor, weight_decay=role.weight_decay * factor
            )
    return dataclasses.replace(config, roles=roles, transfer_from_width=None)
