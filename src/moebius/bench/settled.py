"""A run as it will be timed: its precision chosen, its ops named and compared with naive forms."""

import dataclasses

import torch

from moebius.bench.agreement import model_errors
from moebius.data.loader import Loader
from moebius.model.ffn.moe import routers_of
from moebius.model.lm import LM
from moebius.ops.attention import choose as choose_attention
from moebius.ops.experts import in_use
from moebius.ops.loss import choose as choose_loss
from moebius.train.precision import DTYPES
from moebius.train.precision import choose as choose_precision
from moebius.train.run import Run
from moebius.train.session import Progress, check, device_of, open_data, trial
from moebius.train.state import TrainState, new_state


def opened(run: Run, progress: Progress | None) -> tuple[Loader, torch.device]:
    """The batches of a run that is fit to be timed, and the device it is timed on."""
    check(run)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    return open_data(run, progress)[1], device_of(run)


def begun(run: Run, loader: Loader, device: torch.device) -> tuple[TrainState, str]:
    """Its state before the first step, and the precision that it would choose."""
    state = new_state(run, device)
    return state, choose_precision(run.precision, device, trial(run, state, loader, device))[0]


def settled(
    run: Run, loader: Loader, device: torch.device
) -> tuple[Run, dict[str, float], dict[str, str]]:
    """The run with its precision chosen, how its ops agree with their naive forms, their names."""
    state, precision = begun(run, loader, device)
    run, dtype = dataclasses.replace(run, precision=precision), DTYPES[precision]
    batch = loader.batch(0)
    rows = batch.rows(0, min(len(batch), run.micro_batch or len(batch))).to(device)
    errors = model_errors(state.model, rows, device, dtype)
    return run, errors, _in_use(run, state.model, device, dtype)


def _in_use(run: Run, model: LM, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The backends of a model's ops, by name."""
    layers = [moe for block in model.blocks() for moe in routers_of(block)]
    names = {
        in_use(device, dtype, moe.w_down_EDF, moe.b_down_ED is not None, moe.activation)
        for moe in layers
    }
    return {
        **({"experts": " and ".join(sorted(names))} if names else {}),
        "attention": choose_attention(device, dtype, run.sequence_length),
        "loss": choose_loss(device, dtype, run.model.width),
    }
