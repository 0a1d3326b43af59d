"""Where metrics go: JSON lines always; TensorBoard and Weights & Biases where a recipe asks.

A sink takes one mapping a logged step. The two trackers are optional packages, imported when a sink
is opened; nested metrics reach them under paths such as `layers/0/load_cv`.
"""

import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from moebius.config import Variant

_INSTALL = "is not installed; run: pip install 'moebius[track]'"


class Sink(ABC):
    """Receives one line of metrics a logged step."""

    @abstractmethod
    def write(self, line: Mapping[str, Any]) -> None:
        """Take one line; it has a `step`."""

    @abstractmethod
    def close(self) -> None:
        """Flush and let go; nothing may be written afterwards."""


@dataclass(frozen=True)
class SinkConfig(Variant, ABC):
    """The seam of the optional sinks: a recipe holds `sinks: tuple[SinkConfig, ...]`."""

    TABLE: ClassVar[Mapping[str, str]] = {
        "tensorboard": "moebius.monitor.sinks:TensorBoardConfig",
        "wandb": "moebius.monitor.sinks:WandBConfig",
    }
    SEAM: ClassVar[str] = "sink"
    # The optional package it writes with, if any.
    PACKAGE: ClassVar[str | None] = None

    def check(self) -> None:
        """ValueError where the sink's package is not installed; asked before a run begins."""
        if self.PACKAGE is not None and importlib.util.find_spec(self.PACKAGE) is None:
            raise ValueError(f"{self.PACKAGE} {_INSTALL}")

    @abstractmethod
    def build(self, folder: Path, name: str) -> Sink:
        """Open the sink for the run `name`, kept in the run folder `folder`."""


@final
class JsonLines(Sink):
    """One JSON object a line, flushed at once; what is not finite is written as null.

    A torn last line, left by a killed run, is cut off first: appending to it would damage two.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(finite(line), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@final
class Unheard(Sink):
    """Drops what it gets; for processes that another one speaks for."""

    def write(self, line: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


@final
class TensorBoard(Sink):
    """Scalars for TensorBoard, under `folder`."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"tensorboard {_INSTALL}") from error
        self._writer: Any = Writer(str(folder))

    def write(self, line: Mapping[str, Any]) -> None:
        for tag, value in scalars(line).items():
            self._writer.add_scalar(tag, value, step=int(line["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@final
class WandB(Sink):
    """Scalars for Weights & Biases; the account and the mode are those the user set up for it."""

    def __init__(self, project: str, name: str, folder: Path | None = None) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"wandb {_INSTALL}") from error
        self._run: Any = wandb.init(project=project, name=name, dir=folder)

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(scalars(line), step=int(line["step"]))

    def close(self) -> None:
        self._run.finish()


@final
@dataclass(frozen=True)
class TensorBoardConfig(SinkConfig):
    """TensorBoard event files in `tensorboard/` of the run folder."""

    PACKAGE: ClassVar[str | None] = "tensorboard"

    def build(self, folder: Path, name: str) -> Sink:
        return TensorBoard(folder / "tensorboard")


@final
@dataclass(frozen=True)
class WandBConfig(SinkConfig):
    """A run in a Weights & Biases project, named like the run folder."""

    PACKAGE: ClassVar[str | None] = "wandb"

    project: str = "moebius"

    def build(self, folder: Path, name: str) -> Sink:
        return WandB(self.project, name, folder)


def scalars(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested line as `path/to/value -> value`; `step` itself left out."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{path}/")
        elif isinstance(value, list | tuple):
            flat |= scalars({str(i): item for i, item in enumerate(value)}, f"{path}/")
        elif isinstance(value, int | float) and math.isfinite(value) and path != "step":
            flat[path] = float(value)
    return flat


def finite(value: Any) -> Any:
    """JSON data in which every number that is not finite has become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
