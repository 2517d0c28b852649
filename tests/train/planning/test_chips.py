"""Names of devices."""

import pytest

from gkdjax.train.planning import chips
from gkdjax.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "gigabytes"),
    [
        ("1xH200", 1, 141),
        ("8xH100", 8, 80),
        ("H100", 1, 80),
        ("2xB200", 2, 180),
        ("v5e-8", 8, 16),
        ("v5p-32", 16, 95),  # counts two to a chip
        ("v6e-8", 8, 32),
        ("tpu7x-32", 32, 96),  # 16 chips of two devices
    ],
)
def test_a_name_says_how_many_devices_of_what_size(name, count, gigabytes):
    found = chips.named(name)
    assert (found.name, found.count, found.hbm_bytes) == (name, count, gigabytes * 10**9)
    assert found.usable_bytes == pytest.approx(0.9 * gigabytes * 1e9)


def test_of_a_cpu_nothing_is_known():
    found = chips.named("4xcpu")
    assert (found.count, found.usable_bytes) == (4, None)


@pytest.mark.parametrize(
    "name", ["8xA100", "v4-8", "0xH100", "v5p-1", "v5e", "v5e-0", "", "H100-8"]
)
def test_an_unknown_name_is_told_the_known_ones(name):
    with pytest.raises(UserError, match=rf"--chips={name}: .*8xH100.*8xcpu, v5e-8.*tpu7x-8"):
        chips.named(name)
