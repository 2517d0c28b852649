"""The models of a run, by config.json and the headers of tensor files if there are any."""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from gkdjax.config import Config, Lora
from gkdjax.models import padding
from gkdjax.models.decoder_config import DecoderConfig, param_shapes
from gkdjax.models.hf import hub, model_config
from gkdjax.models.hf.load import tensor_places
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.parallel import mesh as parallel_mesh
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train.planning.shards import Shard
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters in a checkpoint."""

    spec: DecoderConfig
    stored_dtype: str  # of most of them
    stored_bytes: int

    @classmethod
    def of(cls, spec: DecoderConfig, dtype: str) -> "Weights":
        return cls(spec, dtype, num_parameters(spec) * itemsize(dtype))

    def dtype(self, wanted: str | None) -> str:
        """In memory; None: the checkpoint's."""
        return wanted or self.stored_dtype

    def nbytes(self, wanted: str | None) -> int:
        """In memory; None: in the checkpoint's dtypes."""
        if wanted is None:
            return self.stored_bytes
        return num_parameters(self.spec) * itemsize(wanted)

    def nbytes_of(self, shard: Shard, wanted: str | None) -> int:
        """Bytes of one device's part, by the mean where the checkpoint has several dtypes."""
        return self.nbytes(wanted) * shard.held // num_parameters(self.spec)


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """A run on a mesh of devices, which is planned."""

    config: Config
    student: Weights
    teacher: Weights | None  # of its own in this process; None: there is no such one
    toggles: bool  # the teacher is the student's base
    mesh: AbstractMesh  # as `mesh_of` has it

    @property
    def full(self) -> bool:
        """All parameters are trained."""
        return self.config.student.adapter == "none"

    @property
    def rules(self) -> Lora | None:
        return None if self.full else self.config.student.lora

    @property
    def in_process(self) -> Weights | None:
        """Whoever teaches in this process; None: a server does."""
        return self.student if self.toggles else self.teacher

    @functools.cached_property
    def of_student(self) -> Shard:
        """The student's part on one device; UserError where the mesh does not divide it."""
        return self._shard(self.student.spec, self.config.mesh.student_rules)

    @functools.cached_property
    def of_teacher(self) -> Shard | None:
        """The part of whoever teaches in this process."""
        if self.toggles or self.teacher is None:
            return self.of_student if self.toggles else None
        return self._shard(self.teacher.spec, self.config.mesh.teacher_rules)

    def _shard(self, spec: DecoderConfig, rules: Sequence[dict]) -> Shard:
        own = tuple((rule["leaves"], PartitionSpec(*rule["axes"])) for rule in rules)
        return Shard(spec, ShardingRules.of(self.mesh, spec, own, warn=False))

    @property
    def slices(self) -> int:
        """Parts of the mesh that only a data-centre network joins."""
        return _sizes(self.config, self.mesh.size)["dcn_data"]

    @property
    def keeps_base(self) -> bool:
        """Somebody reads the untrained student during the training; see `assemble`."""
        c = self.config
        anchored = c.anchor.data is not None and c.anchor.reference == "base"
        compared = c.eval.side_effects is not None or bool(c.eval.retention)
        return self.toggles or anchored or compared

    def rows(self, key: str) -> int:
        """Rows of a batch on one device: "train", "anchor" or "eval"."""
        return getattr(self.config, key).batch_size // parallel_mesh.row_shares(self.mesh)

    @property
    def length(self) -> int:
        """Positions of the longest row, padded."""
        c = self.config.data
        return max(c.bucket_lengths) if c.bucket_lengths else padding.round_up(c.max_length, ())


def read(config: Config, devices: int) -> PlanInputs:
    """Reads what is known of the models; of the hub's, what is small.

    Raises:
      UserError: a model that cannot be had, a config.json that cannot be read, or a mesh that so
        many devices do not make.
    """

    def stored(name: str) -> Weights:
        return read_weights(hub.local_directory(name, weights=False))

    if not config.student.model:
        raise UserError("config.student.model is empty: there is nothing to plan")
    teacher = stored(config.teacher.model) if config.teacher.is_model else None
    mesh = mesh_of(config, devices)
    return PlanInputs(config, stored(config.student.model), teacher, config.teacher.is_base, mesh)


def mesh_of(config: Config, devices: int) -> AbstractMesh:
    """The run's mesh on so many devices.

    Raises:
      UserError: as `parallel.mesh.make_mesh`, but for the slices, which nobody can count here.
    """
    sizes = _sizes(config, devices)
    shape = sizes["dcn_data"] * sizes["data"], sizes["fsdp"], sizes["tensor"]
    return AbstractMesh(shape, parallel_mesh.AXES)


def on_mesh(setup: PlanInputs, **sizes: int) -> PlanInputs:
    """The same run on a mesh of other sizes of the same devices.

    Raises:
      UserError: as `mesh_of`.
    """
    mesh = dataclasses.replace(setup.config.mesh, **sizes)
    config = dataclasses.replace(setup.config, mesh=mesh)
    return dataclasses.replace(setup, config=config, mesh=mesh_of(config, setup.mesh.size))


def _sizes(config: Config, devices: int) -> dict[str, int]:
    axes = (*parallel_mesh.AXES, "dcn_data")
    return parallel_mesh.mesh_sizes({axis: getattr(config.mesh, axis) for axis in axes}, devices)


def read_weights(directory: pathlib.Path) -> Weights:
    """Reads the headers of the tensor files; without any, the dtype that config.json names.

    Raises:
      UserError: as `model_config.load_spec`, and what is wrong with the files.
    """
    config, spec = model_config.load_config(directory), model_config.load_spec(directory)
    if not any(pathlib.Path(directory).glob("*.safetensors")):
        return Weights.of(spec, _named_dtype(directory, config))
    files = TensorFiles(directory)
    known = tensor_places(files, spec, config["model_type"])
    total, counts, seen = 0, collections.Counter(), set()
    for name, place in known.items():
        if place in seen:  # the file of a tied model may hold the table twice; it is read once
            continue
        seen.add(place)
        count, dtype = math.prod(files.shape(name)), files.dtype(name)
        total += count * dtype.itemsize
        counts[dtype.name] += count
    return Weights(spec, counts.most_common(1)[0][0], total)


def num_parameters(spec: DecoderConfig) -> int:
    return sum(map(math.prod, param_shapes(spec).values()))


def itemsize(dtype: str) -> int:
    """Bytes of one number."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _named_dtype(directory: pathlib.Path, config: dict) -> str:
    """Newer configs say "dtype", older ones "torch_dtype"; without either it is float32."""
    text = config.get("text_config") or {}
    for part in (config, text):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return _known_dtype(directory, key, part[key])
    return "float32"


def _known_dtype(directory: pathlib.Path, key: str, name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{directory}/config.json: {key} {name!r} is not supported")
    return name
