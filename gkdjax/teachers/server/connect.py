"""From the config to a teacher behind HTTP: tried first, or known from the store."""

import base64
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

import jax
from absl import logging

from gkdjax.config import Teacher
from gkdjax.data.chat_template import Chat
from gkdjax.parallel import multihost
from gkdjax.report.run_files import load
from gkdjax.teachers.base import Capabilities
from gkdjax.teachers.server.dialects import openai, sglang, vllm
from gkdjax.teachers.server.preflight import Findings, Server, examine, probe_again
from gkdjax.teachers.server.scheduler import Pool, Suspects
from gkdjax.teachers.server.store import codec
from gkdjax.teachers.server.store.answers import AnswerStore
from gkdjax.teachers.server.store.fingerprint import TeacherIdentity, fingerprint_of, same_teacher
from gkdjax.teachers.server.teacher import ServerTeacher
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.types import ContextLimit, SamplingParams
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import write_json, writing

# teacher.backend -> the dialects that are tried, in this order.
DIALECTS = {
    "vllm": {"prompt_logprobs": vllm.PromptLogprobs, "echo": vllm.EchoLogprobs},
    "sglang": {"generate": sglang.Generate},
    "openai": {
        "completions_by_id": openai.CompletionsById,
        "completions": openai.Completions,
        "chat_by_id": openai.ChatById,
        "chat": openai.Chat,
    },
}


def declared(c: Teacher) -> Capabilities:
    """What a server can do at best, before it is asked."""
    limits = "teacher.offline=True: the store holds what was asked ahead of the run"
    can = Capabilities(max_top_k=c.top_k, dense=False, samples=True, temperature=False)
    return dataclasses.replace(can, on_policy=False, limits=limits) if c.offline else can


def connect(
    c: Teacher, chat: Chat, vocab_size: int, workdir: pathlib.Path, shared: pathlib.Path, **how
) -> ServerTeacher:
    """Tries the server of a config, or, offline, finds it in the store.

    Args:
      c: with a backend of `DIALECTS`.
      chat: renders the teacher's view; a server with another tokenizer is refused.
      vocab_size: limit of the ids that the server may name, see `train.models.ids_of_server`.
      workdir: of the run; its teacher.json says with which weights it began.
      shared: the run's directory, where the stores of all processes are.
      how: the run's `sampling`, and `data.template_kwargs` for a server that renders the prompt.

    Raises:
      UserError: the server cannot be used, has other weights than the run began with, or is not
        in the store.
      TeacherUnreachable: it does not answer.
    """
    path = shared / "answers.sqlite" if c.store == "" else c.store

    def open_own() -> ServerTeacher:
        own = None if path is None else file_of_process(path, jax.process_index())
        return _connect(c, chat, vocab_size, workdir, own, **how)

    if path is None:
        with multihost.fail_together():
            return open_own()
    # The leader first: answers to the probe differ a little each time, and all processes have to
    # know the server by the same one.
    multihost.on_leader(lambda: gather_answers(path))
    leaders = multihost.on_leader(open_own)
    multihost.on_leader(lambda: spread_answers(path))
    with multihost.fail_together():
        return leaders or open_own()


def file_of_process(path: str | pathlib.Path, number: int) -> pathlib.Path:
    """STORE.1.sqlite for process 1, as a file is for one machine; STORE.sqlite for the leader."""
    path = pathlib.Path(path)
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def gather_answers(path: str | pathlib.Path) -> None:
    """Copies into the leader's store what others hold, also of an earlier start with more."""
    path = pathlib.Path(path)
    name = re.compile(rf"{re.escape(path.stem)}\.\d+{re.escape(path.suffix)}")
    for other in sorted(path.parent.glob("*")):
        if name.fullmatch(other.name):
            _copy_answers(other, path)


def spread_answers(path: str | pathlib.Path) -> None:
    """Copies what the leader's store holds into those of all other processes of this run."""
    for number in range(1, jax.process_count()):
        _copy_answers(pathlib.Path(path), file_of_process(path, number))


def _copy_answers(source: pathlib.Path, target: pathlib.Path) -> None:
    with AnswerStore(source, read_only=True) as held, AnswerStore(target) as store:
        for teacher in held.teachers():
            store.add_teacher(teacher)
        for one in held.all():
            if not store.get([one.key]):
                store.put(one.fingerprint, [(one.key, one.kind, one.answer)])


def _connect(
    c: Teacher,
    chat: Chat,
    vocab_size: int,
    workdir: pathlib.Path,
    path: pathlib.Path | None,
    *,
    sampling: SamplingParams,
    template_kwargs: dict,
) -> ServerTeacher:
    first = workdir / "teacher.json"
    vocabulary = sorted(chat.tokenizer.get_vocab().items())
    tokenizer = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    with contextlib.ExitStack() as after_error:
        store = transport = probe = None
        if path is not None:
            store = after_error.enter_context(AnswerStore(path))
        known = store.teachers() if store else []
        if c.offline:
            teacher = _stored_teacher(c, known, tokenizer, first)
        else:
            limits = Limits(c.timeout_s, c.deadline_s, c.max_retries)
            transport = Transport(c.api_base, c.api_key_env, limits, trust_env=c.trust_env)
            after_error.enter_context(contextlib.closing(transport))
            # By another dialect, the answers to the probe would be others.
            only = next((t.findings["dialect"] for t in _began_with(first, known)), None)
            server = try_server(c, transport, chat, vocab_size, sampling, only)
            probe = functools.partial(probe_again, transport, server, chat)
            teacher = _identify(server, known, tokenizer)
            if store:
                store.add_teacher(teacher)
        _require_first(first, teacher)
        after_error.pop_all()
    findings = Findings(**teacher.findings)
    dialect = DIALECTS[c.backend][findings.dialect](findings.model, vocab_size, chat.tokenizer)
    suspects = Suspects(file_of_process(workdir / "teacher_ended_at.json", jax.process_index()))
    pool = Pool(
        *(dialect, transport, store, teacher, suspects),
        probe=probe,
        concurrency=c.concurrency,
        max_unreadable=c.max_unreadable,
    )
    can = declared(c)
    if not findings.scores:
        can = dataclasses.replace(can, scores=False, on_policy=False, limits=findings.limits)
    # Older stores lack the source.
    source = f"{findings.context_source or 'as its server said'}, {c.api_base}"
    return ServerTeacher(
        pool=pool,
        chat=chat,
        description=f"{findings.model} ({c.backend}, {teacher.fingerprint[:12]})",
        capabilities=can,
        top_k=c.top_k,
        context=ContextLimit(findings.context_length, source, findings.context_written),
        template_kwargs=template_kwargs,
    )


def try_server(
    c: Teacher,
    transport: Transport,
    chat: Chat,
    vocab_size: int,
    sampling: SamplingParams,
    only: str | None = None,
) -> Server:
    """The preflight of a config, see `preflight.examine`; `only`: by this dialect, if it is one."""
    dialects = DIALECTS[c.backend]
    dialects = {only: dialects[only]} if only in dialects else dialects
    how = chat, vocab_size, c.top_k, sampling
    return examine(transport, c.api_model, dialects, *how, must_score=c.backend != "openai")


def _identify(server: Server, known: Sequence[TeacherIdentity], tokenizer: str) -> TeacherIdentity:
    """The teacher, with fingerprint and probe as it is known, or new ones."""
    model, probe = server.findings.model, server.probe
    same_names = [t for t in known if (t.model, t.tokenizer) == (model, tokenizer)]
    # Always the first: two processes may have added the same new teacher at the same time.
    for found in same_names:
        if same_teacher(found.probe, probe):
            fingerprint, probe = found.fingerprint, found.probe
            break
    else:
        fingerprint = fingerprint_of(model, tokenizer, probe)
        others = [t for t in same_names if t.probe.top_ids.shape[1] == probe.top_ids.shape[1]]
        if others:
            logging.warning(
                "%s answers otherwise than when the store was filled: it has other weights now, and"
                " the answers of %d earlier ones are not used",
                *(model, len(others)),
            )
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    findings = dataclasses.asdict(server.findings)
    return TeacherIdentity(fingerprint, model, tokenizer, probe, findings, now)


def _stored_teacher(
    c: Teacher, known: Sequence[TeacherIdentity], tokenizer: str, first: pathlib.Path
) -> TeacherIdentity:
    """The teacher that the run began with, or else the one of this name that was checked last."""
    fitting = [
        teacher
        for teacher in known
        if c.api_model in ("", teacher.model)
        and teacher.tokenizer == tokenizer
        and teacher.findings["dialect"] in DIALECTS[c.backend]
        and teacher.probe.top_ids.shape[1] == c.top_k
    ]
    fitting = _began_with(first, fitting) or fitting
    if len({teacher.model for teacher in fitting}) == 1:
        return max(fitting, key=lambda teacher: teacher.checked)
    names = sorted({teacher.model for teacher in known})
    raise UserError(
        f"config.teacher.offline: the store has the teachers {names}, of which"
        f" {len(fitting)} fit config.teacher.backend = {c.backend!r}, .top_k = {c.top_k},"
        f" .api_model = {c.api_model!r} and the tokenizer; name one in .api_model, or fill the"
        " store first with python -m gkdjax.tools.cache_teacher"
    )


def _began_with(path: pathlib.Path, teachers: Sequence[TeacherIdentity]) -> list[TeacherIdentity]:
    """Those of the teachers with which a run began; none if it has not begun."""

    def parse(found: dict) -> dict:
        return found | {"probe": codec.decode(base64.b64decode(found["probe"]))}

    if (first := load(path, parse)) is None:
        return []
    own = (teacher for teacher in teachers if teacher.model == first["model"])
    return [teacher for teacher in own if same_teacher(first["probe"], teacher.probe)]


def _require_first(path: pathlib.Path, teacher: TeacherIdentity) -> None:
    """Raises UserError if a run began with other weights; else writes with which it begins."""
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        probe = base64.b64encode(codec.encode(teacher.probe)).decode()
        write_json(path, {"model": teacher.model, "probe": probe})
    elif not _began_with(path, [teacher]):
        raise UserError(
            f"the run in {path.parent} began with other weights than {teacher.model} has now; serve"
            " those again, or give --workdir another directory"
        )
