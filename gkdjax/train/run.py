"""The one loop: assemble, ask the base, train, ask the student, hand over."""

import contextlib
import dataclasses
import pathlib
import time

import jax
from ml_collections import config_dict

from gkdjax import report
from gkdjax.config import Config, Log, parse
from gkdjax.data import load
from gkdjax.evaluation.scoring import EvalModel
from gkdjax.models.hf import export
from gkdjax.parallel import multihost
from gkdjax.parallel.multihost import leads
from gkdjax.rollout.schedule import needs_teacher_text
from gkdjax.rollout.teacher import prepare
from gkdjax.teachers.base import Teacher, hooks
from gkdjax.train import offline, setup
from gkdjax.train import workdir as workdirs
from gkdjax.train.evals import reader
from gkdjax.train.loop import told_if_the_teacher_fails, train
from gkdjax.train.planning import check
from gkdjax.train.setup import Run, RunInputs, assemble
from gkdjax.types import TrainState
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_json, read_lines, write_json, write_lines


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
      teacher: any `teachers.base.Teacher`, instead of the config's.

    Raises:
      UserError: config, data or models are not right (exit code 2).
      TrainingFailure: too many steps in a row were not finite, or a server's answer is wrong (3);
        the last good checkpoint stays.
      TeacherUnreachable: a server stays away (4); the state is saved.
      Preempted: SIGTERM came; the state is saved (75).
    """
    config = config if isinstance(config, Config) else parse(config)
    shared = pathlib.Path(workdir)
    with (
        multihost.own_directory(shared) as own,
        workdirs.held(own),
        multihost.quiet_unless_leading(),
    ):
        return _run_in(own, shared, config, teacher)


def _run_in(
    workdir: pathlib.Path, shared: pathlib.Path, config: Config, teacher: Teacher | None
) -> dict:
    """See `parallel.multihost.own_directory` for the two directories."""
    began = time.monotonic()
    workdirs.claim(workdir, config)
    finished = read_json(workdir / "results.json")
    if finished is not None:
        return _show(finished, workdir)
    config = shown_by_leader(config)
    # Part of every program's identity: set here, once, for all of them.
    with (
        jax.default_matmul_precision(config.train.matmul_precision),
        contextlib.ExitStack() as connections,
    ):
        inputs = setup.read(config, workdir, teacher, connections, shared)
        if teacher is None and config.teacher.offline:
            steps = setup.total_steps(config, len(inputs.feed))
            offline.require_filled(config, workdir, inputs.teacher, steps)
        check.check_memory(inputs)
        found = _run(assemble(inputs, workdir), workdir, shared, began)
    print(report.render(found, workdir))
    write_json(workdir / "results.json", found)
    report.write_html(workdir)
    return found


def _show(finished: dict, workdir: pathlib.Path) -> dict:
    """A run that is done already."""
    print(report.render(finished, workdir))
    if not (workdir / "report.html").exists():  # killed between the two
        report.write_html(workdir)
    return finished


def _run(parts: Run, workdir: pathlib.Path, shared: pathlib.Path, began: float) -> dict:
    chat = parts.inputs.sources.chat
    print(f"{parts.inputs.config.student.model}: a response ends with {chat.stop_tokens()}")
    ending = export.Ending(chat.stop_ids, chat.pad_id)
    write_json(workdir / export.ENDING, ending._asdict())  # `tools.export_hf` reads it
    with told_if_the_teacher_fails("No step was made yet"):
        parts.inputs = with_first_text(parts, workdir)
    if parts.inputs.validation is not None:
        parts.evaluation = parts.evaluation.with_validation(parts.inputs.validation)
    streams = parts.inputs.streams().items()
    workdirs.claim_rows(workdir, {name: dataset.fingerprint() for name, dataset in streams})
    before = _before(parts, workdir)
    with workdirs.failure_kept(workdir):
        state, training = train(parts, workdir, shared)
    after = _after(parts, state)
    write_lines(workdir / "answers.jsonl", before["answers"] + after["answers"])
    training["exports"] = _export(parts, state, workdir, ending)
    report.draw(workdir)
    training["seconds"] = time.monotonic() - began
    if counts := hooks(parts.teacher).report():
        training["teacher"] = counts
    if parts.inputs.examples.dropped:
        training["dropped_rows"] = parts.inputs.examples.dropped
    rows = {name: dataset.report() for name, dataset in streams}
    return report.collect(before, read_lines(workdir / "eval.jsonl"), after, rows, training)


def _before(parts: Run, workdir: pathlib.Path) -> dict:
    """What base and teacher say, once for all starts of the run."""
    before = read_json(workdir / "before.json")
    if before is None:
        prefix_bytes = parts.inputs.config.teacher.prefix_bytes
        base = EvalModel.of(parts.decoder, parts.base, parts.inputs.sources.chat, prefix_bytes)
        base.prefixes.register(parts.inputs.prompts_by_prefix)  # it is asked with the prefix, too
        with told_if_the_teacher_fails("No step was made yet"):
            before = parts.evaluation.before(base)
        before["task"] = load.fingerprints(parts.inputs.examples)
        write_json(workdir / "before.json", before)
    write_lines(workdir / "answers.jsonl", before["answers"])
    return before


def _after(parts: Run, state: TrainState) -> dict:
    """What the trained student says."""
    with told_if_the_teacher_fails("All steps are made and saved"):
        student = reader(parts, state, parts.inputs.config.teacher.prefix_bytes)
        student.prefixes.register(parts.inputs.prompts_by_prefix)
        return parts.evaluation.after(student)


def _export(
    parts: Run, state: TrainState, workdir: pathlib.Path, ending: export.Ending
) -> list[str]:
    config, spec = parts.inputs.config, parts.decoder.spec
    source, wanted = parts.inputs.sources.student, config.train.export
    written = []
    if wanted in ("merged", "both"):
        adapters = None if parts.frozen is None else state.trainable
        params = state.trainable if parts.frozen is None else parts.frozen
        export.export_merged(workdir / "merged", spec, params, adapters, source, ending=ending)
        written.append("merged/")
    if wanted in ("adapter", "both"):
        base = workdirs.base_name(config.student.model, workdir)
        export.export_adapter(workdir / "adapter", spec, state.trainable, source, base, ending)
        written.append("adapter/")
    return written


def shown_by_leader(config: Config) -> Config:
    """Bars and TensorBoard files are the leader's alone."""
    if leads():
        return config
    return dataclasses.replace(config, log=Log(tensorboard=False, progress_bar=False))


def with_first_text(parts: Run, workdir: pathlib.Path) -> RunInputs:
    """With the first off-policy text, by the teacher of each stream; without such steps, none.

    Raises:
      UserError: something is asked of the teacher's text, and the teacher writes none.
    """
    inputs = parts.inputs
    config = inputs.config
    _check_use(inputs)
    streams = inputs.streams()
    for name, dataset in streams.items():
        teacher = parts.anchor_teacher if name in inputs.anchor_feeds else parts.teacher
        if name != "train" or needs_teacher_text(config.gkd):
            how = teacher, workdir, parts.shared_vocab
            streams[name] = prepare(config, name, dataset, *how)
    return dataclasses.replace(
        inputs,
        feed=streams.pop("train"),
        validation=streams.pop("validation", None),
        anchor_feeds=streams,
    )


def _check_use(inputs: RunInputs) -> None:
    c = inputs.config.rollout
    if needs_teacher_text(inputs.config.gkd) and inputs.feed.needs_responses():
        return
    for key, value in (("refresh_every_steps", c.refresh_every_steps), ("reuse", c.reuse)):
        if value:
            raise UserError(
                f"config.rollout.{key} = {value!r} is for the teacher's text, and this run needs"
                " none: every row has a response, or all batches are the student's. Leave it out"
            )
