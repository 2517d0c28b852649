"""Small models on a CPU get a device of each core, as many as share the batches evenly."""

import os

import pytest

from gkdjax import config, main

FLAG = "--xla_force_host_platform_device_count"


def flags_for(monkeypatch, model, rows: int, cores: int, given: str = "") -> str:
    c = config.default()
    c.student.model, c.data.train = str(model), [{"prompt": "a"}]
    c.train.batch_size = c.eval.batch_size = rows
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    main._share_cores(config.parse(c))
    return os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("rows", "cores", "devices"),
    [(64, 1, 1), (64, 2, 2), (64, 6, 4), (64, 96, 8), (6, 8, 1), (48, 8, 6)],
)
def test_the_devices_divide_the_rows_and_have_eight_each(
    monkeypatch, tmp_path, rows, cores, devices
):
    assert flags_for(monkeypatch, tmp_path, rows, cores) == f"{FLAG}={devices}"


def test_a_number_that_the_user_has_set_stays(monkeypatch, tmp_path):
    given = f"{FLAG}=3 --other"
    assert flags_for(monkeypatch, tmp_path, 64, 2, given) == given


def test_a_large_model_is_not_copied_to_every_core(monkeypatch, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(65 * 2**20)
    assert flags_for(monkeypatch, tmp_path, 64, 2) == ""
