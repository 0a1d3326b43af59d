"""Sampling: prefill once, then one token at a time from each mixer's own decode state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.data.tokenizer import Tokenizer
from moebius.model.context import Context
from moebius.model.lm import LM


@torch.no_grad()
def generate(
    lm: LM,
    prompt_BT: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stops: Sequence[int] = (),
    vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Continue each prompt (of equal length, at least one token) by up to `num_tokens` tokens.

    Returns the new tokens [B, <= num_tokens]; a row that met one of `stops` repeats it to the end.
    Temperature 0 is greedy. Only tokens below `vocab` are drawn: a small corpus fills less of the
    model's vocabulary than there is. Raises ValueError for options out of range, and where the
    logits are not finite.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be >= 0, and top_p {top_p} in (0, 1]")
    if prompt_BT.shape[1] == 0:
        raise ValueError("the prompt is empty; begin with the document token")
    generator = torch.Generator().manual_seed(seed)
    states = lm.init_states(len(prompt_BT), dtype, prompt_BT.device)
    new: list[Tensor] = []
    done_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
    tokens_BT, seen = prompt_BT, 0
    for _ in range(num_tokens):
        ctx = Context.continuing(tokens_BT, seen)
        out = lm(tokens_BT, ctx, states, dtype=dtype)
        seen, states = seen + tokens_BT.shape[1], out.states
        logits_BV = lm.logits(out.hidden_BTD[:, -1:])[:, 0, :vocab].float()
        if not bool(logits_BV.isfinite().all()):
            raise ValueError("the logits are not finite; the weights hold NaN or overflow")
        next_B = draw(logits_BV, temperature, top_p, generator)
        if stops:
            next_B = torch.where(done_B, tokens_BT[:, -1], next_B)
            done_B |= torch.isin(next_B, torch.tensor(stops, device=next_B.device))
        new.append(next_B)
        tokens_BT = next_B[:, None]
        if stops and bool(done_B.all()):
            break
    return torch.stack(new, dim=1) if new else prompt_BT[:, :0]


def draw(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row: greedy at temperature 0, else from the smallest set of mass >= top_p."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # The largest logit becomes 0, so that no temperature is too low to divide by.
    below_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    p_BV, order_BV = below_BV.softmax(-1).cpu().sort(-1, descending=True)
    before_BV = p_BV.cumsum(-1) - p_BV
    p_BV = torch.where(before_BV < top_p, p_BV, 0.0)
    chosen_B1 = torch.multinomial(p_BV, 1, generator=generator)
    return order_BV.gather(-1, chosen_B1)[:, 0].to(logits_BV.device)


def sample_text(
    lm: LM,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stops: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> str:
    """The prompt and its continuation as text, from the start of a document to its end.

    `stops` are tokens that end it beside the one that opens a document.
    """
    device = lm.head.w_VD.device
    ids = [tokenizer.document, *tokenizer.encode(prompt)]
    ends = (tokenizer.document, *stops)
    new_BT = generate(
        lm,
        torch.tensor([ids], device=device),
        num_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stops=ends,
        vocab=tokenizer.vocab,
        dtype=dtype,
    )
    tokens = [token for token in new_BT[0].tolist() if token not in ends]
    return prompt + tokenizer.decode(tokens)
