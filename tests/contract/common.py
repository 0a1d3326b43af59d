"""What holds for a part of any seam, as checks on its config; and the inputs that checks share.

A check returns nothing and raises AssertionError with what is wrong.
"""

import json
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from moebius.config import Variant, fields, from_json, to_json
from moebius.model.context import Context
from moebius.model.weight import Role, initialise, named_weights

from .cases import WIDTH, build


def fresh(config: Any, seed: int = 0) -> Any:
    """The initialised module of a config, in evaluation mode."""
    module = build(config)
    initialise(module, seed)
    return module.eval()


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def context(*rows: tuple[int, ...], padded: int = 0) -> Context:
    """Packed sequences, each given by the lengths of its documents; the last tokens are padding."""
    position = [[i for length in row for i in range(length)] for row in rows]
    document = [[d for d, length in enumerate(row) for _ in range(length)] for row in rows]
    valid_BT = torch.ones(len(rows), sum(rows[0]), dtype=torch.bool)
    valid_BT[:, sum(rows[0]) - padded :] = False
    return Context.packed(
        torch.tensor(position),
        torch.tensor(document),
        valid_BT,
        torch.arange(len(rows)),
        int(valid_BT.sum()),
        0,
    )


def hidden(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """x_BTD of noise."""
    return noise(batch, length, WIDTH, dtype=dtype)


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Assert equality up to rounding, relative to the largest value."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    error = float((got - want).abs().max()) if got.numel() else 0.0
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} (values up to {scale:.3g})"


def same_attributes(before: dict[str, Any], module: nn.Module, what: str) -> None:
    """Assert that no attribute of a module tree was set, replaced or removed."""
    after = attributes(module)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not changed, f"{what} wrote the attributes {', '.join(sorted(changed))}"


def attributes(module: nn.Module) -> dict[str, Any]:
    """Every attribute of a module tree by its name: which object it is, and its bits."""
    return {
        f"{prefix}.{name}".lstrip("."): (id(value), _bits(value))
        for prefix, part in module.named_modules()
        for name, value in _leaves(part)
    }


def _leaves(part: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(part).items():
        nested = isinstance(value, dict) and name in ("_parameters", "_buffers")
        yield from value.items() if nested else [(name, value)]


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().flatten().view(torch.uint8).numpy().tobytes()
    return repr(value) if isinstance(value, list | dict | set | tuple) else None


# --- checks ---------------------------------------------------------------------------------------


def check_initialised(config: Any) -> None:
    """Weights are NaN at birth, carry a role, and are all finite after `initialise`."""
    module = build(config)
    try:
        weights = dict(named_weights(module))
    except ValueError as error:
        raise AssertionError(str(error)) from error
    for name, weight in weights.items():
        assert weight.isnan().all(), f"{name} is not NaN at birth; leave filling to `initialise`"
        assert weight.role in get_args(Role), f"{name} has the unknown role {weight.role!r}"
    initialise(module, 0)
    tensors = {**weights, **dict(module.named_buffers())}
    left = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    assert not left, f"not initialised: {', '.join(left)}"
    first = [weight.detach().clone() for weight in weights.values()]
    initialise(module, 0)
    for (name, weight), old in zip(weights.items(), first, strict=True):
        assert torch.equal(weight, old), f"{name} is another after a second `initialise`"


def check_meta(config: Any) -> None:
    """Building on the meta device counts the same weights and takes no memory."""
    real = {name: (w.shape, w.role) for name, w in named_weights(build(config))}
    with torch.device("meta"):
        module = build(config)
    assert {name: (w.shape, w.role) for name, w in named_weights(module)} == real
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    off = [name for name, tensor in tensors.items() if tensor.device.type != "meta"]
    assert not off, f"not on the meta device: {', '.join(off)}"


def check_json(config: Any) -> None:
    """The config through JSON and back is equal."""
    seam = _seam(config)
    assert from_json(seam, json.loads(json.dumps(to_json(config)))) == config


def check_unknown_key(config: Any) -> None:
    """A misspelt field is an error of one line that names the nearest one."""
    names = [field.name for field in fields(type(config))] or ["none"]
    data = {**to_json(config), f"{names[0]}x": 1}
    try:
        from_json(_seam(config), data)
    except ValueError as error:
        assert f"{names[0]}x" in str(error) and "\n" not in str(error), str(error)
        meant = f"did you mean {names[0]!r}" in str(error)
        assert meant or not fields(type(config)), f"no hint at {names[0]!r}: {error}"
        return
    raise AssertionError(f"the unknown field {names[0]}x was accepted")


def _seam(config: Variant) -> type[Variant]:
    """The base class of the config's seam: the one that declares the table."""
    return next(base for base in type(config).__mro__ if "TABLE" in vars(base))


COMMON_CHECKS = (check_initialised, check_meta, check_json, check_unknown_key)
