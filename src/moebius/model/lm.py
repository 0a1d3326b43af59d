"""The language model: embedding, a pattern of blocks, head, and the ends a recipe adds.

`forward` gives hidden states, `loss` the training loss, `logits` what a user wants. State,
precision and recompute are arguments; nothing is written to the model. Letters: B T tokens, D
width, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from moebius.model.block import Block, BlockConfig, BlockOutput, States
from moebius.model.context import Context
from moebius.model.ends import End, EndConfig
from moebius.model.ends.head import Embedding, Head
from moebius.model.ffn import RouteStats
from moebius.model.ffn.routers import Router
from moebius.model.lending import units_of
from moebius.model.mixers import Mixer
from moebius.model.part import Site
from moebius.model.recompute import recomputed
from moebius.monitor.tap import scope, tap


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Width, pattern of layers (plain data: `3 * (local,) + (full,)`), ends."""

    width: int
    layers: tuple[BlockConfig, ...]
    ends: tuple[EndConfig, ...] = ()
    tied: bool = False
    # What looked-up token vectors are multiplied by; None: sqrt(width) if tied, else 1.
    embedding_scale: float | None = None
    norm_eps: float = 1e-5

    def build(self, vocab: int) -> "LM":
        """The model over a vocabulary, its weights not yet initialised."""
        return LM(self, vocab)


@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward gives: hidden states before the final norm, and what routers did."""

    hidden_BTD: Tensor
    states: tuple[States, ...] | None
    # By layer; empty for layers without a router.
    stats: tuple[tuple[RouteStats, ...], ...]


@dataclasses.dataclass(frozen=True)
class Loss:
    """Cross-entropy summed over valid tokens (nats), sums of the ends, and what routers did."""

    total: Tensor
    sums: dict[str, Tensor]
    stats: tuple[tuple[RouteStats, ...], ...]


class LM(nn.Module):
    """A decoder-only language model."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        super().__init__()
        if not config.layers:
            raise ValueError("model.layers is empty; a model needs at least one layer")
        self.config, self.vocab = config, vocab
        num_writes = sum(layer.num_writes for layer in config.layers)
        site = partial(Site, config.width, num_writes, eps=config.norm_eps)
        self.embed = Embedding(vocab, config.width, config.tied, config.embedding_scale)
        self.layers = nn.ModuleList(
            layer.build(site(layer=i)) for i, layer in enumerate(config.layers)
        )
        self._units = units_of(self.blocks())
        self.ends = nn.ModuleList(end.build(site(layer=len(self.layers))) for end in config.ends)
        for i, end in enumerate(self.ends):
            if any(isinstance(part, Mixer) and part.borrows for part in end.modules()):
                raise ValueError(
                    f"ends.{i} borrows from a layer; only layers can: let it not borrow"
                )
        tied_to = self.embed.w_VD if config.tied else None
        self.head = Head(vocab, config.width, config.norm_eps, tied_to)

    def check_trainable(self) -> None:
        """ValueError where a part of the model could run, but would never learn."""
        for module in self.modules():
            if isinstance(module, Router):
                module.check_trainable()

    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def added(self) -> list[End]:
        """The ends that the recipe adds, typed."""
        return [end for end in self.ends if isinstance(end, End)]

    def units(self) -> tuple[range, ...]:
        """Runs of layers that nothing lent leaves: recompute, compile and stages cut between."""
        return self._units

    def forward(
        self,
        tokens_BT: Tensor,
        ctx: Context,
        states: tuple[States, ...] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
    ) -> Output:
        """Hidden states of tokens, computed in `dtype`; with states, tokens continue them."""
        x_BTD = self.embed(tokens_BT, dtype)
        return self.through(self._units, x_BTD, ctx, states, recompute)

    def through(
        self,
        units: tuple[range, ...],
        x_BTD: Tensor,
        ctx: Context,
        states: tuple[States, ...] | None = None,
        recompute: bool = False,
    ) -> Output:
        """What the layers of some units make of hidden states (states are those of all layers)."""
        new_states: list[States] = []
        stats: list[tuple[RouteStats, ...]] = []
        through = (
            recomputed(self._through) if recompute and torch.is_grad_enabled() else self._through
        )
        for unit in units:
            unit_states = None if states is None else states[unit.start : unit.stop]
            x_BTD, more_states, more_stats = through(unit, x_BTD, ctx, unit_states)
            new_states += more_states
            stats += more_stats
        return Output(x_BTD, None if states is None else tuple(new_states), tuple(stats))

    def _through(
        self, unit: range, x_BTD: Tensor, ctx: Context, states: tuple[States, ...] | None
    ) -> tuple[Tensor, list[States], list[tuple[RouteStats, ...]]]:
        """The layers of a unit, one after the other; what they lend each other ends with it."""
        lent: dict[str, Tensor] = {}
        new_states: list[States] = []
        stats: list[tuple[RouteStats, ...]] = []
        for i in unit:
            with scope(f"layers/{i}"):
                block_states = None if states is None else states[i - unit.start]
                out: BlockOutput = self.layers[i](x_BTD, ctx, block_states, lent)
                x_BTD = out.x_BTD
                tap("hidden", x_BTD)
            lent = {**lent, **out.lent}
            stats.append(out.stats)
            if out.states is not None:
                new_states.append(out.states)
        return x_BTD, new_states, stats

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits_BTV of hidden states."""
        return self.head.logits(hidden_BTD)

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        ctx: Context,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        with_ends: bool = True,
    ) -> Loss:
        """The loss of tokens; ends inject theirs on the way (unless evaluation leaves them out)."""
        out = self.forward(tokens_BT, ctx, dtype=dtype, recompute=recompute)
        ends = self.added() if with_ends else ()
        total, sums = closed(ends, out.hidden_BTD, targets_BT, ctx, self.embed, self.head)
        return Loss(total, sums, out.stats)

    def init_states(
        self, batch: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[States, ...]:
        """The decode states of `batch` empty sequences, by layer."""
        return tuple(
            tuple(mixer.init_state(batch, dtype, device) for mixer in block.mixers())
            for block in self.blocks()
        )


def closed(
    ends: Iterable[End],
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    ctx: Context,
    embed: Embedding,
    head: Head,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-entropy of the last hidden states (`Loss.total`), and the sums of the ends."""
    sums: dict[str, Tensor] = {}
    for end in ends:
        hidden_BTD, more = end(hidden_BTD, targets_BT, ctx, embed, head)
        sums.update(more)
    return head.loss(hidden_BTD, targets_BT, ctx.valid_BT), sums
