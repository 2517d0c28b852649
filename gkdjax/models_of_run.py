"""The student and the teachers of a run: where they lie, how they render text, their weights."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from gkdjax import lora
from gkdjax import workdir as workdirs
from gkdjax.config import Config
from gkdjax.config_models import SERVERS
from gkdjax.data import vocabulary
from gkdjax.data.chat import Chat, load_chat
from gkdjax.errors import UserError
from gkdjax.hf import hub, model_config, peft, pretrained
from gkdjax.models.decoder import Decoder
from gkdjax.models.spec import DecoderSpec
from gkdjax.sampler import Sampling
from gkdjax.teachers.flax import FlaxTeacher
from gkdjax.teachers.protocol import Teacher


@dataclasses.dataclass(frozen=True)
class Sources:
    """The models' directories on this machine, and their chats."""

    student: pathlib.Path
    chat: Chat
    teacher: pathlib.Path | None  # None: the student's own base, or no model in this process
    teacher_chat: Chat


def local_directory(name: str, workdir: pathlib.Path, weights: bool = True) -> pathlib.Path:
    """As `hub.local_directory`, and what the run began with: a hub id may move on, and so may we.

    RUN/models.json has the absolute path of each directory and the commit of each hub id.
    """
    path = workdir / "models.json"
    begun_with = workdirs.read_json(path) or {}
    if name not in begun_with:
        directory = hub.local_directory(name, weights)
        here = str(directory.absolute()) if pathlib.Path(name).is_dir() else directory.name
        workdirs.write_json(path, begun_with | {name: here})
        return directory
    place = begun_with[name]
    if not pathlib.Path(place).is_absolute():
        return hub.local_directory(name, weights, place)
    if not pathlib.Path(place).is_dir():
        raise UserError(f"{place} is gone, with which the run in {workdir} began; put it back")
    return pathlib.Path(place)


def base_name(name: str, workdir: pathlib.Path) -> str:
    """What an adapter calls its base: a hub id as it is, a directory by its absolute path.

    Args:
      name: that `local_directory` has found for this run, wherever the process may stand now.
      workdir: the run's directory.
    """
    place = workdirs.read_json(workdir / "models.json")[name]
    return place if pathlib.Path(place).is_absolute() else name


def find(config: Config, workdir: pathlib.Path, teacher: Teacher | None) -> Sources:
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
    chat = vocabulary.of_model(load_chat(student, *how), spec.vocab_size)
    c, directory = config.teacher, None
    if teacher is not None:
        teacher_chat, rows = teacher.chat or chat, None
    elif c.backend == "local-toggle" or (c.backend in SERVERS and not c.tokenizer):
        return Sources(student, chat, None, chat)
    elif c.backend in SERVERS:
        # Of a server nothing but its tokenizer can be here; what its embedding has is its own.
        borrowed = local_directory(c.tokenizer, workdir, weights=False)
        teacher_chat = load_chat(borrowed, *how)
        rows = spec.vocab_size
    else:
        directory = local_directory(c.model, workdir)
        rows = model_config.load_spec(directory).vocab_size
        borrowed = c.tokenizer and local_directory(c.tokenizer, workdir, weights=False)
        teacher_chat = load_chat(borrowed or directory, *how)
    shared = vocabulary.shared_ids(chat, teacher_chat)
    if shared is not None:
        shared = min(shared, chat.vocab_size)
        _check_shared(config, teacher, shared)
        teacher_chat = dataclasses.replace(teacher_chat, shared=shared)
    if rows is not None and (shared is None or c.backend not in SERVERS):
        teacher_chat = vocabulary.of_model(teacher_chat, rows)
    return Sources(student, vocabulary.stopping_with(chat, teacher_chat), directory, teacher_chat)


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
    return _load(config, directory, config.student.dtype, mesh, config.mesh.student_rules)


def _load(config, directory, dtype: str | None, mesh: Mesh, rules: Sequence[dict]):
    rules = [(rule["leaves"], PartitionSpec(*rule["axes"])) for rule in rules]
    decoder, params = pretrained.load_pretrained(
        directory, dtype, config.student.compute_dtype, mesh, rules
    )
    return decoder.clone(remat=config.train.remat), params


def fresh_adapters(config: Config, params: dict, key: jax.Array) -> dict[str, lora.Adapter]:
    """Adapters of `params` that change nothing yet.

    Raises:
      UserError: a target of student.lora.targets that matches no kernel.
    """
    c = config.student.lora
    try:
        return lora.init(key, params, lora.LoraRules(c.rank, c.alpha, c.dropout, c.targets))
    except ValueError as error:
        raise UserError(f"config.student.lora.targets: {error}") from error


def starting_adapters(
    config: Config, workdir: pathlib.Path, spec: DecoderSpec, params: dict
) -> dict[str, lora.Adapter] | None:
    """What student.lora.start_from holds, with the config's dropout; None if it names nothing.

    Raises:
      UserError: it cannot be read, does not fit the student, or is not what student.lora says:
        rank, alpha and targets are the adapter's own, and the config of a run must not lie.
    """
    c = config.student.lora
    if not c.start_from:
        return None
    loaded = peft.load_adapter(local_directory(c.start_from, workdir), spec)
    said = jax.eval_shape(lambda: fresh_adapters(config, params, jax.random.key(0)))
    if not _alike(said, loaded.adapters):
        rules = loaded.rules
        if len({(a.a.shape[-1], a.scale) for a in loaded.adapters.values()}) > 1:
            raise UserError(
                f"the adapter {c.start_from} has kernels of several ranks or alphas (rank_pattern,"
                " alpha_pattern), and student.lora has one of each; start from one without patterns"
            )
        raise UserError(
            f"config.student.lora is not what the adapter {c.start_from} is: set"
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


def sampling(config: Config) -> Sampling:
    """How responses are drawn, whoever writes them."""
    c = config.trajectory
    return Sampling(c.max_new_tokens, c.temperature, c.top_p, c.top_k)


@dataclasses.dataclass(frozen=True)
class InProcess:
    """Makes in-process teachers, alike but for their weights."""

    config: Config
    workdir: pathlib.Path
    lengths: Sequence[int]  # padded prompt lengths for sampling
    mesh: Mesh
    vocab_size: int  # of the student

    def config_teacher(self, sources: Sources, own: tuple[Decoder, dict] | None) -> FlaxTeacher:
        """The config's teacher, with its adapter if it has one.

        Args:
          sources: from `find`.
          own: the student's base, if that is the teacher.
        """
        c = self.config.teacher
        description = c.model or f"{self.config.student.model}, its own adapter off"
        decoder, params = own or _load(
            self.config, sources.teacher, c.dtype, self.mesh, self.config.mesh.teacher_rules
        )
        if c.adapter:
            directory = local_directory(c.adapter, self.workdir)
            adapters = peft.load_adapter(directory, decoder.spec).adapters
            adapters = jax.device_put(adapters, decoder.layout.places(adapters))
            params = lora.attach(params, adapters)
            description += f", with the adapter {c.adapter}"
        return self.teacher(decoder, params, sources.teacher_chat, description)

    def teacher(self, decoder: Decoder, params: dict, chat: Chat, description: str) -> FlaxTeacher:
        """As the config wants teachers, with its best K tokens or the whole vocabulary."""
        k, shared = self.config.teacher.top_k, min(self.vocab_size, decoder.spec.vocab_size)
        shared = min(shared, chat.shared or shared)
        if self.config.teacher.backend in SERVERS:
            k = None  # its K is the server's; whoever is in this process is exact
        if k is not None and k > shared:
            raise UserError(
                f"config.teacher.top_k = {k}: the vocabulary has {shared} tokens; None takes all"
            )
        return self._made(decoder, params, chat, description, k)

    def exact_teacher(
        self, decoder: Decoder, params: dict, chat: Chat, description: str
    ) -> FlaxTeacher:
        """With the whole vocabulary, whatever the config says of its teacher."""
        return self._made(decoder, params, chat, description, None)

    def _made(self, decoder, params, chat, description: str, k: int | None) -> FlaxTeacher:
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
            prefix_bytes=self.config.teacher.prefix_bytes,
            mesh=self.mesh,
        )
