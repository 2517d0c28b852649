"""The phases of a run: set up, ask the base, train, ask the student, export."""

import contextlib
import dataclasses
import os
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
from gkdjax.report.run_files import load as load_file
from gkdjax.rollout.schedule import needs_teacher_text
from gkdjax.rollout.teacher import prepare
from gkdjax.teachers.base import Teacher, hooks
from gkdjax.train import checkpoint, offline, setup
from gkdjax.train import workdir as workdirs
from gkdjax.train.evals import eval_model
from gkdjax.train.loop import message_if_teacher_fails, train
from gkdjax.train.places import Places, open_places
from gkdjax.train.planning import check
from gkdjax.train.setup import Run, RunInputs, assemble
from gkdjax.train.stopping import StopRequest
from gkdjax.types import TrainState
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import read_lines, write_json, write_lines


def run(
    config: config_dict.ConfigDict | Config,
    workdir: str | os.PathLike,
    teacher: Teacher | None = None,
) -> dict:
    """Distils as the config says -> the content of results.json.

    The same call on the same directory continues an interrupted run and shows a finished one. In
    a run of several processes (`jax.distributed`) all call it, and the leader writes and shows.

    Args:
      config: from a config file, or `config.parse`d already.
      workdir: for checkpoints, metrics, results and exports; a path, or gs://BUCKET/RUN.
      teacher: any `teachers.base.Teacher`, instead of the config's.

    Raises:
      UserError: config, data or models are not right (exit code 2).
      TrainingFailure: too many steps in a row were not finite, or a server's answer is wrong (3);
        the last good checkpoint stays.
      TeacherUnreachable: a server stays away (4); the state is saved.
      NotWritten: the disk takes no more, and there is no checkpoint yet (2).
      Preempted: SIGTERM or SIGHUP came, or train.max_seconds are over, and the state is saved; or
        the disk takes no more, and there is a checkpoint (75).
      Interrupted: the same by Ctrl-C (130).
      StorageUnreachable: the bucket of `workdir` stays away (75).
    """
    config = config if isinstance(config, Config) else parse(config)
    stop, asks = StopRequest(), teacher is None and config.teacher.is_server
    with (
        stop.listening(config.train.max_seconds),
        checkpoint.continuable(workdir),
        open_places(workdir, stop, asks) as places,
        multihost.quiet_unless_leading(),
    ):
        return _run_in(places, config, teacher, stop)


def _run_in(places: Places, config: Config, teacher: Teacher | None, stop: StopRequest) -> dict:
    began, workdir = time.monotonic(), places.own
    workdirs.claim(workdir, config)
    found = load_file(workdir / "results.json")
    if found is not None:  # a finished run is shown
        print(report.render(found, places.run))
        if not (workdir / "report.html").exists():  # killed between the two
            report.write_html(workdir)
        return found
    if not multihost.leads():  # bars and TensorBoard files are the leader's alone
        config = dataclasses.replace(config, log=Log(tensorboard=False, progress_bar=False))
    # The precision is part of every program's identity: set here, once, for all of them.
    with (
        jax.default_matmul_precision(config.train.matmul_precision),
        contextlib.ExitStack() as connections,
    ):
        inputs = setup.read(config, workdir, teacher, connections, places.shared)
        if teacher is None and config.teacher.offline:
            steps = setup.total_steps(config, len(inputs.dataset))
            offline.require_filled(config, workdir, inputs.teacher, steps)
        check.check_memory(inputs)
        check.check_disk(inputs, places.run, setup.total_steps(config, len(inputs.dataset)))
        found = _distil(assemble(inputs, workdir), places, stop)
        found["seconds"] = time.monotonic() - began
        write_json(workdir / "results.json", found)
        print(report.render(found, places.run))
        report.write_html(workdir)
    return found


def _distil(run: Run, places: Places, stop: StopRequest) -> dict:
    chat, workdir = run.inputs.sources.chat, places.own
    print(f"{run.inputs.config.student.model}: a response ends with {chat.stop_tokens()}")
    ending = export.Ending(chat.stop_ids, chat.pad_id)
    write_json(workdir / export.ENDING, ending._asdict())  # `tools.export_hf` reads it
    with message_if_teacher_fails("No step was made yet"):
        run.inputs = with_first_responses(run, workdir)
    if run.inputs.validation is not None:
        run.evaluation = run.evaluation.with_validation(run.inputs.validation)
    datasets = run.inputs.datasets()
    workdirs.claim_rows(workdir, {name: rows.fingerprint() for name, rows in datasets.items()})
    before = _before(run, workdir)
    with workdirs.failure_kept(workdir):
        state, training = train(run, places, stop)
    with message_if_teacher_fails("All steps are made and saved"):
        student = eval_model(run, state, run.inputs.config.teacher.prefix_bytes)
        student.prefixes.register(run.inputs.prompts_by_prefix)
        after = run.evaluation.after(student)
    write_lines(workdir / "answers.jsonl", before["answers"] + after["answers"])
    training["exports"] = _export(run, state, workdir, ending)
    report.draw(workdir)
    if counts := hooks(run.teacher).report():
        training["teacher"] = counts
    if run.inputs.examples.dropped:
        training["dropped_rows"] = run.inputs.examples.dropped
    rows = {name: dataset.report() for name, dataset in datasets.items()}
    return report.collect(before, read_lines(workdir / "eval.jsonl"), after, rows, training)


def _before(run: Run, workdir: pathlib.Path) -> dict:
    """Evaluates base and teacher, once for all starts of the run."""
    before = load_file(workdir / "before.json")
    if before is None:
        prefix_bytes = run.inputs.config.teacher.prefix_bytes
        base = EvalModel.of(run.decoder, run.base, run.inputs.sources.chat, prefix_bytes)
        base.prefixes.register(run.inputs.prompts_by_prefix)  # it is asked with the prefix, too
        with message_if_teacher_fails("No step was made yet"):
            before = run.evaluation.before(base)
        before["task"] = load.fingerprints(run.inputs.examples)
        write_json(workdir / "before.json", before)
    write_lines(workdir / "answers.jsonl", before["answers"])
    return before


def _export(run: Run, state: TrainState, workdir: pathlib.Path, ending: export.Ending) -> list[str]:
    config, spec, source = run.inputs.config, run.decoder.spec, run.inputs.sources.student
    adapters = None if run.frozen is None else state.trainable
    written = []
    if config.train.export in ("merged", "both"):
        params = state.trainable if run.frozen is None else run.frozen
        export.export_merged(workdir / "merged", spec, params, adapters, source, ending=ending)
        written.append("merged/")
    if config.train.export in ("adapter", "both"):
        base = workdirs.base_name(config.student.model, workdir)
        export.export_adapter(workdir / "adapter", spec, adapters, source, base, ending)
        written.append("adapter/")
    return written


def with_first_responses(run: Run, workdir: pathlib.Path) -> RunInputs:
    """Has the teacher of each dataset write the responses that the first steps need.

    Raises:
      UserError: something is asked of the teacher's text, and the teacher writes none.
    """
    inputs, config = run.inputs, run.inputs.config
    off_policy = needs_teacher_text(config.gkd)
    if not (off_policy and inputs.dataset.needs_responses()):
        for key in ("refresh_every_steps", "reuse"):
            if value := getattr(config.rollout, key):
                raise UserError(
                    f"config.rollout.{key} = {value!r} is for the teacher's text, and this run"
                    " needs none: every row has a response, or all batches are the student's."
                    " Leave it out"
                )
    datasets = inputs.datasets()
    for name, dataset in datasets.items():
        teacher = run.anchor_teacher if name in inputs.anchors else run.teacher
        if name != "train" or off_policy:
            how = teacher, workdir, run.shared_vocab
            datasets[name] = prepare(config, name, dataset, *how)
    train, validation = datasets.pop("train"), datasets.pop("validation", None)
    return dataclasses.replace(inputs, dataset=train, validation=validation, anchors=datasets)
