"""What a family cannot hold, gathered so that a user sees the whole list in one line."""

from collections.abc import Iterable
from typing import Any, TypeVar, final

from moebius.config import Variant, spec_of
from moebius.model.block import BlockConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.lm import ModelConfig

V = TypeVar("V", bound=Variant)
B = TypeVar("B", bound=BlockConfig)


class Unfit(ValueError):
    """A family cannot hold a model."""


@final
class Refusals:
    """Reasons by place: `refusals.unless(bias, "layers.0.mixer.bias", "...")`, then `check()`."""

    def __init__(self, family: str) -> None:
        self._family = family
        self._reasons: list[str] = []

    def unless(self, fits: bool, where: str, why: str) -> bool:
        """Note a reason where something does not fit; whether it does."""
        if not fits:
            self._reasons.append(f"{where}: {why}")
        return fits

    def kind(self, value: Any, kind: type[V], where: str) -> V | None:
        """The value as the one class a family has here; None, noted, where it is another."""
        if isinstance(value, kind):
            return value
        has = spec_of(type(value), value.TABLE) if isinstance(value, Variant) else repr(value)
        self._reasons.append(f"{where} is {has}; it has only {spec_of(kind, kind.TABLE)} here")
        return None

    def one(self, values: Iterable[V], where: str) -> V | None:
        """The first of equal values (of one value a layer); None, noted, where they differ."""
        values = tuple(values)
        same = all(value == values[0] for value in values)
        self.unless(same, where, "all must be alike")
        return values[0] if same and values else None

    def ends(self, model: ModelConfig) -> None:
        """Refuse ends but those that only train: their loss has no weights and moves no logit."""
        for i, end in enumerate(model.ends):
            self.unless(
                isinstance(end, HiddenZ),
                f"ends.{i}",
                f"{spec_of(type(end), end.TABLE)} has no place in it",
            )

    def layers(self, model: ModelConfig, kind: type[B]) -> B | None:
        """The one block config that all layers share."""
        layer: BlockConfig | None = self.one(model.layers, "layers")
        return None if layer is None else self.kind(layer, kind, "layers.*")

    def prenorms(self, model: ModelConfig) -> list[PreNorm]:
        """The layers, all pre-norm."""
        self.only(model.layers, "layers.*", PreNorm)
        return [layer for layer in model.layers if isinstance(layer, PreNorm)]

    def only(self, values: Iterable[Variant], where: str, *allowed: type[Variant]) -> None:
        """Refuse values of any other class."""
        odd = next((value for value in values if not isinstance(value, allowed)), None)
        if odd is not None:
            has = " or ".join(spec_of(kind, kind.TABLE) for kind in allowed)
            self.unless(False, where, f"{spec_of(type(odd), odd.TABLE)} where it has only {has}")

    def the(self, values: Iterable[Variant], where: str, kind: type[V]) -> V | None:
        """The value of a class; None if there is none, or (noted) if they differ."""
        found = [value for value in values if isinstance(value, kind)]
        return self.one(found, f"{where} ({spec_of(kind, kind.TABLE)})") if found else None

    def check(self) -> None:
        """Unfit with all reasons, if there are any."""
        if self._reasons:
            raise Unfit(f"{self._family} cannot hold this model: {'; '.join(self._reasons)}")
