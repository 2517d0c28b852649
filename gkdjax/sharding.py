"""Where arrays lie: one mesh over the local devices, whose data axis cuts the batch."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gkdjax.errors import UserError


def data_mesh() -> Mesh:
    """All local devices on one axis, "data"."""
    devices = np.asarray(jax.local_devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def check_rows(mesh: Mesh, key: str, rows: int) -> None:
    """Raises UserError if `rows` of config key `key` cannot be cut evenly over the devices."""
    if rows % mesh.size:
        raise UserError(
            f"config.{key}: {rows} rows at once cannot be shared by {mesh.size} devices;"
            f" the next number that can is {-(-rows // mesh.size) * mesh.size}"
        )


def replicate(mesh: Mesh, tree):
    """Every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(mesh: Mesh, tree):
    """Every leaf cut along its first axis, the rows of a batch."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))
