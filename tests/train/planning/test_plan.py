"""The peak, and what to change if it is too much."""

import pytest
from planning_setups import setup

from gkdjax.train.planning import advice, plan
from gkdjax.train.planning.memory import total
from gkdjax.utils.errors import UserError


def test_phases_do_not_add_up():
    made = plan.make(setup(train__batch_size=8))
    sizes = [total(parts) for parts in made.phases.values()]
    assert len(sizes) == 4 and made.peak == total(made.held) + max(sizes)
    assert made.least < total(made.held) < made.peak


def test_rows_that_the_devices_cannot_share_are_refused_as_the_run_does():
    message = r"config\.train\.batch_size: 6 rows at once cannot be shared by 4 devices; .* 8"
    with pytest.raises(UserError, match=message):
        plan.make(setup(devices=4, train__batch_size=6))


def test_adapters_that_fit_no_kernel_are_refused():
    of = setup()
    lora = of.config.student.lora
    object.__setattr__(lora, "targets", ("no_proj",))
    with pytest.raises(UserError, match=r"config\.student\.lora\.targets: .*no_proj"):
        plan.make(of)


def test_a_change_saves_what_the_peak_loses():
    of = setup(train__batch_size=16)
    before = plan.make(of).peak
    found = advice.changes(of, limit=0, best=None)
    assert 0 < len(found) <= 3
    assert [c.saves for c in found] == sorted((c.saves for c in found), reverse=True)
    remat = next(c for c in found if c.settings == {"train.remat": True})
    assert remat.saves == before - plan.make(setup(train__batch_size=16, train__remat=True)).peak


def settings(of, limit) -> dict:
    """Of all changes, in their order."""
    changes = advice.changes(of, limit, best=None)
    return {key: value for change in changes for key, value in change.settings.items()}


def test_a_number_is_lowered_no_further_than_it_must_be():
    of = setup(train__batch_size=16)
    limit = plan.make(setup(train__batch_size=16, train__accumulation=4)).peak
    assert settings(of, limit)["train.accumulation"] == 4


def test_what_is_done_already_or_saves_nothing_is_not_proposed():
    """All memory is the optimizer's: activations, heads and teachers are not the matter."""
    of = setup(
        "bfloat16",
        student__adapter="none",
        teacher__backend="vllm",
        teacher__api_base="http://127.0.0.1:1/v1",
        data__max_length=16,
        train__batch_size=1,
        train__remat=True,
        eval__batch_size=1,
        gkd__chunk_size=1,
    )
    assert settings(of, 0).keys() <= {"student.adapter", "student.compute_dtype"}
    assert next(iter(settings(of, 0))) == "student.adapter"


def test_an_anchor_is_cut_in_as_many_parts_as_the_batch():
    of = setup(train__batch_size=16, anchor__data=[{"prompt": "?"}], anchor__batch_size=6)
    assert settings(of, 0)["train.accumulation"] == 2
