"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): linear attention by a gated delta rule.

Each head keeps a matrix that maps keys to values; every channel of the keys decays at a rate of its
own, and a token corrects the value found at its key. No positions are needed. Letters: H heads, K
head width (of keys and values), X queries, keys and values side by side (3 H K), W conv width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.part import Norm, Site
from moebius.model.weight import Weight
from moebius.ops.kda import absorb, kda, kda_onward
from moebius.ops.linear import at_least_fp32, linear
from moebius.ops.ranks import Cut, Ranks, Spread, added, size_of
from moebius.ops.sequences import before, from_pieces, in_pieces

# How many tokens a state can always take back (speculative drafts are shorter).
REACH = 16


@dataclasses.dataclass(frozen=True)
class KDA(MixerConfig):
    """`heads` states of `head_width` x `head_width`, behind short convolutions over `conv_width`.

    `lower_bound` (such as -5) bounds the log-decay of a step; `negative_eigenvalues` lets a token
    overshoot its correction (beta up to 2).
    """

    heads: int
    head_width: int
    conv_width: int = 4
    lower_bound: float | None = None
    negative_eigenvalues: bool = False

    def build(self, site: Site) -> Mixer:
        return _KDA(self, site)


@dataclasses.dataclass(frozen=True)
class KDAState(DecodeState):
    """A state S as of some tokens ago, and what the `kept` tokens since then do to it.

    A recurrent state cannot be undone. Their keys, corrections (delta) and decays are smaller than
    a second state; rolling back forgets the last of them.
    """

    state_BHKV: Tensor
    inputs_BTX: Tensor  # what the convolutions read: W - 1 tokens before those kept, and those
    k_BTHK: Tensor
    delta_BTHV: Tensor
    g_BTHK: Tensor
    seen: int = 0

    @property
    def length(self) -> int:
        return self.seen

    @property
    def kept(self) -> int:
        return self.k_BTHK.shape[1]

    @property
    def bytes(self) -> int:
        log = (self.inputs_BTX, self.k_BTHK, self.delta_BTHV, self.g_BTHK)
        return sum(x.numel() * x.element_size() for x in (self.state_BHKV, *log))

    @property
    def conv_width(self) -> int:
        return self.inputs_BTX.shape[1] - self.kept + 1

    def snapshot(self) -> Self:
        return self

    def rollback(self, num_tokens: int) -> Self:
        if not 0 <= num_tokens <= self.kept:
            raise ValueError(f"cannot roll back {num_tokens} tokens; at most {self.kept} here")
        kept = self.kept - num_tokens
        return dataclasses.replace(
            self,
            inputs_BTX=self.inputs_BTX[:, : self.conv_width - 1 + kept],
            k_BTHK=self.k_BTHK[:, :kept],
            delta_BTHV=self.delta_BTHV[:, :kept],
            g_BTHK=self.g_BTHK[:, :kept],
            seen=self.seen - num_tokens,
        )

    def now_BHKV(self) -> Tensor:
        """S after all tokens seen."""
        return absorb(self.state_BHKV, self.k_BTHK, self.delta_BTHV, self.g_BTHK)

    def extend(
        self, inputs_BTX: Tensor, k_BTHK: Tensor, delta_BTHV: Tensor, g_BTHK: Tensor
    ) -> Self:
        """The state after more tokens: `tokens_kept` stay apart, older ones go into S."""
        seen = self.seen + k_BTHK.shape[1]
        inputs_BTX = torch.cat([self.inputs_BTX, inputs_BTX], dim=1)
        k_BTHK = torch.cat([self.k_BTHK, k_BTHK], dim=1)
        delta_BTHV = torch.cat([self.delta_BTHV, delta_BTHV], dim=1)
        g_BTHK = torch.cat([self.g_BTHK, g_BTHK], dim=1)
        old = max(0, k_BTHK.shape[1] - tokens_kept(seen))
        return dataclasses.replace(
            self,
            state_BHKV=absorb(
                self.state_BHKV, k_BTHK[:, :old], delta_BTHV[:, :old], g_BTHK[:, :old]
            ),
            inputs_BTX=inputs_BTX[:, old:].clone(),
            k_BTHK=k_BTHK[:, old:].clone(),
            delta_BTHV=delta_BTHV[:, old:].clone(),
            g_BTHK=g_BTHK[:, old:].clone(),
            seen=seen,
        )


def tokens_kept(seen: int) -> int:
    """How many tokens stay out of S: at least REACH (or all), so that S moves in whole strides."""
    return seen - REACH * max(0, seen // REACH - 1)


class _KDA(Mixer, Spread):
    def __init__(self, config: KDA, site: Site) -> None:
        super().__init__()
        self.site, self.ranks = site, Ranks()
        if config.lower_bound is not None and config.lower_bound >= 0:
            raise ValueError(f"lower_bound ({config.lower_bound}) must be below 0, such as -5")
        self.config = config
        rank, width = config.head_width, config.heads * config.head_width
        into, conv = site.into(site.width), (3 * width, config.conv_width)
        self.w_q = Weight((width, site.width), "matrix", std=into)
        self.w_k = Weight((width, site.width), "matrix", std=into)
        self.w_v = Weight((width, site.width), "matrix", std=into)
        self.conv_XW = Weight(conv, "scalar", std=site.into(config.conv_width))
        self.w_decay_down = Weight((rank, site.width), "matrix", std=into)
        self.w_decay_up = Weight((width, rank), "matrix", std=site.into(rank))
        self.dt_bias = Weight((width,), "bias", draw=_draw_dt_bias)
        self.a_log_H = Weight((config.heads,), "scalar", draw=_draw_a_log)
        self.w_beta = Weight((config.heads, site.width), "matrix", std=into)
        self.w_gate_down = Weight((rank, site.width), "matrix", std=into)
        self.w_gate_up = Weight((width, rank), "matrix", std=site.into(rank))
        self.out_norm = Norm(config.head_width, site.eps)
        self.w_o = Weight((site.width, width), "matrix", std=site.back(width))

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` has an equal share of the heads; those of `ranks.context`
        pass on the states of theirs."""
        if self.config.heads % (parts := size_of(ranks.tensor)):
            raise ValueError(
                f"layer {self.site.layer}: parallel.tp={parts} must divide its "
                f"{self.config.heads} heads"
            )
        self.ranks, cut = ranks, Cut(ranks.tensor)
        by_head = ("w_q", "w_k", "w_v", "w_decay_up", "dt_bias", "a_log_H", "w_beta", "w_gate_up")
        convolutions = Cut(ranks.tensor, blocks=3)
        return {**dict.fromkeys(by_head, cut), "conv_XW": convolutions, "w_o": Cut(cut.group, 1)}

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        inputs_BTX = torch.cat([linear(x_BTD, w) for w in (self.w_q, self.w_k, self.w_v)], dim=-1)
        g_BTHK, beta_BTH = self._log_decay(x_BTD), self._beta(x_BTD)
        if state is None:
            sharers = self.ranks.context
            inputs_BTX, g_BTHK, beta_BTH, position_BT = (
                in_pieces(x, sharers) for x in (inputs_BTX, g_BTHK, beta_BTH, ctx.position_BT)
            )
            past_BTX = before(inputs_BTX, self.config.conv_width - 1, sharers)
            q_BTHK, k_BTHK, v_BTHK = self._convolved(inputs_BTX, past_BTX, position_BT)
            given = (q_BTHK, k_BTHK, v_BTHK, g_BTHK, beta_BTH, position_BT == 0)
            out_BTHK = from_pieces(kda(*given, sharers), sharers)
        else:
            assert isinstance(state, KDAState)
            q_BTHK, k_BTHK, v_BTHK = self._convolved(inputs_BTX, state.inputs_BTX, None)
            out_BTHK, delta_BTHK = kda_onward(
                q_BTHK, k_BTHK, v_BTHK, g_BTHK, beta_BTH, state.now_BHKV()
            )
            state = state.extend(inputs_BTX, k_BTHK, delta_BTHK, g_BTHK)
        return self._back(out_BTHK, x_BTD), state, {}

    def _convolved(
        self, inputs_BTX: Tensor, past_BTX: Tensor, position_BT: Tensor | None
    ) -> tuple[Tensor, ...]:
        """q, k, v after their depthwise causal convolutions, which stay within a document where
        positions in it are given."""
        wide, length = at_least_fp32(inputs_BTX.dtype), inputs_BTX.shape[1]
        w_XW, lag = self.conv_XW.to(wide), self.config.conv_width - 1
        past_BTX = past_BTX[:, past_BTX.shape[1] - lag :]
        all_BTX = torch.cat([past_BTX, inputs_BTX], dim=1).to(wide)
        out_BTX = all_BTX[:, lag:] * w_XW[:, lag]
        for tap in range(lag):
            tap_BTX = all_BTX[:, tap : tap + length]
            if position_BT is not None:
                tap_BTX = tap_BTX * (position_BT >= lag - tap)[..., None]
            out_BTX = torch.addcmul(out_BTX, tap_BTX, w_XW[:, tap])
        out_BTX = F.silu(out_BTX).to(inputs_BTX.dtype)
        return out_BTX.unflatten(-1, (3, -1, self.config.head_width)).unbind(2)

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        """g_BTHK, at most 0, in at least fp32."""
        wide = at_least_fp32(x_BTD.dtype)
        decay_BTX = linear(linear(x_BTD, self.w_decay_down), self.w_decay_up)
        decay_BTX = decay_BTX.to(wide) + self.dt_bias.to(wide)
        decay_BTHK = decay_BTX.unflatten(-1, (-1, self.config.head_width))
        rate_H1 = self.a_log_H.to(wide).exp()[:, None]
        if self.config.lower_bound is not None:
            return self.config.lower_bound * torch.sigmoid(rate_H1 * decay_BTHK)
        return -rate_H1 * F.softplus(decay_BTHK)

    def _beta(self, x_BTD: Tensor) -> Tensor:
        """How much of its error a token corrects."""
        beta_BTH = linear(x_BTD, self.w_beta).to(at_least_fp32(x_BTD.dtype)).sigmoid()
        return 2 * beta_BTH if self.config.negative_eigenvalues else beta_BTH

    def _back(self, out_BTHK: Tensor, x_BTD: Tensor) -> Tensor:
        """Heads, normed and gated, to the model width."""
        wide = at_least_fp32(x_BTD.dtype)
        gate_BTX = linear(linear(x_BTD, self.w_gate_down), self.w_gate_up)
        normed_BTX = self.out_norm(out_BTHK.to(wide)).flatten(-2)
        gated_BTX = (normed_BTX * gate_BTX.to(wide).sigmoid()).to(x_BTD.dtype)
        return added(linear(gated_BTX, self.w_o), self.ranks.tensor)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        heads, width, wide = self.config.heads, self.config.head_width, at_least_fp32(dtype)
        past = (batch, self.config.conv_width - 1, 3 * heads * width)
        none = (batch, 0, heads, width)
        return KDAState(
            torch.zeros(batch, heads, width, width, dtype=wide, device=device),
            torch.zeros(past, dtype=dtype, device=device),
            torch.zeros(none, dtype=dtype, device=device),
            torch.zeros(none, dtype=wide, device=device),
            torch.zeros(none, dtype=wide, device=device),
        )

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        width, kept = self.config.heads * self.config.head_width, tokens_kept(context)
        wide = at_least_fp32(dtype).itemsize
        inputs = 3 * width * (self.config.conv_width - 1 + kept) * dtype.itemsize
        log = kept * width * (dtype.itemsize + 2 * wide)
        return width * self.config.head_width * wide + inputs + log

    def flops(self, context: int) -> float:
        # Reading at the key, writing, reading at the query: 3 products with S.
        return 6.0 * self.config.heads * self.config.head_width**2


def _draw_a_log(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """log U(1, 16): rates of decay."""
    rate = torch.empty(shape, device="cpu", dtype=torch.float32)
    return rate.uniform_(1, 16, generator=generator).log()


def _draw_dt_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """softplus of it is log-uniform from 1e-3 to 1e-1: time steps."""
    log_dt = torch.empty(shape, device="cpu", dtype=torch.float32)
    dt = log_dt.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    return dt + torch.log(-torch.expm1(-dt))
