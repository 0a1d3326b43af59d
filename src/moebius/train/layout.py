"""What a run cannot do on the ranks it is launched on, said before its folder is made.

`check_ranks` needs nobody else; `check_layout` asks every part, once ranks have met. Each refusal
names the part or the field, and what to choose instead.
"""

import torch

from moebius.model.lm import LM
from moebius.model.mixers import Mixer
from moebius.model.stage import borrowed_by, divided
from moebius.ops.ranks import Spread
from moebius.parallel.config import Degrees, Pipe
from moebius.parallel.plan import cuts_of
from moebius.parallel.world import World, launched
from moebius.train.precision import products_of
from moebius.train.run import Run
from moebius.train.sections import sections_of
from moebius.train.step import rows_of


def check_ranks(run: Run, model: LM) -> None:
    """ValueError where the run has what the processes of this launch cannot do together."""
    degrees = run.parallel.on(launched())
    if launched() == 1:
        return
    check_plans(model, degrees)
    cut = [name for name in ("tp", "cp") if getattr(degrees, name) > 1]
    cut += ["pp"] if degrees.pipe.ranks > 1 else []
    if run.qk_clip is not None and cut:
        raise ValueError(
            f"qk_clip looks at all heads of all layers over whole sequences; use "
            f"parallel.{cut[0]}=1, or leave it out"
        )
    if degrees.tp > 1 and any(products_of(run).values()):
        raise ValueError(
            "a tensor group would take the scales of products in low precision from parts of rows; "
            "use parallel.tp=1 or precision=bf16"
        )
    sizes = {run.batch, *(size for _, size in run.batch_ramp)}
    sizes |= {section.batch for section in sections_of(run)}
    readers = degrees.dp_replicate * degrees.dp_shard
    odd = sorted(size for size in sizes if size % readers)
    if odd:
        together = degrees.tp * degrees.cp
        shares = "processes" if together == 1 else f"groups of {together} processes"
        raise ValueError(
            f"a batch of {odd[0]} sequences cannot be shared equally by {readers} {shares}; "
            "choose a multiple"
        )
    if degrees.pipe.ranks > 1:
        check_stages(run, model, degrees.pipe)
        check_micro_batches(run, degrees.pipe.ranks, readers)
    lengths = {section.sequence_length for section in sections_of(run)}
    odd = sorted(length for length in lengths if length % (2 * degrees.cp))
    if degrees.cp > 1 and odd:
        raise ValueError(
            f"a sequence of {odd[0]} tokens cannot be shared equally by parallel.cp={degrees.cp}; "
            f"choose a multiple of {2 * degrees.cp}"
        )


def check_micro_batches(run: Run, ranks: int, readers: int) -> None:
    """ValueError where the sequences of a reader cannot fill a pipeline of so many ranks."""
    for section in sections_of(run):
        for size in (section.batch, *(size for _, size in section.ramp)):
            share = size // readers
            rows = rows_of(run, share, section.sequence_length, ranks)
            number, odd = divmod(share, rows)
            if odd or number % ranks:
                raise ValueError(
                    f"a rank's {share} sequences, {rows} a micro-batch, cannot fill a pipeline "
                    f"of {ranks} ranks; choose batch and micro_batch so that their number is a "
                    f"multiple of {ranks}"
                )


def check_stages(run: Run, model: LM, pipe: Pipe) -> None:
    """ValueError where a model cannot be divided into the stages of a pipeline."""
    divided(model, pipe.num_stages, run.sequence_length)
    twice = borrowed_by(model)
    if pipe.schedule == "zbv" and (run.recompute or twice):
        what = "recompute" if run.recompute else f"{twice[0]}, which the last stage uses as well"
        raise ValueError(
            f"parallel.schedule=zbv divides a backward in two, which torch cannot do with {what}; "
            "use 1f1b or interleaved"
        )


def check_layout(run: Run, world: World) -> None:
    """ValueError where a part of the model cannot be spread over these ranks; writes nothing."""
    with torch.device("meta"):
        cuts_of(run.model.build(run.vocab), world)


def check_plans(model: LM, degrees: Degrees) -> None:
    """ValueError where a mixer cannot share its heads or its sequences among ranks."""
    asked = [name for name in ("tp", "cp") if getattr(degrees, name) > 1]
    if not asked:
        return
    for layer, block in enumerate((*model.blocks(), model.ends)):
        for mixer in (part for part in block.modules() if isinstance(part, Mixer)):
            if not any(isinstance(part, Spread) for part in mixer.modules()):
                name = type(mixer).__name__.strip("_")
                raise ValueError(
                    f"layer {layer}: {name} has no plan for parallel.{asked[0]}; use 1"
                )
