"""The one loop: assemble, ask the base, train, ask the student, hand over."""

import contextlib
import pathlib
import signal
import threading
import time
import zlib

import jax
import numpy as np
from absl import logging
from ml_collections import config_dict

from gkdjax import (
    examples_of_run,
    fill_store,
    lora,
    models_of_run,
    optim,
    processes,
    report,
    results,
    rows_of_run,
    training_text,
)
from gkdjax import workdir as workdirs
from gkdjax.ahead import Ahead
from gkdjax.assemble import Run, assemble, initial_state
from gkdjax.checkpoint import Checkpoints
from gkdjax.config import Config, Eval, parse
from gkdjax.errors import GkdjaxError, Preempted, TeacherUnreachable, UserError, WrongAnswer
from gkdjax.evaluation.scoring import Reader
from gkdjax.hf import export
from gkdjax.metrics import MetricsWriter, read_lines, write_lines
from gkdjax.planning import room
from gkdjax.record import Recorder
from gkdjax.results import content
from gkdjax.teachers.http.teacher import HttpTeacher
from gkdjax.teachers.protocol import Teacher
from gkdjax.train_step import make_train_step
from gkdjax.types import Batch, TrainState

# While the teacher is asked; a store on a full disk is a UserError.
_TEACHER_FAILS = (TeacherUnreachable, UserError, WrongAnswer, Preempted)


def run(
    config: config_dict.ConfigDict | Config,
    workdir: str | pathlib.Path,
    teacher: Teacher | None = None,
) -> dict:
    """Distils as the config says -> the content of results.json.

    The same call on the same directory continues an interrupted run and shows a finished one. Of
    several processes (`jax.distributed`) all make it, and the leader writes and shows.

    Args:
      config: from a config file, or `config.parse`d already.
      workdir: for checkpoints, metrics, results and exports.
      teacher: any `teachers.protocol.Teacher`, instead of the config's.

    Raises:
      UserError: config, data or models are not right (exit code 2).
      TrainingFailure: a loss is not finite, or a server's answer is wrong (3); the last good
        checkpoint stays.
      TeacherUnreachable: a server stays away (4); the state is saved.
      Preempted: SIGTERM came; the state is saved (75).
    """
    config = config if isinstance(config, Config) else parse(config)
    shared = pathlib.Path(workdir)
    with (
        processes.own_directory(shared) as own,
        workdirs.held(own),
        processes.quiet_unless_leading(),
    ):
        return _run_in(own, shared, config, teacher)


def _run_in(
    workdir: pathlib.Path, shared: pathlib.Path, config: Config, teacher: Teacher | None
) -> dict:
    """See `processes.own_directory` for the two directories."""
    began = time.monotonic()
    workdirs.claim(workdir, config)
    config = processes.shown_by_leader(config)
    finished = workdirs.read_json(workdir / "results.json")
    if finished is not None:
        print(results.render(finished, workdir))
        if not (workdir / "report.html").exists():  # killed between the two
            report.write_html(workdir)
        return finished

    # Part of every program's identity: set here, once, for all of them.
    with (
        jax.default_matmul_precision(config.train.matmul_precision),
        contextlib.ExitStack() as connections,
    ):
        rows = rows_of_run.read(config, workdir, teacher, connections, shared)
        if teacher is None and config.teacher.offline:
            steps = rows_of_run.total_steps(config, len(rows.feed))
            fill_store.require_filled(config, workdir, rows.teacher, steps)
        room.require(rows)
        found = _run(assemble(rows, workdir), workdir, shared, began)
    print(results.render(found, workdir))
    workdirs.write_json(workdir / "results.json", found)
    report.write_html(workdir)
    return found


def _run(parts: Run, workdir: pathlib.Path, shared: pathlib.Path, began: float) -> dict:
    print(f"{parts.config.student.model}: a response ends with {parts.chat.stop_tokens()}")
    ending = export.Ending(parts.chat.stop_ids, parts.chat.pad_id)
    workdirs.write_json(workdir / export.ENDING, ending._asdict())  # `tools.export_hf` reads it
    with _told_if_the_teacher_fails("No step was made yet"):
        training_text.write_first(parts, workdir)
    feeds = training_text.feeds(parts).items()
    workdirs.claim_rows(workdir, {name: feed.fingerprint() for name, feed in feeds})
    before = workdirs.read_json(workdir / "before.json")
    if before is None:
        base = Reader.of(parts.decoder, parts.base, parts.chat, parts.config.teacher.prefix_bytes)
        base.prefixes.learn(parts.prompts_by_prefix)  # it is asked what it says with the prefix
        with _told_if_the_teacher_fails("No step was made yet"):
            before = parts.evaluation.before(base)
        del base  # or a full fine-tuning would hold the untrained parameters to its end
        before["task"] = examples_of_run.fingerprints(parts.examples)
        workdirs.write_json(workdir / "before.json", before)
    write_lines(workdir / "answers.jsonl", before["answers"])
    state, training = _train(parts, workdir, shared)
    with _told_if_the_teacher_fails("All steps are made and saved"):
        student = _reader(parts, state, parts.config.teacher.prefix_bytes)
        student.prefixes.learn(parts.prompts_by_prefix)
        after = parts.evaluation.after(student)
    write_lines(workdir / "answers.jsonl", before["answers"] + after["answers"])
    training["exports"] = _export(parts, state, workdir, ending)
    report.draw(workdir)
    training["seconds"] = time.monotonic() - began
    if isinstance(parts.teacher, HttpTeacher):
        training["teacher"] = parts.teacher.report()
    if parts.examples.dropped:
        training["dropped_rows"] = parts.examples.dropped
    rows = {name: feed.report() for name, feed in training_text.feeds(parts).items()}
    on_the_way = read_lines(workdir / "eval.jsonl")
    return results.collect(before, on_the_way, after, rows, training)


def _train(parts: Run, workdir: pathlib.Path, shared: pathlib.Path) -> tuple[TrainState, dict]:
    """From the newest checkpoint, or from the start, to the last step."""
    config = parts.config
    steps = rows_of_run.total_steps(config, len(parts.feed))
    optimizer = optim.optimizer(config.optim, steps)
    schedule = optim.schedule(config.optim, steps)
    step_function = make_train_step(parts.decoder, optimizer, schedule, config, parts.mesh)
    measured = measured_steps(config.eval, steps)
    kept = measured if config.checkpoint.keep_evaluated else set()
    checkpoints = Checkpoints(shared, config.checkpoint.keep, sorted(kept))
    state = initial_state(parts, optimizer)
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored
        logging.info("continuing from step %d", int(state.step))
    first = int(state.step)
    if not parts.keeps_base and parts.frozen is None:
        parts.base = None  # a full fine-tuning that nobody compares with its start
    text = training_text.TrainingText(parts, workdir, first, steps)
    batches, stopping = Ahead(parts, text, steps), processes.Stopping(parts.mesh)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(Recorder(workdir, first, steps, config.log)) as record,
        contextlib.closing(Schedule(parts, workdir, first, measured)) as evaluate,
        _stop_signal() as stop,
    ):
        if isinstance(parts.teacher, HttpTeacher):
            parts.teacher.pool.stopped = stop  # an answer may be minutes away
        for step in range(first, steps):
            with _saved_if_the_teacher_fails(step, first, steps, state, record, checkpoints):
                evaluate.if_due(step, state, record)
                batch, targets, anchors, drawn = batches.take(step, state)
            state, sums = step_function(
                state, parts.frozen, batch, targets, anchors, divergence=drawn.divergence
            )
            tokens = int(drawn.batch.student_mask_BS.sum())
            counts = drawn.counts | {"tokens": tokens, "batch_crc32": _crc32(drawn.batch)}
            record.dispatched(step, sums, drawn.divergence, counts)
            last = step + 1 == steps
            due = (step + 1) % config.checkpoint.every_steps == 0 or step + 1 in kept
            stopped = stopping.asked(stop.is_set())
            if last or due or stopped:
                record.read()  # a state is saved only once its own numbers are known to be finite
                checkpoints.save(state)
            if stopped and not last:
                checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM, saved at step {step + 1}; run again")
        checkpoints.wait()
        with _told_if_the_teacher_fails("All steps are made and saved"):
            evaluate.if_due(steps, state, record)
    return state, content.training(read_lines(workdir / "metrics.jsonl"))


def measured_steps(c: Eval, steps: int) -> set[int]:
    """Numbers of steps done at which the student is measured: the first, the last, and between."""
    past = sorted(step for step in c.at_steps if step > steps)
    if past:
        logging.warning("eval.at_steps: the run has %d steps and never gets to %s", steps, past)
    every = range(0, steps, c.every_steps) if c.every_steps else ()
    return {0, steps, *every, *c.at_steps} - set(past)


class Schedule:
    """Evaluates before the first step, at the steps of the schedule and after the last."""

    def __init__(self, parts: Run, workdir: pathlib.Path, first_step: int, measured: set[int]):
        self._parts, self._measured = parts, measured
        # A line is written before its step's checkpoint may be: after a restart it stands.
        first, tensorboard = first_step + 1, parts.config.log.tensorboard
        self._samples = MetricsWriter(workdir / "samples.jsonl", first, tensorboard=False)
        self._writer = MetricsWriter(workdir / "eval.jsonl", first, tensorboard, group="eval/")
        # As the writers have left them; a step's line of samples is its last.
        self._done = _steps(workdir / "samples.jsonl")
        self._written = _steps(workdir / "eval.jsonl")

    def if_due(self, step: int, state: TrainState, record: Recorder) -> None:
        """Measures the state that `step` steps have made, if that is to be and was not done yet."""
        if step not in self._measured or step in self._done:
            return
        record.read()
        student = _reader(self._parts, state, prefix_bytes=0)
        found = self._parts.evaluation.on_the_way(student)
        if found and step not in self._written:
            self._writer.write(step, found)
        self._samples.write(step, {"answers": self._parts.evaluation.samples(student)})
        record.restart_clock()

    def close(self) -> None:
        self._writer.close()
        self._samples.close()


def _steps(path: pathlib.Path) -> set[int]:
    return {line["step"] for line in read_lines(path)}


def _reader(parts: Run, state: TrainState, prefix_bytes: int) -> Reader:
    """The student as it would be exported now; merged, so that the base's programs serve again."""
    params = state.trainable
    if parts.frozen is not None:
        places = parts.decoder.layout.places(parts.frozen)
        params = jax.device_put(lora.merge(parts.frozen, state.trainable), places)
    return Reader.of(parts.decoder, params, parts.chat, prefix_bytes)


def _crc32(batch: Batch) -> int:
    """A fingerprint of a batch: two runs whose text or order differs show where it begins."""
    found = 0
    for leaf in jax.tree.leaves(batch):
        found = zlib.crc32(np.ascontiguousarray(leaf), found)
    return found


def _export(
    parts: Run, state: TrainState, workdir: pathlib.Path, ending: export.Ending
) -> list[str]:
    config, spec = parts.config, parts.decoder.spec
    source, wanted = parts.directory, config.train.export
    written = []
    if wanted in ("merged", "both"):
        adapters = None if parts.frozen is None else state.trainable
        params = state.trainable if parts.frozen is None else parts.frozen
        export.export_merged(workdir / "merged", spec, params, adapters, source, ending=ending)
        written.append("merged/")
    if wanted in ("adapter", "both"):
        base = models_of_run.base_name(config.student.model, workdir)
        export.export_adapter(workdir / "adapter", spec, state.trainable, source, base, ending)
        written.append("adapter/")
    return written


@contextlib.contextmanager
def _told_if_the_teacher_fails(how_far: str):
    """Where there is nothing to save."""
    try:
        yield
    except _TEACHER_FAILS as error:
        raise type(error)(f"{error}. {how_far}{_goes_on(error)}") from None


def _goes_on(error: GkdjaxError) -> str:
    """The end of a sentence; a UserError is to be mended first, and that may be in the config."""
    return "" if isinstance(error, UserError) else "; the same command goes on from there"


@contextlib.contextmanager
def _saved_if_the_teacher_fails(
    step: int,
    first: int,
    steps: int,
    state: TrainState,
    record: Recorder,
    checkpoints: Checkpoints,
):
    """Nothing that was learnt is lost with a server: the steps before `step` are saved."""
    try:
        yield
    except _TEACHER_FAILS as error:
        record.read()
        if step > first:
            checkpoints.save(state)
            checkpoints.wait()
        saved = f", and is saved{_goes_on(error)}" if step else ""
        raise type(error)(f"{error}. The run got to step {step} of {steps}{saved}") from None


@contextlib.contextmanager
def _stop_signal():
    """An event that SIGTERM sets; the old handler is back afterwards."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python delivers signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
