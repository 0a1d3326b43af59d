"""Native sparse attention (NSA, arXiv 2502.11089): three views of the past, gated per head.

Compressed: whole blocks of tokens, each as one key and value made by phi. Selected: the tokens of
the few blocks that the compressed view found important, one choice per key head. Window: the last
tokens. Compressed queries and keys carry no rotary positions (phi would mix angles; a block's place
within it is phi's own), those of the other two do; with shared keys the projections are one, the
rotation still is not. Letters: C compressed blocks, I positions of a block, W branches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import SLACK, TokenCache
from moebius.model.mixers.logits import ScaleRows, max_logits, scale_rows
from moebius.model.part import Site
from moebius.model.rope import rotated
from moebius.model.weight import Weight
from moebius.monitor.tap import tap
from moebius.ops.attention import attention
from moebius.ops.linear import linear
from moebius.ops.nsa import choose_blocks, compressed_attention, importance, selected_attention
from moebius.ops.ranks import Cut, Ranks, Spread, added, size_of
from moebius.ops.sequences import sequences

# Keys and values of tokens, each [B, T, G, K].
KeyValue = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class NSA(MixerConfig):
    """Every `stride` tokens a compressed key of `block`; `num_selected` blocks of `selected_block`
    tokens (the first, the previous and the own always among them); the last `window` tokens."""

    heads: int
    kv_heads: int
    head_width: int
    block: int = 32
    stride: int = 16
    selected_block: int = 64
    num_selected: int = 16
    window: int = 512
    rope_base: float | None = 500_000.0
    compression: Literal["mean", "mlp"] = "mlp"
    separate_kv: bool = True  # keys and values of its own for each branch, as in the paper

    def build(self, site: Site) -> Mixer:
        return _NSA(self, site)

    def check(self) -> None:
        """ValueError where numbers do not fit each other."""
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.rope_base is not None and self.head_width % 2:
            raise ValueError(f"head_width ({self.head_width}) must be even for rotary positions")
        if self.stride < 1 or self.window < 1:
            raise ValueError(
                f"stride ({self.stride}) and window ({self.window}) must be at least 1"
            )
        for name, value in (("block", self.block), ("selected_block", self.selected_block)):
            if value < 1 or value % self.stride:
                raise ValueError(f"{name} ({value}) must be a multiple of stride ({self.stride})")
        if self.num_selected < 3:
            raise ValueError(
                f"num_selected ({self.num_selected}) must be at least 3: "
                "the first, the previous and the own block are always chosen"
            )

    def num_blocks(self, num_tokens: int) -> int:
        """Compressed blocks that lie within so many tokens of one document."""
        return max(0, (num_tokens - self.block) // self.stride + 1)


class _Phi(nn.Module):
    """A block of tokens to one vector, for every key head the same: an MLP over the positions of
    the block, each with an embedding of its own."""

    def __init__(self, config: NSA, site: Site) -> None:
        super().__init__()
        width, inputs = config.head_width, config.block * config.head_width
        self.position = Weight((inputs,), "bias")
        self.w_in = Weight((width, inputs), "matrix", std=site.into(inputs))
        self.w_out = Weight((width, width), "matrix", std=site.into(width))

    def forward(self, x_BCIGK: Tensor) -> Tensor:
        x_BCGX = x_BCIGK.transpose(2, 3).flatten(-2) + self.position.to(x_BCIGK.dtype)
        return linear(F.silu(linear(x_BCGX, self.w_in)), self.w_out)


class _Mean(nn.Module):
    """The mean of a block, as in flash-linear-attention; no weights."""

    def forward(self, x_BCIGK: Tensor) -> Tensor:
        return x_BCIGK.mean(2)


@dataclasses.dataclass(frozen=True)
class _State(DecodeState):
    """What each branch needs of the past; with shared keys the window looks into `selected`."""

    selected: TokenCache
    window: TokenCache | None
    unfinished: TokenCache  # tokens before compression, as many as an unfinished block may hold
    compressed: KeyValue  # [B, C, G, K]
    config: NSA

    @property
    def length(self) -> int:
        return self.selected.length

    @property
    def bytes(self) -> int:
        caches = (self.selected, self.unfinished, *(() if self.window is None else (self.window,)))
        blocks = sum(x.numel() * x.element_size() for x in self.compressed)
        return sum(cache.bytes for cache in caches) + blocks

    def snapshot(self) -> Self:
        return self  # nothing is edited in place

    def rollback(self, num_tokens: int) -> Self:
        selected = self.selected.rollback(num_tokens)
        blocks = self.config.num_blocks(selected.length)
        k_BCGK, v_BCGK = self.compressed
        return dataclasses.replace(
            self,
            selected=selected,
            window=None if self.window is None else self.window.rollback(num_tokens),
            unfinished=self.unfinished.rollback(num_tokens),
            compressed=(k_BCGK[:, :blocks], v_BCGK[:, :blocks]),
        )

    def extend(
        self, new: tuple[KeyValue, ...], phi: Callable[[KeyValue, Tensor], KeyValue]
    ) -> Self:
        """The state with new tokens in all branches and the blocks they complete."""
        config, done = self.config, self.config.num_blocks(self.length)
        tokens = self.unfinished.extend(*new[0])
        device = tokens.entries[0].device
        index_C = torch.arange(done, config.num_blocks(tokens.seen), device=device)
        last_C = index_C * config.stride + config.block - 1 - (tokens.seen - tokens.kept)
        batch = tokens.entries[0].shape[0]
        made = phi((tokens.entries[0], tokens.entries[1]), last_C.expand(batch, -1))
        k_BCGK, v_BCGK = (torch.cat(pair, 1) for pair in zip(self.compressed, made, strict=True))
        return dataclasses.replace(
            self,
            selected=self.selected.extend(*new[1]),
            window=None if self.window is None else self.window.extend(*new[2]),
            unfinished=tokens,
            compressed=(k_BCGK, v_BCGK),
        )

    def trim(self) -> Self:
        window = None if self.window is None else self.window.trim()
        return dataclasses.replace(self, window=window, unfinished=self.unfinished.trim())


@dataclasses.dataclass(frozen=True)
class _Past:
    """What the queries of a forward may look at, branch by branch."""

    compressed: KeyValue
    block_BC: Tensor  # the index of a block within its document
    visible_BTC: Tensor
    tokens: KeyValue
    position_BS: Tensor
    attend_BTS: Tensor
    near: KeyValue
    near_BTS: Tensor
    whole: bool  # queries and keys are the same tokens


class _NSA(Mixer, Spread):
    clippable = True

    def __init__(self, config: NSA, site: Site) -> None:
        super().__init__()
        config.check()
        self.config, self.layer, self.ranks = config, site.layer, Ranks()
        self.branches = 3 if config.separate_kv else 1
        query_width = config.heads * config.head_width
        kv_shape = (self.branches * config.kv_heads * config.head_width, site.width)
        std = site.into(site.width)
        self.w_q = Weight((query_width, site.width), "matrix", std=std)
        self.w_k = Weight(kv_shape, "matrix", std=std, blocks=self.branches)
        self.w_v = Weight(kv_shape, "matrix", std=std, blocks=self.branches)
        # Zero: every gate begins at 1/2, so that no branch starts shut and none wins by chance.
        self.w_gate = Weight((3 * config.heads, site.width), "matrix", constant=0.0, blocks=3)
        self.w_o = Weight((site.width, query_width), "matrix", std=site.back(query_width))
        mlp = config.compression == "mlp"
        self.phi_k = _Phi(config, site) if mlp else _Mean()
        self.phi_v = _Phi(config, site) if mlp else _Mean()

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` has an equal share of the heads, with their key heads; phi is
        everyone's. Those of `ranks.context` gather keys and values and compress all of them."""
        config, parts = self.config, size_of(ranks.tensor)
        if config.kv_heads % parts:
            raise ValueError(
                f"layer {self.layer}: parallel.tp={parts} must divide its {config.kv_heads} "
                "kv_heads"
            )
        self.ranks = ranks
        branches = Cut(ranks.tensor, blocks=self.branches)
        return {
            "w_q": Cut(ranks.tensor),
            "w_k": branches,
            "w_v": branches,
            "w_gate": Cut(ranks.tensor, blocks=3),
            "w_o": Cut(ranks.tensor, dim=1),
        }

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        q_BTHK = self._queries(x_BTD)
        new = self._keys_values(x_BTD, ctx)
        if state is None:
            past = self._whole(new, ctx)
        else:
            assert isinstance(state, _State)
            state = state.extend(new, self._compress)
            past = self._continued(state, ctx)
            state = state.trim()
        gate_BTWH1 = linear(x_BTD, self.w_gate).sigmoid().unflatten(-1, (3, -1, 1))
        tap("nsa_gate", gate_BTWH1)
        out_BTWHK = torch.stack(self._attend(q_BTHK, past, ctx), dim=2)
        out_BTHK = (gate_BTWH1 * out_BTWHK).sum(2)
        y_BTD = linear(out_BTHK.flatten(-2), self.w_o)
        return added(y_BTD, self.ranks.tensor), state, {}

    def _queries(self, x_BTD: Tensor) -> Tensor:
        return linear(x_BTD, self.w_q).unflatten(-1, (-1, self.config.head_width))

    def _rotate(self, x_BTHK: Tensor, ctx: Context) -> Tensor:
        return rotated(x_BTHK, ctx.position_BT, self.config.rope_base, None)

    def _keys_values(self, x_BTD: Tensor, ctx: Context) -> tuple[KeyValue, KeyValue, KeyValue]:
        """New keys and values of the three branches; those of the first are not rotated. Of whole
        sequences, where ranks share them."""
        shape, sharers = (self.branches, -1, self.config.head_width), self.ranks.context
        keys = linear(x_BTD, self.w_k).unflatten(-1, shape).unbind(2)
        values = linear(x_BTD, self.w_v).unflatten(-1, shape).unbind(2)
        seen = [sequences(v_BTGK, sharers) for v_BTGK in values]
        compressed = (sequences(keys[0], sharers), seen[0])
        # The last two branches, or one for both.
        turned = [sequences(self._rotate(k_BTGK, ctx), sharers) for k_BTGK in keys[-2:]]
        pairs = list(zip(turned, seen[-2:], strict=True))
        return compressed, pairs[0], pairs[-1]

    def _compress(self, tokens: KeyValue, last_BC: Tensor) -> KeyValue:
        """Compressed keys and values of the blocks whose last tokens are given by index."""
        offset_I = torch.arange(1 - self.config.block, 1, device=last_BC.device)
        index_BCI = last_BC[:, :, None] + offset_I
        index = index_BCI.flatten(1)[:, :, None, None].expand(-1, -1, *tokens[0].shape[2:])
        blocks = (x.gather(1, index).unflatten(1, index_BCI.shape[1:]) for x in tokens)
        k_BCIGK, v_BCIGK = blocks
        return self.phi_k(k_BCIGK), self.phi_v(v_BCIGK)

    def _whole(self, new: tuple[KeyValue, KeyValue, KeyValue], ctx: Context) -> _Past:
        """Whole sequences: blocks are cut within each document."""
        position_BS = sequences(ctx.position_BT, self.ranks.context)
        (own, length), device = ctx.attend_BTT.shape[1:], position_BS.device
        index_S = torch.arange(length, device=device)
        start_BS = position_BS - (self.config.block - 1)
        ends_BS = (start_BS >= 0) & (start_BS % self.config.stride == 0)
        # No row has more blocks than one of a single document: a shape that needs no look at data.
        most = self.config.num_blocks(length)
        last_BC = torch.where(ends_BS, index_S, length).sort(-1).values[:, :most]
        real_BC, last_BC = last_BC < length, last_BC.clamp(max=length - 1)
        visible_BTC = ctx.attend_BTT.gather(2, last_BC[:, None].expand(-1, own, -1))
        near_TS = ctx.place_T[:, None] - index_S < self.config.window
        return _Past(
            compressed=self._compress(new[0], last_BC),
            block_BC=start_BS.gather(1, last_BC) // self.config.stride,
            visible_BTC=visible_BTC & real_BC[:, None],
            tokens=new[1],
            position_BS=position_BS,
            attend_BTS=ctx.attend_BTT,
            near=new[2],
            near_BTS=ctx.attend_BTT & near_TS,
            whole=own == length,
        )

    def _continued(self, state: _State, ctx: Context) -> _Past:
        """New tokens after those of a state: one document, from its start."""
        config, position_BT = self.config, ctx.position_BT
        batch, length = position_BT.shape
        block_C = torch.arange(state.compressed[0].shape[1], device=position_BT.device)
        last_C = block_C * config.stride + config.block - 1
        near = state.window
        if near is None:
            kept = min(state.length, config.window + length - 1)
            entries = tuple(x[:, -kept:] for x in state.selected.entries)
            near = TokenCache(entries, state.length, config.window)
        seen_S = torch.arange(state.length, device=position_BT.device)
        return _Past(
            compressed=state.compressed,
            block_BC=block_C.expand(batch, -1),
            visible_BTC=last_C <= position_BT[:, :, None],
            tokens=(state.selected.entries[0], state.selected.entries[1]),
            position_BS=seen_S.expand(batch, -1),
            attend_BTS=state.selected.attend_BTS(length),
            near=(near.entries[0], near.entries[1]),
            near_BTS=near.attend_BTS(length),
            whole=False,
        )

    def _attend(self, q_BTHK: Tensor, past: _Past, ctx: Context) -> list[Tensor]:
        """What the three branches saw, each [B, T, H, K]."""
        config, scale = self.config, self.config.head_width**-0.5
        turned_BTHK = self._rotate(q_BTHK, ctx)
        compressed_BTHK, p_BGTC = compressed_attention(
            q_BTHK, *past.compressed, past.visible_BTC, scale
        )
        width, whole = config.selected_block, past.whole
        num_blocks = -(-past.position_BS.shape[1] // width)
        if num_blocks <= config.num_selected:  # every block is chosen
            selected_BTHK = attention(
                turned_BTHK, *past.tokens, past.attend_BTS, scale, causal=whole
            )
        else:
            importance_BGTJ = importance(
                p_BGTC, past.block_BC, num_blocks, config.block, config.stride, width
            )
            own_BT = ctx.position_BT // width
            index_BGTX = choose_blocks(importance_BGTJ, own_BT, config.num_selected)
            selected_BTHK = selected_attention(
                turned_BTHK,
                *past.tokens,
                index_BGTX,
                past.position_BS,
                past.attend_BTS,
                width,
                scale,
                whole=whole,
            )
        near_BTHK = attention(
            turned_BTHK, *past.near, past.near_BTS, scale, causal=whole, window=config.window
        )
        return [compressed_BTHK, selected_BTHK, near_BTHK]

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        config = self.config
        shape = (batch, 0, config.kv_heads, config.head_width)
        empty = torch.empty(shape, dtype=dtype, device=device)
        pair = (empty, empty)
        window = TokenCache(pair, window=config.window) if config.separate_kv else None
        return _State(TokenCache(pair), window, TokenCache(pair, window=config.block), pair, config)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        config = self.config
        kept = context + min(context, config.block + SLACK) + config.num_blocks(context)
        if config.separate_kv:
            kept += min(context, config.window + SLACK)
        return 2 * config.kv_heads * config.head_width * kept * dtype.itemsize

    def flops(self, context: int) -> float:
        # Scores and values of what a query sees on average, over the causal half of the context.
        config, half = self.config, context / 2
        selected = min(half, config.num_selected * config.selected_block)
        seen = half / config.stride + selected + min(half, config.window)
        return 4.0 * config.heads * config.head_width * seen

    def max_logits(self, x_BTD: Tensor, ctx: Context, borrowed: Mapping[str, Tensor]) -> Tensor:
        """The largest of the three branches; of selected tokens, over all that could be chosen."""
        q_BTHK = self._queries(x_BTD)
        past = self._whole(self._keys_values(x_BTD, ctx), ctx)
        scale, turned_BTHK = self.config.head_width**-0.5, self._rotate(q_BTHK, ctx)
        seen = (
            max_logits(q_BTHK, past.compressed[0], past.visible_BTC, scale),
            max_logits(turned_BTHK, past.tokens[0], past.attend_BTS, scale),
            max_logits(turned_BTHK, past.near[0], past.near_BTS, scale),
        )
        return torch.stack(seen).amax(0)

    def clip_logits(self, gamma_H: Tensor, scale: ScaleRows = scale_rows) -> None:
        # Queries take all of it: the one factor that all branches and shared key heads have.
        scale(self.w_q, gamma_H[:, None])
