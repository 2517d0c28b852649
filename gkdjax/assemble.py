"""Everything a run needs: its rows, and the weights."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gkdjax import lora, models_of_run, seeds
from gkdjax.config import Config
from gkdjax.data.chat import Chat
from gkdjax.evaluation.evaluate import Evaluation
from gkdjax.examples_of_run import Examples
from gkdjax.feed import Feed
from gkdjax.models.decoder import Decoder
from gkdjax.models_of_run import InProcess
from gkdjax.rows_of_run import Rows
from gkdjax.teachers import toggle
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.teachers.protocol import Teacher
from gkdjax.train_step import init_state
from gkdjax.types import TrainState


@dataclasses.dataclass
class Run:
    """The parts of a run; `loop` puts them in motion."""

    config: Config
    mesh: Mesh
    directory: pathlib.Path  # of the student, its source
    examples: Examples
    chat: Chat
    decoder: Decoder
    base: dict | None  # the untrained student; None once a full fine-tuning needs it no more
    frozen: dict | None  # what adapters stand on; None in a full fine-tuning
    start: dict | None  # adapters to begin with; None: fresh ones
    teacher: Teacher
    feed: Feed
    anchor_feeds: dict[str, Feed]  # by name, see `config.anchor_sets`
    validation: Feed | None  # rows whose loss is measured
    anchor_teacher: Teacher | None
    evaluation: Evaluation
    keeps_base: bool  # somebody reads the base during training
    prompts_by_prefix: list[list[np.ndarray]]  # the teacher's
    shared_vocab: int  # ids below it have a row in the student's embedding and in the teacher's


def assemble(rows: Rows, workdir: pathlib.Path) -> Run:
    """Reads the weights, and the teacher's if they are in this process.

    Args:
      rows: of the run.
      workdir: the run's directory.

    Raises:
      UserError: whatever does not fit, named.
    """
    config, sources, mesh, teacher = rows.config, rows.sources, rows.mesh, rows.teacher
    decoder, frozen = models_of_run.load_student(config, sources.student, mesh)
    start = models_of_run.starting_adapters(config, workdir, decoder.spec, frozen)
    if start is not None:
        start = jax.device_put(start, decoder.layout.places(start))
    base = frozen if start is None else lora.attach(frozen, start)
    in_process = InProcess(config, workdir, rows.lengths, mesh, decoder.spec.vocab_size)
    if teacher is None:
        own = (decoder, frozen) if rows.toggles else None
        teacher = in_process.config_teacher(sources, own)
    shared_vocab = decoder.spec.vocab_size
    if teacher.chat is not None and teacher.chat.shared is not None:
        shared_vocab = teacher.chat.shared
    if isinstance(teacher, FlaxTeacher):
        teacher.prefixes.learn(rows.prompts_by_prefix)
    anchor_teacher = None
    if rows.anchor_feeds:
        anchor_teacher = teacher
        if config.anchor.towards == "base":
            anchor_teacher = in_process.teacher(decoder, base, sources.chat, "the student's base")
    untrained = None
    if rows.examples.side_effects:
        untrained = in_process.exact_teacher(decoder, base, sources.chat, "the untrained student")
    full = config.student.adapter == "none"
    readers = {
        "the teacher": rows.toggles,
        "the anchor": rows.anchor_feeds and config.anchor.towards == "base",
        "the evaluation of side effects": untrained is not None,
    }
    keeps_base = any(readers.values())
    if full and keeps_base:
        reader = next(name for name, reads in readers.items() if reads)
        toggle.announce_second_copy(sum(x.nbytes for x in jax.tree.leaves(frozen)), reader)
    return Run(
        config=config,
        mesh=mesh,
        directory=sources.student,
        examples=rows.examples,
        chat=sources.chat,
        decoder=decoder,
        base=base,
        frozen=None if full else frozen,
        start=start,
        teacher=teacher,
        feed=rows.feed,
        anchor_feeds=rows.anchor_feeds,
        validation=rows.validation,
        anchor_teacher=anchor_teacher,
        evaluation=rows.evaluation(teacher, shared_vocab, untrained),
        keeps_base=keeps_base,
        prompts_by_prefix=rows.prompts_by_prefix,
        shared_vocab=shared_vocab,
    )


def initial_state(run: Run, optimizer: optax.GradientTransformation) -> TrainState:
    """Adapters, or float32 masters of every parameter (copies: the step donates them)."""

    def make(base, start):
        if run.frozen is None:
            trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), base)
        elif start is not None:
            trainable = jax.tree.map(jnp.copy, start)
        else:
            key = jax.random.key(seeds.fold(run.config.train.seed, "lora"))
            trainable = models_of_run.fresh_adapters(run.config, base, key)
        return init_state(trainable, optimizer)

    given = run.base if run.frozen is None else run.frozen, run.start
    places = run.decoder.layout.places(jax.eval_shape(make, *given))
    return jax.jit(make, out_shardings=places)(*given)
