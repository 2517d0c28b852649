"""The mesh of all devices, and how arrays are put on it and read back.

The rows of a batch are cut over "data" and "fsdp". Weights are cut over "fsdp" (to save memory: a
layer's are gathered while it computes) and over "tensor" (a product's output or its sum is cut with
them); `gkdjax.parallel.sharding_rules` has the rule for each leaf.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gkdjax.config.schema import MESH_AXES as AXES
from gkdjax.utils.errors import UserError

ROW_AXES = ("data", "fsdp")
ROWS = PartitionSpec(ROW_AXES)
WHOLE = PartitionSpec()


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn_data: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The devices, all by default, on the axes "data", "fsdp" and "tensor" of each slice.

    `dcn_data` is the number of slices (TPU), or of processes where devices know no slices, that a
    slower network joins. They share the rows only: the axis "data" has dcn_data * data devices,
    those of one slice side by side. One of the four numbers may be -1: what the others leave.

    Raises:
      UserError: their product is not the number of devices, or there are not dcn_data slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "dcn_data": dcn_data}
    sizes = mesh_sizes(sizes, len(devices))
    within = tuple(sizes[axis] for axis in AXES)
    auto = (AxisType.Auto,) * len(AXES)
    if sizes["dcn_data"] == 1:
        return jax.make_mesh(within, AXES, axis_types=auto, devices=devices)
    of_slices = all(hasattr(device, "slice_index") for device in devices)
    places = {d.slice_index if of_slices else d.process_index for d in devices}
    if len(places) != sizes["dcn_data"]:
        raise UserError(
            f"config.mesh.dcn_data = {sizes['dcn_data']}: the devices are in {len(places)}"
            f" {'slices' if of_slices else 'processes'}; set it to that number, or to 1"
        )
    how = {"devices": devices, "process_is_granule": not of_slices}
    grid = mesh_utils.create_hybrid_device_mesh(within, (sizes["dcn_data"], 1, 1), **how)
    return Mesh(grid, AXES, axis_types=auto)


def mesh_sizes(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The four numbers of `make_mesh` with the one that is -1 filled in.

    Raises:
      UserError: their product is not the number of devices.
    """
    given = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if open_axes and devices % given == 0:
        return sizes | {open_axes[0]: devices // given}
    if given == devices:
        return sizes
    # The nearest: as much of tensor and fsdp as the devices allow, and data for the rest.
    nearest, left = {}, devices
    for axis in ("tensor", "fsdp", "dcn_data"):
        nearest[axis] = math.gcd(abs(sizes[axis]), left)
        left //= nearest[axis]
    nearest["data"] = left
    product = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
    raise UserError(
        f"config.mesh: {product} needs {'a multiple of ' if open_axes else ''}{given} devices, and"
        f" there are {devices}; take {', '.join(f'{axis}={nearest[axis]}' for axis in sizes)}, or"
        " -1 for one of them: what the others leave"
    )


def row_shares(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def head_axes(mesh: Mesh) -> dict[str, Any]:
    """How `gkdjax.losses.fused` and `over_chunks` share the work of a head on this mesh."""
    return {"mesh": mesh, "row_axes": ROW_AXES, "vocab_axis": "tensor"}


def check_rows(mesh: Mesh, key: str, rows: int) -> None:
    """Raises UserError if `rows` of config key `key` cannot be cut evenly over data and fsdp."""
    shares = row_shares(mesh)
    if rows % shares:
        raise UserError(
            f"config.{key}: {rows} rows at once cannot be shared by {shares} devices;"
            f" the next number that can is {-(-rows // shares) * shares}"
        )


def replicate(mesh: Mesh, tree: Any):
    """Every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, WHOLE))


def holders(mesh: Mesh, rows: int) -> list[list[int]]:
    """The processes whose devices hold each of a batch's rows, ascending; several for "tensor"."""
    held: list[set[int]] = [set() for _ in range(rows)]
    for device, index in NamedSharding(mesh, ROWS).devices_indices_map((rows,)).items():
        for row in range(rows)[index[0]]:
            held[row].add(device.process_index)
    return [sorted(processes) for processes in held]


def shard_rows(mesh: Mesh, tree: Any):
    """Every leaf cut along its first axis, the rows of a batch.

    The arrays are the same on every process; each sends its devices their own rows only.
    """
    rows = NamedSharding(mesh, ROWS)

    def shard(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, rows)
        return jax.make_array_from_callback(np.shape(x), rows, np.asarray(x).__getitem__)

    return jax.tree.map(shard, tree) if mesh.is_multi_process else jax.device_put(tree, rows)


def fetch(tree: Any):
    """NumPy arrays, whole, on every process; all of them must call it."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        everywhere = NamedSharding(x.sharding.mesh, WHOLE)
        return jax.jit(lambda x: x, out_shardings=everywhere)(x)

    return jax.device_get(jax.tree.map(whole, tree))
