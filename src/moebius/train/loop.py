"""The training loop, written out top to bottom.

Where a stage ends, the state is saved and carried over into the next stage's model. Ctrl-C (or
SIGTERM) ends the step in hand, saves, says how to go on, and only then is a KeyboardInterrupt.
"""

import contextlib
import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import torch

from moebius.checkpoint import CheckpointError
from moebius.config import resolve
from moebius.model.ffn.moe import routers_of
from moebius.monitor.alarms import Alarms
from moebius.monitor.ceiling import synchronise
from moebius.monitor.console import LiveDisplay, summary_table
from moebius.monitor.meters import Meter, budget_summary
from moebius.monitor.report import write_report
from moebius.monitor.runs import read_metrics
from moebius.monitor.sinks import JsonLines, Sink, Unheard
from moebius.ops.attention import choose as choose_attention
from moebius.ops.experts import in_use
from moebius.ops.loss import choose as choose_loss
from moebius.optim.rules.adamw import AdamW
from moebius.optim.rules.ademamix import AdEMAMix
from moebius.optim.rules.schedule_free import ScheduleFree
from moebius.parallel.compare import check_replicas
from moebius.parallel.watch import SAVING, Watch
from moebius.train.measure import budgets, step_line
from moebius.train.run import Run
from moebius.train.session import Session, in_force
from moebius.train.step import StepResult, train_step

Summary = dict[str, Any]


def train(session: Session, display: LiveDisplay, watch: Watch) -> None:
    """Train until the run's last step, or until it is asked to stop; evaluate where it ends."""
    run, state, folder = session.run, session.state, session.folder
    display.start(folder.path.name, _facts(session))
    metrics, events, sinks = _outputs(session)
    alarms = Alarms(run.alarms, _adam_eps(run), tuple(run.optim.roles))
    bytes_per_token = session.prepared.bytes_per_token("train")
    clock, clock_tokens = time.perf_counter(), state.tokens
    # Asked once and by all: later the folder is there on one rank before it is on another.
    saved_at = state.step if folder.checkpoints.exists() else None

    with _stop_requests() as stop_requested, contextlib.ExitStack() as closing:
        for sink in (metrics, events, *sinks):
            closing.callback(sink.close)
        closing.push(partial(_last_save, session, display))
        for message in watch.notes:
            events.write({"step": state.step, "kind": "lost", "message": message})
        for message in session.notes:
            events.write({"step": state.step, "kind": "resumed", "message": message})
        watch.at(state.step)

        # Ranks stop together: what went wrong with a checkpoint is known to each at its own time.
        while state.step < run.last_step and not session.world.any(
            stop_requested() or session.saver.failed
        ):
            if state.step == session.section.end_step:
                if state.step != saved_at:
                    session.save()
                message = session.enter_stage()
                events.write({"step": state.step, "kind": "stage", "message": message})
                display.message(message)
                saved_at, clock, clock_tokens = state.step, time.perf_counter(), state.tokens

            started = time.perf_counter()
            step = state.step
            batch = session.loader.batch(step).to(session.device)
            logged = (step + 1) % run.log_every == 0 or step + 1 == run.last_step
            measure = logged and (step + 1) % run.measure_every == 0
            meter = Meter(session.world.summed) if logged else None

            result = train_step(run, state, batch, session.dtype, meter, measure)
            synchronise(session.device)
            state.seconds += time.perf_counter() - started
            watch.at(state.step)

            if not result.applied:
                events.write(_bad_step(result, state.step, batch.keys()))
                display.message(f"step {state.step}: loss or gradient not finite, update skipped")
            if meter is not None:
                line = step_line(state, result, meter, session.counts)
                now = time.perf_counter()
                speed = (state.tokens - clock_tokens) / (now - clock)
                clock, clock_tokens = now, state.tokens
                rate = state.optimizer.lr(step, run.steps, run.tokens_per_step())
                line |= {
                    "sequence_length": session.section.sequence_length,
                    "bits_per_byte": result.loss / math.log(2) / bytes_per_token,
                    "lr": rate,
                    "seconds": state.seconds,
                    "tokens_per_second": speed,
                    "mfu": speed * session.counts.flops_train / session.ceiling,
                }
                line["alarms"] = alarms.check(line)
                for message in line["alarms"]:
                    events.write({"step": state.step, "kind": "alarm", "message": message})
                for sink in (metrics, *sinks):
                    sink.write(line)
                display.update(line)

            if state.bad_in_a_row >= run.max_bad_steps:
                session.save()
                session.settle()
                raise ValueError(
                    f"{state.bad_in_a_row} updates in a row were not finite; the state is saved at "
                    f"step {state.step}, the batches are listed in {folder.events}"
                )
            every = run.parallel.compare_every
            if every is not None and state.step % every == 0:
                check_replicas(state.model.state_dict(), session.world, state.step, every)
            if state.step % run.checkpoint_every == 0:
                watch.at(state.step, SAVING)
                session.save()
                watch.at(state.step)
                saved_at = state.step

        watch.rest("ending")
        if state.step != saved_at:
            session.save()
        session.settle()
        interrupted = session.world.any(stop_requested())

    if not interrupted and state.step == run.steps:
        _finish(session, display)
        return
    further = "" if state.step < run.last_step else " stop_at=none"
    command = f"moebius train --resume {shlex.quote(str(folder.path))}{further}"
    display.message(f"stopped at step {state.step}; `{command}` goes on")
    if session.world.main:
        write_report(folder.path)
    if interrupted:
        raise KeyboardInterrupt


def _outputs(session: Session) -> tuple[Sink, Sink, list[Sink]]:
    """Metrics, events and the recipe's own sinks; of several processes only the main one writes."""
    if not session.world.main:
        return Unheard(), Unheard(), []
    folder = session.folder
    own = [config.build(folder.path, folder.path.name) for config in session.run.sinks]
    return JsonLines(folder.metrics), JsonLines(folder.events), own


def _finish(session: Session, display: LiveDisplay) -> None:
    """Evaluate, write the summary and the report, show the closing table."""
    run, state, counts = session.run, session.state, session.counts
    display.message("evaluating on the held-out documents")
    # With schedule_free the averages, not the weights in training.
    with state.optimizer.evaluation_weights():
        model = state.whole_model(in_force(run, session.section), session.device)
        if model is None:
            return
        figures: Summary = resolve(run.evaluation)(
            model,
            session.prepared,
            sequence_length=session.section.sequence_length,
            batch=session.section.batch,
            dtype=session.dtype,
            device=session.device,
            seed=run.seed,
            write=session.folder.write_json,
        )
    summary = {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "skipped_steps": state.skipped,
        "precision": session.precision,
        "params_total": counts.total,
        "params_active_min": counts.active_min,
        "params_active_mean": counts.active_mean,
        "params_active_max": counts.active_max,
        "ffn_experts": budget_summary(read_metrics(session.folder.metrics), budgets(state.model)),
        **figures,
    }
    session.folder.write_json("summary.json", summary)
    report = write_report(session.folder.path)
    display.finish(summary_table(summary, report))


def _facts(session: Session) -> dict[str, str]:
    """What is in use, by name, printed at the start."""
    counts = session.counts
    return {
        "folder": str(session.folder.path),
        **({"ranks": session.world.describe()} if session.world.size > 1 else {}),
        "device": f"{session.device}, {session.precision}, ceiling "
        f"{session.ceiling / 1e9:,.0f} GFLOP/s on plain products",
        "parameters": f"{counts.total / 1e6:.2f}M, active {counts.active_mean / 1e6:.2f}M "
        f"({counts.active_min / 1e6:.2f}M to {counts.active_max / 1e6:.2f}M)",
        "in use": f"{_attention_in_use(session)}, {_experts_in_use(session)}, "
        f"{_loss_in_use(session)}, "
        f"{torch.get_num_threads()} threads",
        **{f"data {i}": text for i, text in enumerate(session.prepared.describe())},
    }


def _attention_in_use(session: Session) -> str:
    length = session.section.sequence_length
    return f"attention {choose_attention(session.device, session.dtype, length)}"


def _experts_in_use(session: Session) -> str:
    """The backends of the model's MoE layers, by name."""
    moes = [moe for block in session.state.model.blocks() for moe in routers_of(block)]
    place = (session.device, session.dtype)
    names = {
        in_use(*place, moe.w_down_EDF, moe.b_down_ED is not None, moe.activation) for moe in moes
    }
    return f"experts {' and '.join(sorted(names))}" if names else "no experts"


def _loss_in_use(session: Session) -> str:
    width = session.run.model.width
    return f"loss {choose_loss(session.device, session.dtype, width)}"


def _adam_eps(run: Run) -> float:
    """The largest epsilon that a rule like Adam divides by; gradients near it are an alarm."""
    rules = [role.rule for role in run.optim.roles.values()]
    adams = [rule for rule in rules if isinstance(rule, AdamW | AdEMAMix | ScheduleFree)]
    return max((rule.eps for rule in adams), default=1e-16)


def _bad_step(result: StepResult, step: int, keys: list[str]) -> dict[str, Any]:
    return {
        "step": step,
        "kind": "skipped",
        "message": f"loss {result.loss}, gradient norm {result.grad_norm}: update skipped",
        "documents": keys,
    }


def _last_save(
    session: Session,
    display: LiveDisplay,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Wait for the checkpoint in hand; what went wrong with it hides no error before it."""
    try:
        session.saver.wait()
    except (CheckpointError, RuntimeError) as failed:
        if error is None:
            raise
        display.message(str(failed))


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one interrupts at once, but
    for a checkpoint that is being written."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
