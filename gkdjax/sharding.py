"""Where arrays lie: one mesh over the local devices, and how each of the decoder's leaves is cut.

Rows of a batch are cut over "data". Parameters are cut over "fsdp" (memory: gathered where they
are used) and over "tensor" (a product's output or its sum is cut with them).
"""

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gkdjax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Path regex -> how such a leaf is cut; the first that matches the whole path counts. Kernels are
# (L, in, out). A tensor-parallel pair (q, k, v, then o; gate and up, then down) is cut along what
# lies between the two, so that one sum over "tensor" is needed after the second alone.
RULES = (
    (r"layers/(q|k|v|gate|up)_proj", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/(o|down)_proj", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/[qkv]_bias", PartitionSpec(None, "tensor")),
    # [V, D]. Over "tensor" each device has logits of its own words; over "fsdp" a word's row is
    # cut, not the words, so that looking tokens up needs no device to search for them.
    (r"(un)?embedding", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?\w+_norm", PartitionSpec()),  # too small to be worth a gather
)


def make_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All local devices on the axes "data", "fsdp" and "tensor"; data has what the others leave.

    Raises:
      UserError: their number is no multiple of fsdp * tensor.
    """
    devices = jax.local_devices()
    if len(devices) % (fsdp * tensor):
        raise UserError(
            f"a mesh of fsdp={fsdp} and tensor={tensor} needs a multiple of {fsdp * tensor}"
            f" devices, and there are {len(devices)}"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def data_mesh() -> Mesh:
    """All local devices share the rows of a batch, and each holds every parameter whole."""
    return make_mesh()


def param_shardings(mesh: Mesh, shapes: dict[str, tuple[int, ...]]) -> dict[str, NamedSharding]:
    """How each leaf of a decoder lies on `mesh`, by `RULES`.

    Args:
      mesh: of `make_mesh`.
      shapes: leaf path -> shape, as `models.spec.param_shapes` has them.

    Raises:
      ValueError: no rule covers a leaf.
      UserError: an axis of the mesh does not divide the dimension that it cuts. Both are named.
    """
    return {path: _param_sharding(mesh, path, shape) for path, shape in shapes.items()}


def _param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    cut = next((cut for pattern, cut in RULES if re.fullmatch(pattern, path)), None)
    if cut is None:
        raise ValueError(f"no sharding rule covers the leaf {path!r}")
    for dimension, axis in enumerate(cut):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            raise UserError(
                f"{path}: dimension {dimension} of {shape} cannot be cut by the"
                f" {mesh.shape[axis]} devices of mesh axis {axis!r};"
                f" take {axis}={math.gcd(shape[dimension], mesh.shape[axis])}"
            )
    # Axes of one device are left out: jit takes P("fsdp") and P() for two programs, even then.
    named = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in cut]
    while named and named[-1] is None:
        named.pop()
    return NamedSharding(mesh, PartitionSpec(*named))


def check_rows(mesh: Mesh, key: str, rows: int) -> None:
    """Raises UserError if `rows` of config key `key` cannot be cut evenly over the data axis."""
    devices = mesh.shape["data"]
    if rows % devices:
        raise UserError(
            f"config.{key}: {rows} rows at once cannot be shared by {devices} devices;"
            f" the next number that can is {-(-rows // devices) * devices}"
        )


def replicate(mesh: Mesh, tree):
    """Every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def process_rows(rows: Sequence) -> Sequence:
    """Of the rows of a batch those that this process has to bring: [B] -> [B / processes].

    The processes' rows follow on each other in the order of their devices in a mesh of all of them.
    """
    share, rest = divmod(len(rows), jax.process_count())
    if rest:
        raise UserError(
            f"a batch of {len(rows)} rows cannot be shared by {jax.process_count()} processes;"
            f" the next number that can is {(share + 1) * jax.process_count()}"
        )
    return rows[jax.process_index() * share : (jax.process_index() + 1) * share]


def shard_rows(mesh: Mesh, tree):
    """Every leaf cut along its first axis, the rows of a batch.

    Args:
      mesh: with the devices of one process, or of all of them.
      tree: arrays that hold the rows of this process, see `process_rows`.
    """
    cut = NamedSharding(mesh, PartitionSpec("data"))
    if mesh.is_multi_process:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(cut, x), tree)
    return jax.device_put(tree, cut)
