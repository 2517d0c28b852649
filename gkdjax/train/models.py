"""The student and the teachers of a run: where they lie, how they render text, their weights."""

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
    """Directories, fetched from the hub where they must be; chats, but no weights, are read.

    Args:
      config: the run's.
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
    c, directory = config.teacher, None

    def chat_of(found: pathlib.Path) -> Chat:
        return chat if found.samefile(student) else load_chat(found, *how)  # which takes seconds

    if teacher is not None:
        teacher_chat, rows = teacher.chat or chat, None
    elif c.is_base or (c.is_server and not c.tokenizer):
        return Sources(student, chat, None, chat)
    elif c.is_server:
        # Of a server nothing but its tokenizer can be here; what its embedding has is its own.
        borrowed = local_directory(c.tokenizer, workdir, weights=False)
        teacher_chat = chat_of(borrowed)
        rows = spec.vocab_size
    else:
        directory = local_directory(c.model, workdir)
        rows = model_config.load_spec(directory).vocab_size
        borrowed = c.tokenizer and local_directory(c.tokenizer, workdir, weights=False)
        teacher_chat = chat_of(borrowed or directory)
    shared = None if teacher_chat is chat else tokenizer_match.shared_ids(chat, teacher_chat)
    if shared is not None:
        shared = min(shared, chat.vocab_size)
        _check_shared(config, teacher, shared)
        teacher_chat = dataclasses.replace(teacher_chat, shared=shared)
    if rows is not None and (shared is None or not c.is_server):
        teacher_chat = tokenizer_match.of_model(teacher_chat, rows)
    return Sources(
        student, tokenizer_match.stopping_with(chat, teacher_chat), directory, teacher_chat
    )


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
    """What a server may name: ids below the student's `rows`, and all of a larger tokenizer."""
    if sources.teacher_chat.shared is None:
        return rows
    return max(rows, 1 + max(sources.teacher_chat.tokenizer.get_vocab().values()))


def load_student(config: Config, directory: pathlib.Path, mesh: Mesh) -> tuple[Decoder, dict]:
    """(decoder, its parameters on the mesh)."""
    return load(config, directory, config.student.dtype, mesh, config.mesh.student_rules)


def load(config, directory, dtype: str | None, mesh: Mesh, rules: Sequence[dict]):
    rules = [(rule["leaves"], PartitionSpec(*rule["axes"])) for rule in rules]
    decoder, params = hf_load.load_pretrained(
        directory, dtype, config.student.compute_dtype, mesh, rules
    )
    return decoder.clone(remat=config.train.remat), params


def fresh_adapters(config: Config, params: dict, key: jax.Array) -> dict[str, lora.Adapter]:
    """Adapters of `params` that change nothing yet.

    Raises:
      UserError: a target of student.lora.targets that matches no kernel.
    """
    try:
        return lora.init(key, params, config.student.lora)
    except ValueError as error:
        raise UserError(f"config.student.lora.targets: {error}") from error


def starting_adapters(
    config: Config, workdir: pathlib.Path, spec: DecoderConfig, params: dict
) -> dict[str, lora.Adapter] | None:
    """What student.lora.init_from holds, with the config's dropout; None if it names nothing.

    Raises:
      UserError: it cannot be read, does not fit the student, or is not what student.lora says:
        rank, alpha and targets are the adapter's own, and the config of a run must not lie.
    """
    c = config.student.lora
    if not c.init_from:
        return None
    loaded = peft.load_adapter(local_directory(c.init_from, workdir), spec)
    said = jax.eval_shape(lambda: fresh_adapters(config, params, jax.random.key(0)))
    if not _alike(said, loaded.adapters):
        rules = loaded.rules
        if len({(a.a.shape[-1], a.scale) for a in loaded.adapters.values()}) > 1:
            raise UserError(
                f"the adapter {c.init_from} has kernels of several ranks or alphas (rank_pattern,"
                " alpha_pattern), and student.lora has one of each; start from one without patterns"
            )
        raise UserError(
            f"config.student.lora is not what the adapter {c.init_from} is: set"
            f" student.lora.rank={rules.rank}, .alpha={rules.alpha} and .targets={rules.targets}"
        )
    return {
        path: dataclasses.replace(adapter, dropout=c.dropout)
        for path, adapter in loaded.adapters.items()
    }


def _alike(a: dict[str, lora.Adapter], b: dict[str, lora.Adapter]) -> bool:
    """Of the same kernels, ranks and scales; a scale of rsLoRA is rounded on its way."""
    return a.keys() == b.keys() and all(
        (a[path].a.shape, a[path].b.shape) == (b[path].a.shape, b[path].b.shape)
        and math.isclose(a[path].scale, b[path].scale)
        for path in a
    )
