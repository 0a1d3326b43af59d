"""`moebius grow`: a run folder from another run's, with more layers or with experts.

The whole training state goes along: moments, router biases, step and tokens, the place in the
schedule and in the data, the random state; `moebius train --resume` simply continues. Both models'
loss on the next batch is said and kept. The folder is written aside and takes its name when it is
whole; the parent is only read.
"""

import dataclasses
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius import checkpoint
from moebius.checkpoint.files import replace_file, sync_folder
from moebius.checkpoint.hf.importer import KEPT
from moebius.data.loader import Batch
from moebius.lab.stack import check_lenders, stacked, stacked_from
from moebius.lab.upcycle import upcycled, upcycled_from
from moebius.model.lm import LM
from moebius.monitor.sinks import JsonLines
from moebius.train.folder import LOCK, RunFolder, check_place
from moebius.train.passes import context_of
from moebius.train.run import TOKENIZER, Run, to_folder_json
from moebius.train.sections import section_at, sections_of
from moebius.train.session import (
    Progress,
    Say,
    Session,
    check,
    describe,
    in_force,
    new_session,
    open_stages,
    read_run,
)
from moebius.train.state import TrainState, new_state
from moebius.train.step import micro_rows

_ASIDE = ".growing-"
# What an upcycled model has and its parent had not, besides moments under another rule.
_NEW = re.compile(r"\.(router|rules)\.")


def parse_factor(text: str) -> int:
    """The 2 of `2x`; ValueError where it is no whole factor of at least 2."""
    match = re.fullmatch(r"([0-9]{1,9})x?", text.strip().lower())
    if match is None or int(match[1]) < 2:
        raise ValueError(f"{text!r} is no whole factor of 2 or more; write --layers 2x")
    return int(match[1])


def grow(
    run: Path,
    out: Path | None = None,
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int = 2,
    say: Say = print,
    progress: Progress | None = None,
) -> Path:
    """Grow the run in a folder into a new one (`out`, or the next `runs/NAME-grown-N`).

    Either `layers` times its layers, or `experts` copies of every dense feed-forward, of which a
    token gets `top_k`. Raises ValueError, before anything is written, where that does not fit.
    """
    if (layers is None) == (experts is None):
        raise ValueError("say how to grow, by one of --layers 2x and --experts N")
    parent, out = RunFolder.open(Path(run)), None if out is None else Path(out).absolute()
    old, record = read_run(parent)
    new = _grown_run(old, layers, experts, top_k)
    check(new)
    check_place(out or Path("runs"), empty=out is not None)
    saved, counters = _newest(parent, say)
    session = _session(new, parent, record, counters, progress)
    tensors = _tensors(session.state, old, saved, layers, say)
    grown = {
        "from": parent.path.name,
        "step": counters["step"],
        **({"layers": layers} if layers else {"experts": experts, "top_k": top_k}),
        **_losses(session, old, saved, tensors, say),
        # The growths that the parent went through itself.
        **({"before": record["grown"]} if "grown" in record else {}),
    }
    root = Path("runs").absolute() if out is None else out.parent
    with _aside(root) as aside:
        _write(aside, parent, session, record, tensors, counters, grown)
        path = out or RunFolder.create(root, new.name).path
        (path / LOCK).unlink(missing_ok=True)
        aside.path.rename(path)
        sync_folder(root)
    say(f"grown into {path}; `moebius train --resume {shlex.quote(str(path))}` goes on")
    return path


def _grown_run(old: Run, layers: int | None, experts: int | None, top_k: int) -> Run:
    if layers is not None:
        model = stacked(old.model, layers)
    else:
        assert experts is not None
        model = upcycled(old.model, experts, top_k)
    return dataclasses.replace(old, name=f"{old.name}-grown", model=model, stop_at=None)


def _newest(parent: RunFolder, say: Say) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the counters of the parent's newest intact checkpoint."""
    path = checkpoint.latest_intact(parent.checkpoints, say=say)
    if path is None:
        raise ValueError(f"{parent.path} has no checkpoint yet; train it before it grows")
    tensors, counters = checkpoint.load(path)
    if counters.get("weights_only"):
        raise ValueError(
            f"{parent.path} holds imported weights and no state of training; train it for a step "
            "before it grows"
        )
    return tensors, counters


def _session(
    new: Run,
    parent: RunFolder,
    record: Mapping[str, Any],
    counters: Mapping[str, Any],
    progress: Progress | None,
) -> Session:
    """The grown run at the parent's step, its tensors still those drawn from its seed."""
    prepared, loaders = open_stages(new, progress)
    if prepared.digest != record["data"]["digest"]:
        raise ValueError(
            f"the data has changed since the run in {parent.path} began (now {prepared.folder}): "
            "restore the files as they were"
        )
    section = section_at(sections_of(new), counters["step"])
    state = new_state(in_force(new, section), torch.device("cpu"))
    state.step = counters["step"]
    return new_session(new, parent, prepared, loaders, state, record["precision"])


# --- tensors --------------------------------------------------------------------------------------


def _tensors(
    state: TrainState, old: Run, saved: Mapping[str, Tensor], layers: int | None, say: Say
) -> dict[str, Tensor]:
    """The tensors of the grown state, from those of the parent; each of them has its place."""
    fresh = {k: v for k, v in state.tensors().items() if not k.startswith("random.")}
    source: Callable[[str], str | None] = partial(upcycled_from, parent=saved)
    if layers is not None:
        num_layers = len(old.model.layers)
        check_lenders(state.model, num_layers)
        source = partial(stacked_from, num_layers=num_layers)
    sources = {name: source(name) for name in fresh}
    tensors = {name: _taken(name, x, sources[name], saved) for name, x in fresh.items()}
    unused = saved.keys() - {name for name in sources.values() if name is not None}
    anew = [n for n, found in sources.items() if found is None and not _NEW.search(n)]
    # Copied experts keep their moments, unless the recipe moves experts by another rule.
    may_differ = ("random.",) if layers is not None else ("random.", "optim.")
    lost = sorted(name for name in (*unused, *anew) if not name.startswith(may_differ))
    if lost:
        raise ValueError(f"the parent's tensors do not fit: {', '.join(lost[:5])}")
    left_out = sum(name.startswith("optim.") for name in unused)
    if anew or left_out:
        say(
            f"{len(anew)} moments begin at zero and {left_out} are left out: experts and matrices "
            "move by different rules"
        )
    return tensors | {name: saved[name] for name in saved if name.startswith("random.")}


def _taken(name: str, fresh: Tensor, source: str | None, saved: Mapping[str, Tensor]) -> Tensor:
    """The parent's tensor, or E copies of it, in the place of a fresh one."""
    if source is None:
        return fresh
    tensor = saved.get(source)
    shape = None if tensor is None else tuple(tensor.shape)
    if tensor is None or tensor.dtype != fresh.dtype or shape not in (fresh.shape, fresh.shape[1:]):
        raise ValueError(f"the parent's {source} ({shape}) does not fit {name} ({fresh.shape})")
    return tensor.expand(fresh.shape)


# --- the first loss -------------------------------------------------------------------------------


def _losses(
    session: Session, old: Run, saved: Mapping[str, Tensor], tensors: Mapping[str, Tensor], say: Say
) -> dict[str, float]:
    """Both models' mean cross-entropy (nats) on the batch that comes next."""
    step = session.state.step
    if step >= session.run.steps:
        say(f"all {session.run.steps} steps are done: the grown run has none left to train")
        step = session.run.steps - 1
    batch = session.loader.batch(step).to(session.device)
    built = section_at(sections_of(old), step).model.build(old.vocab)
    parent = _loss(session, _filled(built, saved, session), batch, step)
    del built
    first = _loss(session, _filled(session.state.model, tensors, session), batch, step)
    say(f"first loss {first:.4f}, the parent's on the same batch {parent:.4f} (step {step + 1})")
    return {"parent_loss": parent, "first_loss": first}


def _filled(model: LM, tensors: Mapping[str, Tensor], session: Session) -> LM:
    if session.dtype == torch.float64:
        model.double()
    own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(own)
    return model.to(session.device)


@torch.no_grad()
def _loss(session: Session, model: LM, batch: Batch, step: int) -> float:
    """What a training step would report of its batch."""
    total = 0.0
    for part in batch.split(micro_rows(session.run, batch)):
        given = (part.tokens_BT, part.targets_BT, context_of(part, step))
        total += float(model.loss(*given, dtype=session.dtype, with_ends=False).total)
    return total / batch.num_targets


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def _aside(root: Path) -> Iterator[RunFolder]:
    """A locked folder beside the one to be; gone at the end unless it was renamed."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_ASIDE}*"):
        _sweep(RunFolder(left))
    folder = RunFolder(root / f"{_ASIDE}{secrets.token_hex(4)}")
    folder.path.mkdir()
    try:
        with folder.lock():
            yield folder
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


def _sweep(left: RunFolder) -> None:
    """Remove what a killed growth left; one that is at work holds its lock."""
    try:
        with left.lock():
            shutil.rmtree(left.path, ignore_errors=True)
    except ValueError:
        return


def _write(
    folder: RunFolder,
    parent: RunFolder,
    session: Session,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    counters: Mapping[str, Any],
    grown: Mapping[str, Any],
) -> None:
    """Everything that a run folder holds; the curves of the parent go on in it."""

    def keep(path: Path) -> str:
        (folder.path / "code").mkdir(exist_ok=True)
        replace_file(folder.path / "code" / path.name, [path.read_bytes()])
        return f"code/{path.name}"

    run, step = session.run, counters["step"]
    kept = to_folder_json(run, keep)
    folder.copy_in(parent.path / TOKENIZER, TOKENIZER)
    if (parent.path / KEPT).is_dir():
        shutil.copytree(parent.path / KEPT, folder.path / KEPT)
    for path in (parent.metrics, parent.events):
        if path.exists():
            folder.copy_in(path, path.name)
    folder.cut_metrics(step)
    events = JsonLines(folder.events)
    losses = f"first loss {grown['first_loss']:.4f}, the parent's {grown['parent_loss']:.4f}"
    events.write({"step": step, "kind": "grown", "message": f"from {parent.path}; {losses}"})
    events.close()
    checkpoint.save(folder.checkpoints, step, tensors, counters, keep=run.keep_checkpoints)
    # What depends on the model is counted anew; what the parent measured and resumes with stays.
    measured = {name: record[name] for name in ("threads", "matmul_flops")}
    facts = {**record, **describe(session), **measured}
    folder.write_json("run.json", {**facts, "run": kept, "grown": grown})
