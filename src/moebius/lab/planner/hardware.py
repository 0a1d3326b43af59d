"""The planner's one file of constants: specification sheets and micro-benchmarks, each with source.

Only WHOLE_RUN comes from runs of whole models, and a run that the planner is compared with is
predicted without its own part in it (`points.py`). Kernels have a time: a published run is
predicted with the fastest that were public when it ran, a plan with the newest. Units: FLOP/s,
bytes, bytes/s.
"""

import dataclasses
import re
from collections.abc import Mapping

from moebius.config import nearest


@dataclasses.dataclass(frozen=True)
class Kernels:
    """FLOP/s that kernels reach: large products, grouped ones, attention forward and backward."""

    matmul: float
    matmul_fp8: float
    grouped: float
    grouped_fp8: float
    attention: float
    attention_backward: float


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator in a node of its kind; links are per device and direction, as sustained."""

    name: str
    memory: float
    peak: float
    peak_fp8: float
    bandwidth: float
    nvlink: float
    network: float
    kernels: Mapping[str, Kernels]
    # False: shares of the peaks measured on H100, for want of public measurements.
    measured: bool = True


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices."""

    nodes: int
    per_node: int
    device: Device

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.nodes * self.per_node


# H100 SXM data sheet: dense tensor-core peaks, HBM3 (H200: HBM3e), NVLink 4 (450 GB/s a direction).
_PEAK, _PEAK_FP8 = 989.4e12, 1978.9e12
# SemiAnalysis, "MI300X vs H100 vs H200" (Dec 2024): bf16 products of Llama 70B's training shapes.
_MATMUL = 720e12
# torchao issue 2490: torch's grouped product, bf16, 16 x (8192 x 5120 x 8192) in 1.31 ms on H100.
_GROUPED = 525e12
# FlashAttention-3 paper (2407.08608), figs. 5 and 6: H100, head width 128, 16K tokens; causal
# forward, backward. cuDNN 9 came out in February 2024, FlashAttention-3 in July.
_CUDNN_9, _FLASH_3 = (539e12, 516e12), (616e12, 561e12)
# DeepGEMM README (Feb 2025), H800, 4,096 rows and up. Dense: the four shapes of DeepSeek-V3's
# attention by their FLOPs; grouped: gate-up at 1,297 and down at 1,099 TFLOP/s by theirs. Before:
# the CUTLASS 3.6 kernels it states its speed-ups against (1.0x to 1.2x).
_DEEPGEMM, _CUTLASS = (1118e12, 1223e12), (1006e12, 1020e12)

HOPPER: Mapping[str, Kernels] = {
    "early 2024": Kernels(_MATMUL, _CUTLASS[0], _GROUPED, _CUTLASS[1], *_CUDNN_9),
    "late 2024": Kernels(_MATMUL, _CUTLASS[0], _GROUPED, _CUTLASS[1], *_FLASH_3),
    "2025": Kernels(_MATMUL, _DEEPGEMM[0], _GROUPED, _DEEPGEMM[1], *_FLASH_3),
}
NEWEST = "2025"

# Copies in memory: Azure AI benchmarking guide, ND H100 v5 and ND H200 v5.
_COPY, _COPY_H200 = 2.90e12, 4.01e12
# All-reduce in a node by message size, bus bandwidth: the same guide, H100, NVLS.
ALL_REDUCE: Mapping[int, float] = {
    1 << 10: 0.07e9,
    1 << 13: 0.53e9,
    1 << 16: 2.72e9,
    1 << 18: 10.86e9,
    1 << 20: 43.7e9,
    1 << 22: 128.7e9,
    1 << 24: 234.5e9,
    1 << 26: 361.8e9,
    1 << 28: 423.4e9,
}
# NCCL issue 1264: 380 GB/s one way between H100s, of 450. DeepEP's README has 153 of 200 on H800.
_NVLINK, _NVLINK_H800 = 380e9, 153e9
# DeepEP README: 43 GB/s from each device over a 400 Gb/s card with two nodes.
_NETWORK = 43e9

# All-to-all of experts in training, by group size: DeepEP README, H800, normal kernels, dispatch.
# Counted as there: a token travels once to every node that has an expert of it.
ALL_TO_ALL: Mapping[int, float] = {16: 43e9, 32: 58e9, 64: 51e9}
# The same in decoding: low-latency kernels (dispatch, combine), a token once to every expert.
LOW_LATENCY: Mapping[int, tuple[float, float]] = {
    8: (98e9, 127e9),
    16: (63e9, 74e9),
    32: (48e9, 53e9),
    64: (43e9, 46e9),
    128: (39e9, 39e9),
    256: (39e9, 40e9),
}
# FP8 travels with one fp32 scale for 128 values.
FP8_BYTES = 1.0 + 4.0 / 128.0
# What communication beside compute takes of it: 20 of 132 multiprocessors (DeepSeek-V3, 3.2.2).
BACKGROUND = 20 / 132
# Rows of a group are padded to tiles of 128 (DeepGEMM, torch): half a tile on average.
HALF_TILE = 64
# Decoding: FlashMLA README, H800: 660 TFLOP/s, 3,000 GB/s; DeepGEMM README, masked grouped layout
# with 256 rows, 932 and 815 TFLOP/s by FLOPs.
DECODE_ATTENTION, DECODE_CACHE, DECODE_GROUPED = 660e12, 3000e9, 889e12
# How many times the seconds of its kernels and links a training step takes: stragglers, power,
# launch gaps, uneven experts. No micro-benchmark has them; this is the geometric mean over the four
# published runs in `points.py`.
WHOLE_RUN = 1.21
# US dollars an hour: what the reports on LongCat-Flash and DeepSeek-V3 assume for an H800.
PRICE = 2.0


def _scaled(kernels: Kernels, ratio: float) -> Kernels:
    rates = {f.name: getattr(kernels, f.name) * ratio for f in dataclasses.fields(Kernels)}
    return Kernels(**rates)


def _like_hopper(
    name: str, memory: float, peak: float, peak_fp8: float, bandwidth: float, nvlink: float
) -> Device:
    kernels = {year: _scaled(each, peak / _PEAK) for year, each in HOPPER.items()}
    link, copy = _NVLINK / 450e9 * nvlink, _COPY / 3.35e12 * bandwidth
    return Device(name, memory, peak, peak_fp8, copy, link, _NETWORK, kernels, False)


def _hopper(name: str, memory: float, copy: float, nvlink: float) -> Device:
    return Device(name, memory, _PEAK, _PEAK_FP8, copy, nvlink, _NETWORK, HOPPER)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _hopper("H100", 80e9, _COPY, _NVLINK),
        _hopper("H200", 141e9, _COPY_H200, _NVLINK),
        _hopper("H800", 80e9, _COPY, _NVLINK_H800),
        _like_hopper("A100", 80e9, 312e12, 312e12, 2.04e12, 300e9),
        _like_hopper("B200", 180e9, 2250e12, 4500e12, 8.0e12, 900e9),
    )
}


def parse_cluster(text: str) -> Cluster:
    """`2x8xH200`: nodes, devices in each, their kind; `8xH200` is one node."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z]\w*)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no cluster; write nodes x devices x kind, such as 2x8xH200")
    nodes, per_node, name = int(match[1] or 1), int(match[2]), match[3].upper()
    if name not in DEVICES:
        raise ValueError(f"unknown device {match[3]!r}{nearest(name, DEVICES)}")
    if nodes < 1 or per_node < 1:
        raise ValueError(f"{text!r} has no devices; write at least 1x1x{name}")
    return Cluster(nodes, per_node, DEVICES[name])
