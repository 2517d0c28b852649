"""What a step sends, counted by hand."""

import pytest
from planning_setups import setup

from gkdjax.train.planning import chips, collectives, flops

ADAPTERS = 6 * 64 * ((256 + 256) + 2 * (256 + 64) + (256 + 256) + 3 * (256 + 1024)) * 4
TABLE = 4096 * 256 * 4
SUM = 8 * 128 * 256 * 4  # bytes of the states of eight rows


def sent(**changes) -> dict[str, float]:
    changes = {"devices": 8, "train__batch_size": 8, "trajectory__max_new_tokens": 16} | changes
    return {each.name: each.bytes_sent for each in collectives.step(setup(**changes))}


def test_data_parallel_devices_add_up_the_gradients_of_what_is_trained():
    assert sent() == {"gradients, over data": 2 * 7 / 8 * ADAPTERS}
    assert sent(devices=1) == {}
    full = {"student__adapter": "none", "teacher__backend": "flax"}
    parameters = setup().of_student.held * 4
    # The table's twice, by the look-up and by the head.
    assert sent(**full)["gradients, over data"] == 2 * 7 / 8 * (parameters + TABLE)
    # Each part of the batch by itself, and each anchor.
    parts = sent(devices=2, train__accumulation=4)
    assert parts == {"gradients, over data": 4 * ADAPTERS}
    anchored = sent(devices=2, anchor__data=[{"prompt": "?"}])
    assert anchored == {"gradients, over data": 2 * ADAPTERS}


def test_slices_exchange_what_each_has_added_up():
    found = sent(mesh__dcn_data=2)
    assert found["gradients, over data"] == 2 * 3 / 4 * ADAPTERS
    assert found["gradients, over slices"] == 2 * 1 / 2 * ADAPTERS / 4


def test_fsdp_gathers_twice_and_sends_gradients_back():
    changes = {"teacher__backend": "flax", "mesh__fsdp": 8}
    of = setup(devices=8, train__batch_size=8, **changes)
    student, teacher = (shard.gathered * 4 for shard in (of.of_student, of.of_teacher))
    layers = student - TABLE - 256 * 4  # the last norm
    assert sent(**changes) == {
        "weights, over fsdp": 7 / 8 * (student + layers + teacher),
        "gradients, over fsdp": 7 / 8 * ADAPTERS,
    }
    anchored = sent(anchor__data=[{"prompt": "?"}], anchor__batch_size=8, **changes)
    # Its rows are read by the student, and by the student as it was.
    assert anchored["weights, over fsdp"] == 7 / 8 * (3 * student + 2 * layers + teacher)
    assert anchored["gradients, over fsdp"] == 7 / 8 * 2 * ADAPTERS
    writes = sent(gkd__on_policy_fraction=0.5, **changes)
    assert writes["weights, over fsdp"] == 7 / 8 * (1.5 * student + layers + teacher)


def test_tensor_adds_up_states_twice_a_layer_and_way():
    changes = {"devices": 4, "mesh__tensor": 4}
    # Student there and back, the toggled teacher there; the look-up too; 16 targets of the head.
    states = (3 * 13 + 16 / 128) * SUM
    assert sent(**changes) == {"activations, over tensor": 2 * 3 / 4 * states}
    again = sent(train__remat=True, **changes)["activations, over tensor"]
    assert again == 2 * 3 / 4 * (states + 13 * SUM)


def messages(tensor: int = 4, **changes) -> dict[str, float]:
    of = setup(devices=4, train__batch_size=8, mesh__tensor=tensor, **changes)
    return {each.name: each.messages for each in collectives.step(of)}


def test_short_messages_are_counted_as_tokens_are_drawn_one_by_one():
    assert messages(tensor=1, train__accumulation=2) == {"gradients, over data": 2 * 6}
    assert messages() == {"activations, over tensor": 3 * 13 + 1}
    writes = messages(gkd__on_policy_fraction=0.5)["activations, over tensor"]
    assert writes == 3 * 13 + 1 + 0.5 * (1 + 128) * 13


def test_seconds_are_of_the_network_that_is_used():
    v5p = chips.named("v5p-16").chip
    within = collectives.seconds(collectives.Exchange("any", 6e9, 5), v5p)
    between = collectives.seconds(collectives.Exchange("any", 6e9, 0, between_slices=True), v5p)
    assert within == pytest.approx(0.01 / 0.6 + 5e-5)
    assert between == pytest.approx(6e9 / (25e9 / 4) / 0.6)
    cpu = chips.named("cpu").chip
    assert collectives.seconds(collectives.Exchange("any", 6e9, 1), cpu) is None


def test_a_step_takes_its_computing_and_its_messages():
    of, chip = setup(devices=8, train__batch_size=8), chips.named("8xH100").chip
    computing = sum(flops.seconds(work, of, chip) for work in flops.step(of))
    messages = 2 * 7 / 8 * ADAPTERS / (450e9 * 0.6) + 6 * 1e-5
    assert collectives.whole_step(of, chip) == pytest.approx(computing + messages)
    assert collectives.whole_step(of, chips.named("8xcpu").chip) is None
