"""The student and the teachers of a run: their directories, chats and weights."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from gkdjax.config import Config
from gkdjax.data import tokenizer_match
from gkdjax.data.chat_template import Chat, load_chat
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.hf import load as hf_load
from gkdjax.models.hf import model_config, peft
from gkdjax.teachers.base import Teacher
from gkdjax.teachers.local import LocalTeacher
from gkdjax.train import workdir as workdirs
from gkdjax.train.workdir import local_directory
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sources:
    """The models' directories on this machine, and their chats."""

    student: pathlib.Path
    chat: Chat
    teacher: pathlib.Path | None  # None: the student's own base, or no model in this process
    teacher_chat: Chat


def resolve_models(config: Config, workdir: pathlib.Path, teacher: Teacher | None) -> Sources:
    """Finds the directories, from the hub where needed, and reads chats, but no weights.

    Args:
      workdir: the run's directory.
      teacher: instead of the config's, or None.

    Raises:
      UserError: a model that cannot be had or is not supported, a tokenizer without a chat
        template, two vocabularies that differ, or a teacher that ends turns where the student
        does not stop.
    """
    how = config.data.template_kwargs, workdirs.clock(workdir)
    student = local_directory(config.student.model, workdir)
    # First: an unknown architecture matters more than its template.
    spec = model_config.load_spec(student)
    chat = tokenizer_match.of_model(load_chat(student, *how), spec.vocab_size)
    c, directory, rows = config.teacher, None, None
    if teacher is not None:
        teacher_chat = teacher.chat or chat
    elif c.is_base or (c.is_server and not c.tokenizer):
        return Sources(student, chat, None, chat)
    else:
        if not c.is_server:
            directory = local_directory(c.model, workdir)
            rows = model_config.load_spec(directory).vocab_size
        borrowed = c.tokenizer and local_directory(c.tokenizer, workdir, weights=False)
        rendered_by = borrowed or directory
        # A large tokenizer takes seconds to read.
        same = rendered_by.samefile(student)
        loaded = chat if same else load_chat(rendered_by, *how)
        teacher_chat = tokenizer_match.with_tokenizer_of(chat, loaded)
    shared = None if teacher_chat is chat else tokenizer_match.shared_ids(chat, teacher_chat)
    if shared is not None:
        shared = min(shared, chat.vocab_size)
        _check_shared(config, teacher, shared)
        teacher_chat = dataclasses.replace(teacher_chat, shared=shared)
    if c.is_server and teacher is None and shared is None:
        rows = spec.vocab_size  # the server's embedding is its own matter
    if rows is not None:
        teacher_chat = tokenizer_match.of_model(teacher_chat, rows)
    chat = tokenizer_match.stopping_with(chat, teacher_chat)
    return Sources(student, chat, directory, teacher_chat)


def _check_shared(config: Config, teacher: Teacher | None, shared: int) -> None:
    if teacher is not None:
        raise UserError(
            f"the tokenizer of {teacher.description} and the student's part at id {shared}; a"
            " teacher of one's own needs the student's tokenizer"
        )
    if config.mesh.tensor > 1 and shared % config.mesh.tensor:
        raise UserError(
            f"config.mesh.tensor = {config.mesh.tensor}: student and teacher have {shared} ids in"
            " common, which so many devices cannot share; set mesh.tensor=1"
        )


def ids_of_server(sources: Sources, rows: int) -> int:
    """Returns how many ids a server may name: the student's `rows`, or a larger tokenizer's."""
    if sources.teacher_chat.shared is None:
        return rows
    return max(rows, 1 + max(sources.teacher_chat.tokenizer.get_vocab().values()))


def load(
    config: Config, directory: pathlib.Path, dtype: str | None, mesh: Mesh, rules: Sequence[dict]
) -> tuple[Decoder, dict]:
    """Loads a model -> (decoder, its parameters on the mesh)."""
    rules = [(rule["leaves"], PartitionSpec(*rule["axes"])) for rule in rules]
    compute_dtype = config.student.compute_dtype
    decoder, params = hf_load.load_pretrained(directory, dtype, compute_dtype, mesh, rules)
    return decoder.clone(remat=config.train.remat), params


def fresh_adapters(config: Config, params: dict, key: jax.Array) -> dict[str, lora.Adapter]:
    """Makes adapters that change nothing yet; UserError for a target that matches no kernel."""
    try:
        return lora.init(key, params, config.student.lora)
    except ValueError as error:
        raise UserError(f"config.student.lora.targets: {error}") from error


def starting_adapters(
    config: Config, workdir: pathlib.Path, spec: DecoderConfig, params: dict
) -> dict[str, lora.Adapter] | None:
    """Loads student.lora.init_from, with the config's dropout; None if it names nothing.

    Raises:
      UserError: it cannot be read, does not fit the student, or differs from student.lora: rank,
        alpha and targets are the adapter's own, and the config of a run must not lie.
    """
    c = config.student.lora
    if not c.init_from:
        return None
    loaded = peft.load_adapter(local_directory(c.init_from, workdir), spec)
    found, rules = loaded.adapters, loaded.rules
    wanted = jax.eval_shape(lambda: fresh_adapters(config, params, jax.random.key(0)))
    if wanted.keys() != found.keys() or not all(_alike(wanted[k], found[k]) for k in found):
        if len({(a.a.shape[-1], a.scale) for a in found.values()}) > 1:
            raise UserError(
                f"the adapter {c.init_from} has kernels of several ranks or alphas (rank_pattern,"
                " alpha_pattern), and student.lora has one of each; start from one without patterns"
            )
        raise UserError(
            f"config.student.lora is not what the adapter {c.init_from} is: set"
            f" student.lora.rank={rules.rank}, .alpha={rules.alpha} and .targets={rules.targets}"
        )
    return {path: dataclasses.replace(a, dropout=c.dropout) for path, a in found.items()}


def _alike(a: lora.Adapter, b: lora.Adapter) -> bool:
    """Compares shapes and scales; the scale of rsLoRA may be rounded."""
    shapes = (a.a.shape, a.b.shape) == (b.a.shape, b.b.shape)
    return shapes and math.isclose(a.scale, b.scale)


@dataclasses.dataclass(frozen=True)
class LocalTeacherFactory:
    """Makes in-process teachers, alike but for their weights."""

    config: Config
    workdir: pathlib.Path
    lengths: Sequence[int]  # padded prompt lengths for sampling
    mesh: Mesh
    vocab_size: int  # of the student

    def config_teacher(self, sources: Sources, own: tuple[Decoder, dict] | None) -> LocalTeacher:
        """Makes the config's teacher with its adapter; `own` is the base it shares, or None."""
        c = self.config.teacher
        description = c.model or f"{self.config.student.model}, its own adapter off"
        rules = self.config.mesh.teacher_rules
        decoder, params = own or load(self.config, sources.teacher, c.dtype, self.mesh, rules)
        if c.adapter:
            directory = local_directory(c.adapter, self.workdir)
            adapters = peft.load_adapter(directory, decoder.spec).adapters
            adapters = jax.device_put(adapters, decoder.layout.shardings_of(adapters))
            params = lora.attach(params, adapters)
            description += f", with the adapter {c.adapter}"
        return self.teacher(decoder, params, sources.teacher_chat, description)

    def teacher(
        self,
        decoder: Decoder,
        params: dict,
        chat: Chat,
        description: str,
        *,
        exact: bool = False,
    ) -> LocalTeacher:
        """Makes a teacher with the config's top k; exact over the whole vocabulary if wanted."""
        k, shared = self.config.teacher.top_k, min(self.vocab_size, decoder.spec.vocab_size)
        shared = min(shared, chat.shared or shared)
        if exact or self.config.teacher.is_server:
            k = None  # a server's K is its own; a teacher in this process is exact beside it
        if k is not None and k > shared:
            raise UserError(
                f"config.teacher.top_k = {k}: the vocabulary has {shared} tokens; None takes all"
            )
        return LocalTeacher(
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
            prefix_bytes=self.config.teacher.prefix_bytes,
            mesh=self.mesh,
        )
