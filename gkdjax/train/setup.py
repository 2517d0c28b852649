"""Sets a run up: first rows, tokenizers and the teacher's server, then the weights.

A teacher at a server is tried here, so that what does not work is reported before anything is
loaded.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gkdjax.config import Config, rows_at_once
from gkdjax.data import load
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.examples import BadRows
from gkdjax.data.load import Examples
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules
from gkdjax.evaluation.evaluate import Evaluation
from gkdjax.models import lora, padding, sampler
from gkdjax.models.decoder import Decoder
from gkdjax.models.hf import model_config
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.rollout.schedule import needs_teacher_text
from gkdjax.teachers import local
from gkdjax.teachers.base import Needs, Teacher, hooks, refusals, require_teacher
from gkdjax.teachers.local import LocalTeacher
from gkdjax.teachers.server import connect
from gkdjax.train import datasets, models
from gkdjax.train.datasets import DatasetBuilder
from gkdjax.train.models import LocalTeacherFactory, Sources
from gkdjax.train.step import init_state
from gkdjax.types import Example, Message, TrainState
from gkdjax.utils import seeds
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """All that is known before any weights are read."""

    config: Config
    mesh: Mesh
    lengths: tuple[int, ...]  # padded prompt lengths for sampling
    sources: Sources
    rules: ViewRules
    examples: Examples
    dataset: DistillDataset  # of data.train
    anchors: dict[str, DistillDataset]  # by name, see `config.anchor_sets`
    validation: DistillDataset | None  # rows whose loss is measured
    teacher: Teacher | None  # None: its weights are to be loaded
    vocab_size: int  # of the student
    toggles: bool  # the teacher is the student's own base
    prompts_by_prefix: list[list[np.ndarray]]  # see `DistillDataset.prompts_by_prefix`

    def datasets(self) -> dict[str, DistillDataset]:
        """Returns all datasets by name."""
        own = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.dataset, **own, **self.anchors}

    def evaluation(
        self, teacher: Teacher, shared_vocab: int, untrained: LocalTeacher | None
    ) -> Evaluation:
        how = self.lengths, self.mesh, shared_vocab, untrained
        return Evaluation(self.config, self.rules, teacher, self.examples, self.validation, *how)


def read(
    config: Config,
    workdir: pathlib.Path,
    teacher: Teacher | None,
    connections: contextlib.ExitStack,
    shared: pathlib.Path | None = None,
) -> RunInputs:
    """Reads data and tokenizers, and tries the server of a teacher that has one.

    Args:
      workdir: the run's directory, of this process.
      teacher: instead of the config's, or None.
      connections: closes what is open to the server.
      shared: the run's directory, of all processes; None: it is `workdir`.

    Raises:
      UserError: whatever does not fit, named.
      TeacherUnreachable: the server does not answer.
    """
    if teacher is not None:
        require_teacher(teacher)
    c = config.mesh
    mesh = parallel_mesh.make_mesh(c.data, c.fsdp, c.tensor, c.dcn_data)
    for key, rows in rows_at_once(config).items():
        parallel_mesh.check_rows(mesh, key, rows)
    lengths = _prompt_lengths(config)
    bad_rows = BadRows(config.data.bad_rows)
    examples = load.load_examples(config, bad_rows)
    sources = models.resolve_models(config, workdir, teacher)
    vocab_size = model_config.load_spec(sources.student).vocab_size
    if teacher is None and config.teacher.is_server:
        teacher = connect.connect(
            config.teacher,
            sources.teacher_chat,
            models.ids_of_server(sources, vocab_size),
            workdir,
            shared or workdir,
            sampling=sampler.sampling(config),
            template_kwargs=config.data.template_kwargs,
        )
        connections.enter_context(contextlib.closing(teacher))
    toggles = teacher is None and config.teacher.is_base
    c = config.context
    targets = TargetRules(c.target_roles, c.target_content_pattern, c.target_span)
    rules = ViewRules(
        student_chat=sources.chat,
        teacher_chat=sources.teacher_chat,
        retained=c.student_retained_turns,
        targets=targets,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
    )
    contexts = datasets.contexts_of(config, sources, teacher)
    builder = DatasetBuilder(config, rules, contexts, bad_rows)
    examples = _renderable(config, examples, rules, bad_rows)
    _check_questions(builder, examples)
    dataset = builder.build("data.train", examples.train, config.train.batch_size)
    if config.gkd.on_policy_fraction > 0:  # the student writes to rows with a response, too
        prompts = _without_answers(dataset.examples())
        builder.require_room("rollout", prompts, teacher_writes=False)
    if toggles and not (config.teacher.adapter or config.student.lora.init_from):
        local.require_longer_view(dataset.views_differ())
    anchors = builder.anchors(examples.anchors, sources)
    can = LocalTeacher.capabilities if teacher is None else teacher.capabilities
    validation = builder.validation(examples.validation, can)
    name = config.teacher.backend if teacher is None else teacher.description
    needs = _needs(config, dataset, anchors, validation)
    how = {"top_k": config.teacher.top_k, "temperature": config.gkd.temperature}
    if reasons := refusals(can, **how, tail=config.gkd.tail, needs=needs):
        raise UserError(f"this teacher ({name}) cannot do it: {'; '.join(reasons)}")
    asked = dict.fromkeys((*examples.questions, *examples.heldout, *examples.prompts))
    return RunInputs(
        config=config,
        mesh=mesh,
        lengths=lengths,
        sources=sources,
        rules=rules,
        examples=examples._replace(train=dataset.examples(), dropped=bad_rows.dropped),
        dataset=dataset,
        anchors=anchors,
        validation=validation,
        teacher=teacher,
        vocab_size=vocab_size,
        toggles=toggles,
        prompts_by_prefix=dataset.prompts_by_prefix(list(asked)),
    )


def total_steps(config: Config, rows: int) -> int:
    """Returns the optimizer steps of the run; an epoch that is not whole is rounded up."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.epochs * rows / config.train.batch_size)


def _prompt_lengths(config: Config) -> tuple[int, ...]:
    given, longest = config.data.bucket_lengths, config.data.max_length
    if given and max(given) < longest:
        raise UserError(
            f"config.data.bucket_lengths = {given}: the longest must hold data.max_length ="
            f" {longest}"
        )
    return padding.ladder(longest, given)


def _renderable(
    config: Config, examples: Examples, rules: ViewRules, bad_rows: BadRows
) -> Examples:
    """Leaves out questions and prompts that the chat templates refuse, if `bad_rows` drops them."""

    def kept(key: str, rows: list[Example]) -> list[Example]:
        left = []
        for row in rows:
            with bad_rows.row(row.name):
                rules.prompts(row)
                left.append(row)
        bad_rows.settle(key, key, len(left))
        return left

    questions = kept("eval.questions", examples.questions)
    same = examples.prompts is examples.questions
    heldout = kept("eval.heldout", examples.heldout)
    prompts = questions if same else kept("eval.prompts", examples.prompts)
    sets = {n: kept(f"eval.retention.{n}", rows) for n, rows in examples.retention.items()}
    own = config.eval.side_effects is not None
    unrelated = kept("eval.side_effects", examples.side_effects) if own else load.in_turn(sets)
    return examples._replace(
        questions=questions,
        heldout=heldout,
        prompts=prompts,
        retention=sets,
        side_effects=unrelated,
    )


def _check_questions(builder: DatasetBuilder, examples: Examples) -> None:
    """Raises UserError for questions that do not fit the models' contexts with their answers."""
    asked = [*dict.fromkeys((*examples.questions, *examples.heldout, *examples.prompts))]
    other = tuple(Message(**message) for message in builder.config.eval.other_prefix)
    asked += [dataclasses.replace(e, prefix=(), turns=other + e.turns) for e in asked if other]
    alone = [*itertools.chain(*examples.retention.values()), *examples.side_effects]
    for rows, by_teacher in ((asked, True), (alone, False)):
        builder.require_room("eval", _without_answers(rows), teacher_writes=by_teacher)


def _without_answers(rows: list[Example]) -> list[Example]:
    return [dataclasses.replace(row, answer=None) for row in rows]


def _needs(
    config: Config,
    dataset: DistillDataset,
    anchors: dict[str, DistillDataset],
    validation: DistillDataset | None,
) -> Needs:
    sets = config.eval.questions, config.eval.heldout, config.eval.prompts
    asked = sets != (None,) * 3 or (validation is not None and validation.needs_responses())
    writes, on_policy = needs_teacher_text(config.gkd), config.gkd.on_policy_fraction > 0
    texts = ["what the student writes"] if on_policy else []
    if writes and dataset.needs_scores():
        texts.append("rows of data.train")
    to_teacher = config.anchor.reference == "teacher"
    if to_teacher and any(anchor.needs_scores() for anchor in anchors.values()):
        texts.append("rows of anchor.data")
    return Needs(asked or (writes and dataset.needs_responses()), texts, on_policy)


@dataclasses.dataclass
class Run:
    """A run with its models; `train.run` puts it in motion."""

    inputs: RunInputs  # with the responses that are there by now
    decoder: Decoder
    base: dict | None  # the untrained student; None once a full fine-tuning needs it no more
    frozen: dict | None  # what adapters stand on; None in a full fine-tuning
    start: dict | None  # adapters to begin with; None: fresh ones
    teacher: Teacher
    anchor_teacher: Teacher | None
    evaluation: Evaluation
    keeps_base: bool  # the base is read during training
    shared_vocab: int  # ids below it have a row in the student's embedding and in the teacher's


def assemble(inputs: RunInputs, workdir: pathlib.Path) -> Run:
    """Loads the weights, and the teacher's if they are in this process.

    Raises:
      UserError: whatever does not fit, named.
    """
    config, sources, mesh, teacher = inputs.config, inputs.sources, inputs.mesh, inputs.teacher
    rules = config.mesh.student_rules
    decoder, frozen = models.load(config, sources.student, config.student.dtype, mesh, rules)
    start = models.starting_adapters(config, workdir, decoder.spec, frozen)
    if start is not None:
        start = jax.device_put(start, decoder.layout.shardings_of(start))
    base = frozen if start is None else lora.attach(frozen, start)
    make = LocalTeacherFactory(config, workdir, inputs.lengths, mesh, decoder.spec.vocab_size)
    if teacher is None:
        teacher = make.config_teacher(sources, (decoder, frozen) if inputs.toggles else None)
    hooks(teacher).register(inputs.prompts_by_prefix)
    anchor_teacher, untrained = (teacher if inputs.anchors else None), None
    anchored_to_base = bool(inputs.anchors) and config.anchor.reference == "base"
    if anchored_to_base:
        anchor_teacher = make.teacher(decoder, base, sources.chat, "the student's base")
    if inputs.examples.side_effects:
        who = "the untrained student"
        untrained = make.teacher(decoder, base, sources.chat, who, exact=True)
    readers = {
        "the teacher": inputs.toggles,
        "the anchor": anchored_to_base,
        "the evaluation of side effects": untrained is not None,
    }
    full, reader = config.student.adapter == "none", next(filter(readers.get, readers), None)
    if full and reader:
        local.announce_second_copy(sum(x.nbytes for x in jax.tree.leaves(frozen)), reader)
    shared = None if teacher.chat is None else teacher.chat.shared
    shared_vocab = decoder.spec.vocab_size if shared is None else shared
    return Run(
        inputs=inputs,
        decoder=decoder,
        base=base,
        frozen=None if full else frozen,
        start=start,
        teacher=teacher,
        anchor_teacher=anchor_teacher,
        evaluation=inputs.evaluation(teacher, shared_vocab, untrained),
        keeps_base=reader is not None,
        shared_vocab=shared_vocab,
    )


def initial_state(run: Run, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes adapters, or float32 masters of every parameter (copies: the step donates them)."""

    def make(base, start):
        if run.frozen is None:
            trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base)
        elif start is not None:
            trainable = jax.tree.map(jnp.copy, start)
        else:
            key = jax.random.key(seeds.fold(run.inputs.config.train.seed, "lora"))
            trainable = models.fresh_adapters(run.inputs.config, base, key)
        return init_state(trainable, optimizer)

    given = run.base if run.frozen is None else run.frozen, run.start
    places = run.decoder.layout.shardings_of(jax.eval_shape(make, *given))
    return jax.jit(make, out_shardings=places)(*given)
