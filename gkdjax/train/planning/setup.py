"""Describes a run to be planned: its models, from config.json and the headers of tensor files, and
one device's part of each."""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from gkdjax.config import Config, Lora
from gkdjax.models import padding
from gkdjax.models.decoder_config import DecoderConfig, layer_shapes, param_shapes
from gkdjax.models.hf import hub, model_config
from gkdjax.models.hf.load import tensor_places
from gkdjax.models.hf.tensor_files import TensorFiles
from gkdjax.parallel.mesh import AXES, mesh_sizes, row_shares
from gkdjax.parallel.sharding_rules import ShardingRules
from gkdjax.train.planning import activations
from gkdjax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
    """A model on one device of a mesh; counts are of numbers, not of bytes."""

    spec: DecoderConfig  # of the whole model
    layout: ShardingRules

    @functools.cached_property
    def local(self) -> DecoderConfig:
        """The decoder that one device computes: its heads, MLP width and vocabulary.

        Where "tensor" exceeds the key-value heads, each device multiplies with one.
        """
        spec, tensor = self.spec, self.layout.mesh.shape["tensor"]
        return dataclasses.replace(
            spec,
            num_heads=spec.num_heads // tensor,
            num_kv_heads=max(spec.num_kv_heads // tensor, 1),
            ffn_width=spec.ffn_width // tensor,
            vocab_size=spec.vocab_size // tensor,
        )

    @property
    def gathers(self) -> bool:
        """Whether "fsdp" shards the weights, so that they are gathered before use."""
        return self.layout.mesh.shape["fsdp"] > 1

    @functools.cached_property
    def held(self) -> int:
        """Parameters that lie on the device."""
        return _count(self.layout, param_shapes(self.spec))

    @functools.cached_property
    def gathered(self) -> int:
        """Parameters once they are gathered over "fsdp"."""
        return _count(self._gathered, param_shapes(self.spec))

    @functools.cached_property
    def layer(self) -> int:
        """Parameters of one layer, gathered."""
        return _count(self._gathered, self._layer_paths) // self.spec.num_layers

    @functools.cached_property
    def kernels(self) -> int:
        """Parameters of all layers' kernels, gathered."""
        shapes = self._layer_paths.items()
        return _count(self._gathered, {path: s for path, s in shapes if path.endswith("_proj")})

    @property
    def table(self) -> int:
        """Parameters of an embedding or unembedding, gathered."""
        return self.local.vocab_size * self.spec.width

    def held_of(self, leaves) -> int:
        """Counts a tree of `jax.ShapeDtypeStruct`s that the layout's rules cover."""
        places = jax.tree.leaves(self.layout.shardings_of(leaves))
        pairs = zip(jax.tree.leaves(leaves), places, strict=True)
        return sum(math.prod(place.shard_shape(leaf.shape)) for leaf, place in pairs)

    def kv_numbers(self, slots: int) -> int:
        """Keys and values of one row; local layers keep at most their window."""
        spec = self.spec
        full = sum(spec.is_global_L)
        local = (spec.num_layers - full) * min(slots, spec.window or slots)
        return 2 * self.kv_heads * spec.head_dim * (full * slots + local)

    @property
    def kv_heads(self) -> int:
        """Key-value heads; all of them where "tensor" does not divide them."""
        heads, tensor = self.spec.num_kv_heads, self.layout.mesh.shape["tensor"]
        return heads if heads % tensor else heads // tensor

    @property
    def _layer_paths(self) -> dict[str, tuple[int, ...]]:
        return {f"layers/{name}": shape for name, shape in layer_shapes(self.spec).items()}

    @property
    def _gathered(self) -> ShardingRules:
        sizes = self.layout.mesh.shape
        mesh = AbstractMesh((sizes["data"] * sizes["fsdp"], 1, sizes["tensor"]), AXES)
        return dataclasses.replace(self.layout, mesh=mesh)


def _count(layout: ShardingRules, shapes: Mapping[str, tuple[int, ...]]) -> int:
    places = ((layout.sharding_of(path, shape), shape) for path, shape in shapes.items())
    return sum(math.prod(place.shard_shape(shape)) for place, shape in places)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters in a checkpoint."""

    spec: DecoderConfig
    stored_dtype: str  # of most parameters
    stored_bytes: int

    @classmethod
    def of(cls, spec: DecoderConfig, dtype: str) -> "Weights":
        return cls(spec, dtype, num_parameters(spec) * itemsize(dtype))

    def dtype(self, wanted: str | None) -> str:
        """Returns the dtype in memory; `wanted` None means the checkpoint's."""
        return wanted or self.stored_dtype

    def nbytes(self, wanted: str | None) -> int:
        """Returns the bytes in memory; `wanted` None means the checkpoint's dtypes."""
        return num_parameters(self.spec) * itemsize(wanted) if wanted else self.stored_bytes

    def nbytes_of(self, shard: Shard, wanted: str | None) -> int:
        """Returns one device's bytes, by the mean where the checkpoint has several dtypes."""
        return self.nbytes(wanted) * shard.held // num_parameters(self.spec)


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """A run on a mesh of devices, to be planned."""

    config: Config
    student: Weights
    teacher: Weights | None  # a model of its own in this process; None: there is none
    toggles: bool  # the teacher is the student's base
    mesh: AbstractMesh  # as `mesh_of` has it

    @property
    def full(self) -> bool:
        """Whether all parameters are trained."""
        return self.config.student.adapter == "none"

    @property
    def rules(self) -> Lora | None:
        return None if self.full else self.config.student.lora

    @property
    def student_dtype(self) -> str:
        """Dtype of the student's parameters that a step computes with."""
        return "float32" if self.full else self.student.dtype(self.config.student.dtype)

    @property
    def adapters(self) -> dict:
        """Shapes of the adapters; UserError for targets that match no kernel."""
        return activations.adapters(self.student.spec, self.student_dtype, self.rules)

    @property
    def trained_bytes(self) -> int:
        """Bytes of what is trained, in float32, on all devices together."""
        shapes = param_shapes(self.student.spec).values()
        leaves = shapes if self.full else (x.shape for x in jax.tree.leaves(self.adapters))
        return 4 * sum(map(math.prod, leaves))

    @functools.cached_property
    def of_student(self) -> Shard:
        """The student on one device; UserError where the mesh does not divide it."""
        return self._shard(self.student.spec, self.config.mesh.student_rules)

    @functools.cached_property
    def of_teacher(self) -> Shard | None:
        """The teacher of this process on one device."""
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
        """Whether anything reads the untrained student during training; see `train.setup`."""
        c = self.config
        anchored = c.anchor.data is not None and c.anchor.reference == "base"
        compared = c.eval.side_effects is not None or bool(c.eval.retention)
        return self.toggles or anchored or compared

    def rows(self, key: str) -> int:
        """Returns the rows of a batch ("train", "anchor" or "eval") on one device."""
        return getattr(self.config, key).batch_size // row_shares(self.mesh)

    @property
    def length(self) -> int:
        """Positions of the longest row, padded."""
        c = self.config.data
        return max(c.bucket_lengths) if c.bucket_lengths else padding.round_up(c.max_length, ())


def read(config: Config, devices: int) -> PlanInputs:
    """Reads the configs and headers of the models; from the hub, the small files only.

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
    """Returns the run's mesh on so many devices; UserError as `parallel.mesh.mesh_sizes`."""
    sizes = _sizes(config, devices)
    return AbstractMesh((sizes["dcn_data"] * sizes["data"], sizes["fsdp"], sizes["tensor"]), AXES)


def on_mesh(inputs: PlanInputs, **sizes: int) -> PlanInputs:
    """Returns the run on a mesh of other sizes of the same devices; UserError as `mesh_of`."""
    mesh = dataclasses.replace(inputs.config.mesh, **sizes)
    config = dataclasses.replace(inputs.config, mesh=mesh)
    return dataclasses.replace(inputs, config=config, mesh=mesh_of(config, inputs.mesh.size))


def _sizes(config: Config, devices: int) -> dict[str, int]:
    return mesh_sizes({axis: getattr(config.mesh, axis) for axis in (*AXES, "dcn_data")}, devices)


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
    total, counts = 0, collections.Counter()
    # The file of a tied model may hold the table twice; it is read once.
    for name in {place: name for name, place in reversed(known.items())}.values():
        count, dtype = math.prod(files.shape(name)), files.dtype(name)
        total += count * dtype.itemsize
        counts[dtype.name] += count
    return Weights(spec, counts.most_common(1)[0][0], total)


def num_parameters(spec: DecoderConfig) -> int:
    return sum(map(math.prod, param_shapes(spec).values()))


def itemsize(dtype: str) -> int:
    """Returns the bytes of one number."""
    return np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize


def _named_dtype(directory: pathlib.Path, config: dict) -> str:
    """Reads "dtype", or "torch_dtype" of older configs; without either it is float32."""
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            if name and name not in ("float32", "bfloat16", "float16"):
                raise UserError(f"{directory}/config.json: {key} {name!r} is not supported")
            if name:
                return name
    return "float32"
