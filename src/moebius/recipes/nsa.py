"""Native sparse attention (arXiv 2502.11089) in DeepSeek-V3's mixture of experts.

The paper's 27B model is a DeepSeekMoE with 64 heads over 4 key heads; these are its small kin by
the widths of DeepSeek-V3. A key head serves 16 heads, as the paper's kernel needs it.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.nsa import NSA
from moebius.recipes.deepseek import WIDTH, experts
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.kin import nano, small
from moebius.train.run import Run


def nsa_nano() -> Run:
    """Native sparse attention for a CPU: 4 layers, 4 of the 16 blocks of a sequence selected."""
    # A sequence is a 16th of the paper's 8K and more: so are blocks and window.
    mixer = NSA(16, 1, 32, block=16, stride=8, selected_block=32, num_selected=4, window=64)
    return nano("nsa-nano", _model(Dial(NANO, WIDTH), mixer, 4))


def nsa_small() -> Run:
    """Native sparse attention for one GPU: 12 layers, the paper's blocks and window."""
    return small("nsa-small", _model(Dial(SMALL, WIDTH), NSA(32, 2, 64), 12))


def _model(dial: Dial, mixer: NSA, layers: int) -> ModelConfig:
    first, layer = PreNorm(mixer, Dense(dial.ffn(18_432))), PreNorm(mixer, experts(dial))
    return ModelConfig(width=dial.width, layers=1 * (first,) + (layers - 1) * (layer,))
