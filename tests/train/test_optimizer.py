"""The schedules at their ends, and the optimizer by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkdjax.config import Optim
from gkdjax.train import optimizer as train_optimizer

PEAK = 0.5


def rates(schedule: str, warmup_ratio: float, steps: int) -> np.ndarray:
    """The rate of each step, and of the one after the last."""
    config = Optim(learning_rate=PEAK, schedule=schedule, warmup_ratio=warmup_ratio)
    function = train_optimizer.schedule(config, steps)
    return np.array([float(function(jnp.int32(step))) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("warmup_ratio", "steps", "warmup"),
    [(0.0, 10, 0), (0.1, 10, 1), (0.4, 10, 4), (1.0, 10, 10), (0.03, 1, 0), (1.0, 2, 2)],
)
def test_warm_up_ramps_to_the_peak_and_the_rest_decays_from_it(
    schedule, warmup_ratio, steps, warmup
):
    got = rates(schedule, warmup_ratio, steps)
    assert (got[:steps] > 0).all()  # the 0 lies behind the last step
    ramp = PEAK * np.arange(1, warmup + 1) / max(warmup, 1)
    np.testing.assert_allclose(got[:warmup], ramp, rtol=1e-6)
    done = np.arange(steps - warmup + (warmup < steps)) / max(steps - warmup, 1)
    wanted = {
        "cosine": PEAK * (1 + np.cos(np.pi * done)) / 2,
        "linear": PEAK * (1 - done),
        "constant": np.full_like(done, PEAK),
    }[schedule]
    np.testing.assert_allclose(got[warmup : warmup + len(done)], wanted, atol=1e-6)


def test_two_steps_of_adamw_behind_the_clip():
    config = Optim(PEAK, "linear", warmup_ratio=0.0, max_grad_norm=2.0, weight_decay=0.1)
    optimizer = train_optimizer.optimizer(config, 4)
    update = jax.jit(optimizer.update)
    w = np.array([1.0, -2.0, 3.0])
    params, state = {"w": jnp.asarray(w, jnp.float32)}, optimizer.init({"w": jnp.zeros(3)})
    m = v = np.zeros(3)
    for step, grad in enumerate((np.array([3.0, 0.0, 4.0]), np.array([0.1, -0.2, 0.0]))):
        updates, state = update({"w": jnp.asarray(grad, jnp.float32)}, state, params)
        grad = grad * min(1.0, 2.0 / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        direction = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        wanted = -PEAK * (1 - step / 4) * (direction + 0.1 * w)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-4)
        w = w + wanted
        params = {"w": params["w"] + updates["w"]}
    assert Optim().weight_decay == 0.0
