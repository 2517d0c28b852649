"""What accelerators have, and what several of them are called.

All numbers are their makers' peaks. The interconnect's is what a device sends, half of what makers
give for both directions together (ICI of a TPU, NVLink of a GPU); devices beyond one NVLink domain
count as if they were in it. For the data-centre network, 25 GB/s for each host are assumed.
"""

import re
from typing import NamedTuple

from gkdjax.utils.errors import UserError

# Of a device's memory: the runtime, the compiled programs, and what fragments.
RESERVE = 0.1


class Chip(NamedTuple):
    """One device as JAX counts them."""

    name: str
    hbm_bytes: int | None  # None: unknown, as of a CPU
    bf16_flops: float | None  # a second, at its peak
    hbm_bytes_per_s: float | None
    link_bytes_per_s: float | None  # sent to the other devices of a slice
    network_bytes_per_s: float | None  # its share of what a host sends to other slices

    @property
    def usable_bytes(self) -> int | None:
        return None if self.hbm_bytes is None else round(self.hbm_bytes * (1 - RESERVE))


class Devices(NamedTuple):
    """So many of one chip."""

    name: str  # as the user wrote it
    chip: Chip
    count: int


_HOST_BYTES_PER_S = 25e9


def _chip(name: str, tflops: float, *gigabytes: float, host: int = 8) -> Chip:
    """`gigabytes` of memory, and each second to memory and to other devices; devices of a host."""
    memory, memory_per_s, link_per_s = gigabytes
    return Chip(
        name,
        round(memory * 1e9),
        tflops * 1e12,
        memory_per_s * 1e9,
        link_per_s * 1e9,
        _HOST_BYTES_PER_S / host,
    )


_GPUS = {
    "H100": _chip("H100", 989, 80, 3350, 450),
    "H200": _chip("H200", 989, 141, 4800, 450),
    "B200": _chip("B200", 2250, 180, 8000, 900),
    "cpu": Chip("cpu", None, None, None, None, None),
}
# Name -> (chip, devices for each number in the slice's name). A v5p or TPU7x name counts two to a
# chip, and a TPU7x chip is two JAX devices.
_TPUS = {
    "v5e": (_chip("TPU v5e", 197, 16, 819, 200), 1.0),
    "v5p": (_chip("TPU v5p", 459, 95, 2765, 600, host=4), 0.5),
    "v6e": (_chip("TPU v6e", 918, 32, 1638, 400), 1.0),
    "tpu7x": (_chip("half a TPU7x", 2307 / 2, 96, 3690, 300), 1.0),
}


def named(name: str) -> Devices:
    """8xH100, H200, v5e-8, v5p-32, cpu, 4xcpu -> the devices.

    Raises:
      UserError: an unknown name, with those that are known.
    """
    gpus = re.fullmatch(r"(?:(\d+)x)?(\w+)", name)
    if gpus is not None and gpus[2] in _GPUS and gpus[1] != "0":
        return Devices(name, _GPUS[gpus[2]], int(gpus[1] or 1))
    tpus = re.fullmatch(r"(\w+)-(\d+)", name)
    if tpus is not None and tpus[1] in _TPUS:
        chip, each = _TPUS[tpus[1]]
        count = int(tpus[2]) * each
        if count >= 1 and count == int(count):
            return Devices(name, chip, int(count))
    known = ", ".join([*(f"8x{gpu}" for gpu in _GPUS), *(f"{tpu}-8" for tpu in _TPUS)])
    raise UserError(f"--chips={name}: no such devices are known; known, in any number: {known}")
