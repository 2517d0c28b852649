"""Everything a run needs, made from its config: chats and rows first, then weights."""

import dataclasses
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gkdjax import examples_of_run, lora, models_of_run, seeds, sharding
from gkdjax.config import Config, anchor_sets, rows_at_once
from gkdjax.curriculum import needs_teacher_text
from gkdjax.data import row_lengths, shapes
from gkdjax.data.chat import Chat
from gkdjax.data.history import answers_apart
from gkdjax.data.targets import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.errors import UserError
from gkdjax.evaluate import Evaluation
from gkdjax.examples_of_run import Examples
from gkdjax.feed import Feed
from gkdjax.hf import model_config
from gkdjax.models.decoder import Decoder
from gkdjax.models_of_run import InProcess, Sources
from gkdjax.sampler import Sampling
from gkdjax.teachers import toggle
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.teachers.protocol import Teacher, refusals
from gkdjax.train_step import init_state
from gkdjax.trajectories.rules import ResponseRules
from gkdjax.types import Example, TrainState

_MOST_PADDING = 0.2  # of either view; with more, rows of data.train share batches by length


@dataclasses.dataclass
class Run:
    """The parts of a run; `loop` puts them in motion."""

    config: Config
    mesh: Mesh
    directory: pathlib.Path  # of the student, its source
    chat: Chat
    decoder: Decoder
    base: dict | None  # the untrained student; None once a full fine-tuning needs it no more
    frozen: dict | None  # what adapters stand on; None in a full fine-tuning
    start: dict | None  # adapters to begin with; None: fresh ones
    teacher: Teacher
    feed: Feed
    anchor_feeds: dict[str, Feed]  # by name, see `config.anchor_sets`
    anchor_teacher: Teacher | None
    evaluation: Evaluation
    sampling: Sampling
    keeps_base: bool  # somebody reads the base during training
    prompts_by_prefix: list[list[np.ndarray]]  # the teacher's
    shared_vocab: int  # ids below it have a row in the student's embedding and in the teacher's


def assemble(config: Config, workdir: pathlib.Path, teacher: Teacher | None) -> Run:
    """Reads data, tokenizers and weights, and checks that they fit each other.

    Args:
      config: checked by itself.
      workdir: the run's directory.
      teacher: instead of the config's, or None.

    Raises:
      UserError: whatever does not fit, named.
    """
    if teacher is not None and not isinstance(teacher, Teacher):
        raise UserError(f"{teacher!r} is no teacher: see gkdjax.teachers.protocol.Teacher")
    mesh = sharding.data_mesh()
    for key, rows in rows_at_once(config).items():
        sharding.check_rows(mesh, key, rows)
    lengths = _ladder(config)
    examples = examples_of_run.read(config)

    sources = models_of_run.find(config, workdir, teacher)
    chat = sources.chat
    rules = _view_rules(config, chat, sources.teacher_chat)
    contexts = _contexts(config, sources, teacher)
    asked, limit = _asked(examples), config.eval.max_new_tokens
    row_lengths.require_contexts(asked, rules, limit, contexts)
    rows = config.train.batch_size
    feed = _feed(config, "data.train", examples.train, rules, rows, contexts)
    if config.gkd.on_policy_fraction > 0:  # the student writes to rows with a response, too
        unanswered = [dataclasses.replace(row, response=None) for row in feed.rows()]
        limit = config.trajectory.max_new_tokens
        row_lengths.require_contexts(unanswered, rules, limit, contexts)
    toggles = teacher is None and config.teacher.backend == "local-toggle"
    if toggles and not (config.teacher.adapter or config.student.lora.start_from):
        toggle.require_longer_view(feed.views_differ())

    decoder, frozen = models_of_run.load(config, sources.student, config.student.dtype, mesh)
    start = models_of_run.starting_adapters(config, workdir, decoder.spec, frozen)
    base = frozen if start is None else lora.attach(frozen, sharding.replicate(mesh, start))
    in_process = InProcess(config, workdir, lengths, mesh, decoder.spec.vocab_size)
    if teacher is None:
        own = (decoder, frozen) if toggles else None
        teacher = in_process.config_teacher(sources, own)
    _check_capabilities(config, teacher, feed)
    examples = examples._replace(train=feed.rows())
    shared_vocab = decoder.spec.vocab_size
    prompts_by_prefix = feed.prompts_by_prefix([*examples.questions, *examples.held_out])
    if isinstance(teacher, FlaxTeacher):
        shared_vocab = min(shared_vocab, teacher.decoder.spec.vocab_size)
        teacher.prefixes.learn(prompts_by_prefix)

    anchor_feeds, anchor_teacher = {}, None
    if examples.anchors:
        anchor_teacher = teacher
        if config.anchor.towards == "base":
            anchor_teacher = in_process.teacher(decoder, base, chat, "the student's base")
        anchor_rules = _anchor_rules(config, rules, anchor_teacher, chat, examples.anchors)
        if config.anchor.towards == "base":
            contexts = _contexts(config, dataclasses.replace(sources, teacher=None), None)
        rows = config.anchor.batch_size
        anchor_feeds = {
            of.name: _feed(config, of.key, examples.anchors[of.name], anchor_rules, rows, contexts)
            for of in anchor_sets(config.anchor)
        }
    full = config.student.adapter == "none"
    keeps_base = toggles or (anchor_feeds and config.anchor.towards == "base")
    if full and keeps_base:
        reader = "the teacher" if toggles else "the anchor"
        toggle.announce_second_copy(sum(x.nbytes for x in jax.tree.leaves(frozen)), reader)
    return Run(
        config=config,
        mesh=mesh,
        directory=sources.student,
        chat=chat,
        decoder=decoder,
        base=base,
        frozen=None if full else frozen,
        start=start,
        teacher=teacher,
        feed=feed,
        anchor_feeds=anchor_feeds,
        anchor_teacher=anchor_teacher,
        evaluation=Evaluation(config, rules, teacher, examples, lengths, mesh, shared_vocab),
        sampling=in_process.sampling,
        keeps_base=keeps_base,
        prompts_by_prefix=prompts_by_prefix,
        shared_vocab=shared_vocab,
    )


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the run; an epoch that is not whole is rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.epochs * rows / config.train.batch_size)


def initial_state(run: Run, optimizer: optax.GradientTransformation) -> TrainState:
    """Adapters, or float32 masters of every parameter (a copy: the step donates them)."""
    if run.frozen is None:
        trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), run.base)
    elif run.start is not None:
        trainable = run.start
    else:
        key = jax.random.key(seeds.fold(run.config.train.seed, "lora"))
        trainable = models_of_run.fresh_adapters(run.config, run.frozen, key)
    return sharding.replicate(run.mesh, init_state(trainable, optimizer))


def _ladder(config: Config) -> tuple[int, ...]:
    given, longest = config.data.bucket_lengths, config.data.max_length
    if given and max(given) < longest:
        raise UserError(
            f"config.data.bucket_lengths = {given}: the longest must hold data.max_length ="
            f" {longest}"
        )
    return shapes.ladder(longest, given)


def _view_rules(config: Config, chat: Chat, teacher_chat: Chat) -> ViewRules:
    c = config.context
    return ViewRules(
        student_chat=chat,
        teacher_chat=teacher_chat,
        retained=c.student_retained_turns,
        targets=TargetRules(c.target_roles, c.target_content_pattern, c.target_span),
        max_length=config.data.max_length,
        too_long=config.data.too_long,
    )


def _anchor_rules(
    config: Config,
    rules: ViewRules,
    anchor_teacher: Teacher,
    chat: Chat,
    anchors: dict[str, list[Example]],
) -> ViewRules:
    roles = {"assistant"}
    if config.anchor.tokens == "all":
        roles |= {turn.role for rows in anchors.values() for row in rows for turn in row.turns}
    # The pattern is for what is being taught; the anchor's text may be about anything.
    return dataclasses.replace(
        rules,
        teacher_chat=anchor_teacher.chat or chat,
        retained=0,
        targets=TargetRules(tuple(sorted(roles))),
    )


def _contexts(config: Config, sources: Sources, teacher: Teacher | None) -> dict[str, int | None]:
    """The student's name, and then the teacher's -> tokens that it can read at most, or None."""
    student = model_config.load_spec(sources.student).context_length
    found = {f"the student ({config.student.model})": student}
    if teacher is not None:
        in_process = isinstance(teacher, FlaxTeacher)
        length = teacher.decoder.spec.context_length if in_process else None
        return found | {f"the teacher ({teacher.description})": length}
    if sources.teacher is None:
        return found | {"the teacher (the student's base)": student}
    length = model_config.load_spec(sources.teacher).context_length
    return found | {f"the teacher ({config.teacher.model})": length}


def _asked(examples: Examples) -> list[Example]:
    """All questions of the evaluation, as they are asked."""
    abilities = itertools.chain.from_iterable(examples.abilities.values())
    whole = [dataclasses.replace(e, prefix=(), turns=e.prefix + e.turns) for e in abilities]
    asked = (*examples.questions, *examples.held_out, *whole)
    return [dataclasses.replace(example, response=None) for example in asked]


def _feed(
    config: Config,
    key: str,
    examples: list[Example],
    rules: ViewRules,
    batch_size: int,
    contexts: dict[str, int | None],
) -> Feed:
    c = config.trajectory
    if not all(chat.earlier_answers for chat in (rules.student_chat, rules.teacher_chat)):
        examples = answers_apart(examples, key, rules.targets)
    row_lengths.require_room_beside_prefix(key, examples, rules, config.context)
    feed = Feed(
        key,
        examples,
        rules,
        ResponseRules(rules.targets, c.max_refills, c.max_new_tokens),
        per_prompt=c.per_prompt,
        # Rows of one length may be of one kind of task; an anchor's batch is to hold of every kind.
        most_padding=_MOST_PADDING if key == "data.train" else 1.0,
        batch_size=batch_size,
        allowed_lengths=config.data.bucket_lengths,
        seed=config.train.seed,
    )
    row_lengths.require_contexts(feed.rows(), rules, c.max_new_tokens, contexts)
    return feed


def _check_capabilities(config: Config, teacher: Teacher, feed: Feed) -> None:
    gkd = config.gkd
    asked = config.eval.questions is not None or config.eval.held_out is not None
    reasons = refusals(
        teacher.capabilities,
        top_k=config.teacher.top_k,
        temperature=gkd.temperature,
        tail=gkd.tail,
        samples=asked or (needs_teacher_text(gkd) and feed.needs_responses()),
    )
    if reasons:
        raise UserError(f"this teacher ({teacher.description}) cannot do it: {'; '.join(reasons)}")
