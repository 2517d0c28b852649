"""Bytes on one device, by part: what lies there all the time, and what each phase adds to it.

Weights, adapters and the optimizer's state are cut as `gkdjax.layout` cuts them, rows over "data"
and "fsdp". Between layers a row's states are whole over "tensor"; within one, heads and MLP width
are cut; one layer's weights at a time are gathered over "fsdp".

Upper bounds where the data decide: every row is as long as the longest that is allowed. Left out:
the second state that a run has for a moment when it continues from a checkpoint; a
`teacher.adapter`; what devices exchange gradients through; what XLA copies for speed.
"""

from gkdjax.planning import activations, parts, texts
from gkdjax.planning.models import Setup, itemsize
from gkdjax.planning.parts import Parts, total


def lower_bound(setup: Setup) -> Parts:
    """What lies there at the first step for certain, whatever the rows are."""
    trainable, shard = parts.trained(setup), setup.of_student
    found = {"student, as loaded": setup.student.nbytes_of(shard, setup.config.student.dtype)}
    found["student, float32" if setup.full else "adapters"] = trainable
    found["optimizer state"] = 2 * trainable
    if setup.teacher is not None:
        dtype = setup.config.teacher.dtype
        found["teacher"] = setup.teacher.nbytes_of(setup.of_teacher, dtype)
    return found


def held(setup: Setup) -> Parts:
    """What lies there from the first step to the last."""
    found, c = lower_bound(setup), setup.config
    loaded = found.pop("student, as loaded")
    if not setup.full:
        found = {"student, frozen": loaded} | found
    elif setup.keeps_base:
        found["student, frozen second copy"] = loaded
    if c.student.lora.start_from:
        found["adapters to start from"] = parts.trained(setup)
    if setup.of_teacher is not None:
        found["teacher's prefixes, at most"] = texts.prefixes(setup, setup.of_teacher)
    return found


def training_step(setup: Setup) -> Parts:
    """The largest moment of an optimizer step: the head, the backward pass or the update."""
    c, trainable = setup.config, parts.trained(setup)
    shared = {"batches and teacher's targets": parts.targets(setup)}
    # XLA reads all parts (the batch and each anchor) forward before it goes back through any, and
    # the loops that go back through them share no memory.
    passes = [
        activations.kept(_pass(setup, rows // c.train.accumulation), c.train.remat)
        for rows, _ in parts.training_rows(setup)
    ]
    all_layers = sum(each.all_layers - _cast_again(setup) for each in passes)
    kept = {"activations": all_layers, "tables": _tables(setup)}
    carried = trainable if c.train.accumulation > 1 else 0
    weights = parts.layer_weights(setup, setup.of_student)
    one_layer = sum(each.one_layer + each.largest + weights for each in passes)
    moments = (
        kept | {"head": parts.head(setup), "gradients": carried},
        kept | {"one layer's backward pass": one_layer, "gradients": carried + trainable},
        {"gradients and update": 2 * trainable},
    )
    return shared | max(moments, key=total)


def teacher_forward(setup: Setup) -> Parts:
    """A model in this process reads a whole batch, or an anchor's: it is not cut in parts."""
    read = [
        parts.forward(setup, shard, rows)
        for rows, shard in parts.training_rows(setup)
        if shard is not None
    ]
    if not read:
        return {}
    found = {"batches and teacher's targets": parts.targets(setup), "one layer's pass": max(read)}
    if setup.config.teacher.top_k is not None and setup.of_teacher is not None:
        found["search for the top k"] = parts.head(setup)
    return found


def _pass(setup: Setup, rows: int) -> activations.Pass:
    return activations.Pass(
        setup.of_student.local,
        parts.student_dtype(setup),
        setup.config.student.compute_dtype,
        setup.rules,
        rows,
        setup.length,
    )


def _cast_again(setup: Setup) -> int:
    """Kernels in the compute dtype, which a mesh that cuts weights does not keep for the way back.

    See `layout.all_but_gathered_weights`.
    """
    shard, compute = setup.of_student, setup.config.student.compute_dtype
    none = setup.config.train.remat or parts.student_dtype(setup) == compute
    if none or not shard.layout.cuts_weights:
        return 0
    return shard.kernels * itemsize(compute)


def _tables(setup: Setup) -> int:
    """Of a training step: the head's own gradient to a table that is looked up, too."""
    tied = setup.student.spec.tied_embedding
    gradient = 4 * setup.of_student.table if setup.full and tied else 0
    return parts.tables(setup) + gradient
