"""Memory of named accelerators, as their makers give it."""

import re
from typing import NamedTuple

from gkdjax.utils.errors import UserError

RESERVE = 0.1  # share of a device's memory: the runtime, compiled programs, fragments

# Name -> (gigabytes of one device, devices for each number in the slice's name). v5p and TPU7x
# names count two to a chip, and a TPU7x chip is two JAX devices.
_GPUS = {"H100": 80, "H200": 141, "B200": 180, "cpu": None}  # None: unknown
_TPUS = {"v5e": (16, 1.0), "v5p": (95, 0.5), "v6e": (32, 1.0), "tpu7x": (96, 1.0)}


class Devices(NamedTuple):
    """Some devices of one kind, as JAX counts them."""

    name: str  # as the user wrote it
    count: int
    gigabytes: int | None  # of each; None: unknown

    @property
    def hbm_bytes(self) -> int | None:
        return None if self.gigabytes is None else self.gigabytes * 10**9

    @property
    def usable_bytes(self) -> int | None:
        return None if self.gigabytes is None else round(self.hbm_bytes * (1 - RESERVE))


def named(name: str) -> Devices:
    """Parses 8xH100, H200, v5e-8, v5p-32, cpu or 4xcpu; UserError names the known devices."""
    gpus = re.fullmatch(r"(?:(\d+)x)?(\w+)", name)
    if gpus and gpus[2] in _GPUS and gpus[1] != "0":
        return Devices(name, int(gpus[1] or 1), _GPUS[gpus[2]])
    tpus = re.fullmatch(r"(\w+)-(\d+)", name)
    if tpus and tpus[1] in _TPUS:
        gigabytes, each = _TPUS[tpus[1]]
        count = int(tpus[2]) * each
        if count >= 1 and count.is_integer():
            return Devices(name, int(count), gigabytes)
    known = ", ".join([*(f"8x{gpu}" for gpu in _GPUS), *(f"{tpu}-8" for tpu in _TPUS)])
    raise UserError(f"--chips={name}: no such devices are known; known, in any number: {known}")
