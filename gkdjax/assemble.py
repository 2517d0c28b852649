"""Everything a run needs, made from its config: chats and rows first, then weights."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gkdjax import hf, lora, seeds, sharding
from gkdjax.config import Config, rows_at_once
from gkdjax.data import shapes
from gkdjax.data.chat import Chat, load_chat, vocabulary_difference
from gkdjax.data.sources import read_examples
from gkdjax.errors import UserError
from gkdjax.evaluate import Evaluation
from gkdjax.feed import Feed, ViewRules
from gkdjax.models.decoder import Decoder
from gkdjax.sampler import Sampling
from gkdjax.teachers import toggle
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.teachers.protocol import Teacher, refusals
from gkdjax.train_step import init_state
from gkdjax.trajectories import ResponseRules
from gkdjax.types import Example, Message, TrainState


@dataclasses.dataclass
class Run:
    """The parts of a run; `loop` puts them in motion."""

    config: Config
    mesh: Mesh
    chat: Chat
    decoder: Decoder
    base: dict | None  # the untrained student; None once a full fine-tuning needs it no more
    frozen: dict | None  # what adapters stand on; None in a full fine-tuning
    teacher: Teacher
    feed: Feed
    anchor_feed: Feed | None
    anchor_teacher: Teacher | None
    evaluation: Evaluation
    sampling: Sampling
    keeps_base: bool  # somebody reads the base during training


def assemble(config: Config, workdir: pathlib.Path, teacher: Teacher | None) -> Run:
    """Reads data, tokenizers and weights, and checks that they fit each other.

    Args:
      config: checked by itself.
      workdir: where the teacher's responses are kept.
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
    examples = read_examples(config.data.train, "data.train")
    anchor_examples = _anchor_examples(config, examples)
    questions, held_out, abilities = _evaluation_examples(config)

    hf.load_spec(config.student.model)
    chat = load_chat(config.student.model)
    teacher_chat = _teacher_chat(config, chat, teacher)
    rules = _view_rules(config, chat, teacher_chat)
    feed = _feed(config, "data.train", examples, rules, config.train.batch_size)
    toggles = teacher is None and config.teacher.backend == "local-toggle"
    if toggles:
        toggle.require_longer_view(feed.views_differ())

    decoder, base = _load(config, config.student.model, config.student.dtype, mesh)
    in_process = InProcess(config, lengths, mesh, decoder.spec.vocab_size)
    if teacher is None and toggles:
        teacher = in_process.teacher(decoder, base, chat, "the student's base, adapter off")
    elif teacher is None:
        pair = _load(config, config.teacher.model, config.teacher.dtype, mesh)
        teacher = in_process.teacher(*pair, teacher_chat, config.teacher.model)
    _check_capabilities(config, teacher, feed)

    anchor_feed, anchor_teacher = None, None
    if anchor_examples:
        anchor_teacher = teacher
        if config.anchor.towards == "base":
            anchor_teacher = in_process.teacher(decoder, base, chat, "the student's base")
        anchor_rules = _anchor_rules(config, rules, anchor_teacher, chat)
        anchor_feed = _feed(
            config, "anchor.data", anchor_examples, anchor_rules, config.anchor.batch_size
        )
    full = config.student.adapter == "none"
    keeps_base = toggles or (anchor_feed is not None and config.anchor.towards == "base")
    if full and keeps_base:
        reader = "the teacher" if toggles else "the anchor"
        toggle.announce_second_copy(sum(x.nbytes for x in jax.tree.leaves(base)), reader)
    return Run(
        config=config,
        mesh=mesh,
        chat=chat,
        decoder=decoder,
        base=base,
        frozen=None if full else base,
        teacher=teacher,
        feed=feed,
        anchor_feed=anchor_feed,
        anchor_teacher=anchor_teacher,
        evaluation=Evaluation(
            config, rules, teacher, questions, held_out, abilities, examples, lengths, mesh
        ),
        sampling=in_process.sampling,
        keeps_base=keeps_base,
    )


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the run; an epoch that is not whole is rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.epochs * rows / config.train.batch_size)


def initial_state(run: Run, optimizer: optax.GradientTransformation) -> TrainState:
    """Fresh adapters, or float32 masters of every parameter (a copy: the step donates them)."""
    if run.frozen is None:
        trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), run.base)
    else:
        student = run.config.student.lora
        rules = lora.LoraRules(student.rank, student.alpha, student.dropout, student.targets)
        key = jax.random.key(seeds.fold(run.config.train.seed, "lora"))
        try:
            trainable = lora.init(key, run.frozen, rules)
        except ValueError as error:
            raise UserError(f"config.student.lora.targets: {error}") from error
    return sharding.replicate(run.mesh, init_state(trainable, optimizer))


@dataclasses.dataclass(frozen=True)
class InProcess:
    """Makes in-process teachers, alike but for their weights."""

    config: Config
    lengths: Sequence[int]  # padded prompt lengths for sampling
    mesh: Mesh
    vocab_size: int  # of the student

    @property
    def sampling(self) -> Sampling:
        c = self.config.trajectory
        return Sampling(c.max_new_tokens, c.temperature, c.top_p)

    def teacher(self, decoder: Decoder, params: dict, chat: Chat, description: str) -> FlaxTeacher:
        k, shared = self.config.teacher.top_k, min(self.vocab_size, decoder.spec.vocab_size)
        if k is not None and k > shared:
            raise UserError(
                f"config.teacher.top_k = {k}: the vocabulary has {shared} tokens; None takes all"
            )
        return FlaxTeacher(
            decoder,
            params,
            chat,
            description,
            top_k=k,
            vocab_size=self.vocab_size,
            temperature=self.config.gkd.temperature,
            lengths=self.lengths,
            batch_size=self.config.eval.batch_size,
            chunk_size=self.config.gkd.chunk_size,
            mesh=self.mesh,
        )


def _ladder(config: Config) -> tuple[int, ...]:
    given, longest = config.data.bucket_lengths, config.data.max_length
    if given and max(given) < longest:
        raise UserError(
            f"config.data.bucket_lengths = {given}: the longest must hold data.max_length ="
            f" {longest}"
        )
    return shapes.ladder(longest, given)


def _messages(dicts: Sequence[dict]) -> tuple[Message, ...]:
    return tuple(Message(d["role"], d["content"]) for d in dicts)


def _view_rules(config: Config, chat: Chat, teacher_chat: Chat) -> ViewRules:
    return ViewRules(
        student_chat=chat,
        teacher_chat=teacher_chat,
        prefix=_messages(config.context.prefix_messages),
        retained=config.context.student_retained_turns,
        target_roles=config.context.target_roles,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
    )


def _anchor_rules(config: Config, rules: ViewRules, anchor_teacher: Teacher, chat: Chat):
    roles = config.context.target_roles
    if config.anchor.tokens == "all":
        roles = ("system", "user", "assistant")
    return dataclasses.replace(
        rules, teacher_chat=anchor_teacher.chat or chat, prefix=(), retained=0, target_roles=roles
    )


def _feed(config: Config, key: str, examples, rules: ViewRules, batch_size: int) -> Feed:
    c = config.trajectory
    # The pattern is for what is being taught; the anchor's text may be about anything.
    pattern = c.target_content_pattern if key == "data.train" else None
    return Feed(
        key,
        examples,
        rules,
        ResponseRules(pattern, c.max_refills, c.max_new_tokens),
        per_prompt=c.per_prompt,
        batch_size=batch_size,
        allowed_lengths=config.data.bucket_lengths,
        seed=config.train.seed,
    )


def _anchor_examples(config: Config, examples: Sequence[Example]) -> list[Example]:
    """Anchor rows: both views read all of a row, its own prefix included."""
    if config.anchor.data is None:
        return []
    baked = {_messages(config.context.prefix_messages), *(example.prefix for example in examples)}
    baked.discard(())
    trained = {example.turns for example in examples}
    rows = []
    for row in read_examples(config.anchor.data, "anchor.data"):
        conversation = (*row.prefix, *row.turns)
        if any(conversation[: len(prefix)] == prefix for prefix in baked):
            raise UserError(
                f"{row.name}: an anchor row carries the prefix that is being baked; the anchor"
                " would hold the student back from learning it. Remove the row"
            )
        if conversation in trained:
            raise UserError(
                f"{row.name}: an anchor row is a row of data.train as well; the two losses would"
                " pull against each other. Remove it from one of them"
            )
        rows.append(dataclasses.replace(row, prefix=(), turns=conversation))
    return rows


def _evaluation_examples(config: Config):
    """-> (questions, held-out prompts, {ability: questions})."""
    questions, held_out = [], []
    if config.eval.questions is not None:
        questions = read_examples(config.eval.questions, "eval.questions")
    if config.eval.held_out is not None:
        held_out = read_examples(config.eval.held_out, "eval.held_out")
    abilities = {
        name: read_examples(path, f"eval.retention.{name}")
        for name, path in config.eval.retention.items()
    }
    if config.eval.other_prefixes is not None:
        abilities["other_prefixes"] = read_examples(
            config.eval.other_prefixes, "eval.other_prefixes"
        )
    return questions, held_out, abilities


def _teacher_chat(config: Config, chat: Chat, teacher: Teacher | None) -> Chat:
    if teacher is not None:
        teacher_chat, name = teacher.chat or chat, teacher.description
    elif config.teacher.backend == "local-toggle":
        return chat
    else:
        hf.load_spec(config.teacher.model)
        teacher_chat, name = load_chat(config.teacher.model), config.teacher.model
    difference = vocabulary_difference(chat, teacher_chat)
    if difference is not None:
        raise UserError(
            f"the teacher's tokenizer ({name}) is not the student's ({config.student.model}):"
            f" {difference}. Distillation compares probabilities id by id, so both must be one"
        )
    return teacher_chat


def _load(config: Config, directory: str, dtype: str | None, mesh: Mesh) -> tuple[Decoder, dict]:
    decoder, params = hf.load_pretrained(directory, dtype, config.student.compute_dtype)
    return decoder.clone(remat=config.train.remat), sharding.replicate(mesh, params)


def _check_capabilities(config: Config, teacher: Teacher, feed: Feed) -> None:
    gkd = config.gkd
    asked = config.eval.questions is not None or config.eval.held_out is not None
    off_policy = gkd.on_policy_fraction < 1 or gkd.on_policy_warmup_steps > 0
    reasons = refusals(
        teacher.capabilities,
        top_k=config.teacher.top_k,
        temperature=gkd.temperature,
        tail=gkd.tail,
        samples=asked or (off_policy and feed.needs_responses()),
    )
    if reasons:
        raise UserError(f"this teacher ({teacher.description}) cannot do it: {'; '.join(reasons)}")
