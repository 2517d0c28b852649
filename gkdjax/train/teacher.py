"""Teachers that compute in this process, made from the run's config."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from gkdjax.config import Config
from gkdjax.data.chat_template import Chat
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder
from gkdjax.models.hf import peft
from gkdjax.teachers.local import LocalTeacher
from gkdjax.train.models import Sources, load
from gkdjax.train.workdir import local_directory
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class LocalTeacherFactory:
    """Makes in-process teachers, alike but for their weights."""

    config: Config
    workdir: pathlib.Path
    lengths: Sequence[int]  # padded prompt lengths for sampling
    mesh: Mesh
    vocab_size: int  # of the student

    def config_teacher(self, sources: Sources, own: tuple[Decoder, dict] | None) -> LocalTeacher:
        """The config's teacher, with its adapter if it has one.

        Args:
          sources: from `find`.
          own: the student's base, if that is the teacher.
        """
        c = self.config.teacher
        description = c.model or f"{self.config.student.model}, its own adapter off"
        decoder, params = own or load(
            self.config, sources.teacher, c.dtype, self.mesh, self.config.mesh.teacher_rules
        )
        if c.adapter:
            directory = local_directory(c.adapter, self.workdir)
            adapters = peft.load_adapter(directory, decoder.spec).adapters
            adapters = jax.device_put(adapters, decoder.layout.shardings_of(adapters))
            params = lora.attach(params, adapters)
            description += f", with the adapter {c.adapter}"
        return self.teacher(decoder, params, sources.teacher_chat, description)

    def teacher(self, decoder: Decoder, params: dict, chat: Chat, description: str) -> LocalTeacher:
        """As the config wants teachers, with its best K tokens or the whole vocabulary."""
        k, shared = self.config.teacher.top_k, min(self.vocab_size, decoder.spec.vocab_size)
        shared = min(shared, chat.shared or shared)
        if self.config.teacher.is_server:
            k = None  # its K is the server's; whoever is in this process is exact
        if k is not None and k > shared:
            raise UserError(
                f"config.teacher.top_k = {k}: the vocabulary has {shared} tokens; None takes all"
            )
        return self._made(decoder, params, chat, description, k)

    def exact_teacher(
        self, decoder: Decoder, params: dict, chat: Chat, description: str
    ) -> LocalTeacher:
        """With the whole vocabulary, whatever the config says of its teacher."""
        return self._made(decoder, params, chat, description, None)

    def _made(self, decoder, params, chat, description: str, k: int | None) -> LocalTeacher:
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
