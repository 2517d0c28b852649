"""Bytes on one device, by part: what lies there all the time, and what each phase adds to it.

A run lays out data-parallel: each device holds all weights (`held`, `lower_bound`) and its share of
the rows (the phases). A layout that cuts weights would divide the former alone.

Upper bounds where the data decide: every row is as long as the longest that is allowed. Left out:
the second state that a run has for a moment when it continues from a checkpoint; a
`teacher.adapter`; what devices exchange gradients through; what XLA copies for speed.
"""

import math

import jax

from gkdjax.config import anchor_sets
from gkdjax.config_checks import SERVERS
from gkdjax.models.spec import DecoderSpec, layer_shapes
from gkdjax.planning import activations
from gkdjax.planning.models import Setup, itemsize, num_parameters

Parts = dict[str, int]  # name -> bytes

# Arrays [rows, heads, length, length] of float32 that attention holds at once: scores, masked
# scores, weights; and [rows, length, ffn width] of the MLP.
_SCORES, _MLP = 3, 2
_LOGITS = 5  # [rows, V] float32 while a token is drawn: logits, scaled, probabilities, sums, masks
_MERGED = 3  # float32 arrays of one stacked kernel while an adapter is merged into it


def lower_bound(setup: Setup) -> Parts:
    """What lies there at the first step for certain, whatever the rows are."""
    trainable, student = _trainable(setup), setup.config.student.dtype
    parts = {"student, as loaded": setup.student.nbytes(student)}
    parts["student, float32" if setup.full else "adapters"] = trainable
    parts["optimizer state"] = 2 * trainable
    if setup.teacher is not None:
        parts["teacher"] = setup.teacher.nbytes(setup.config.teacher.dtype)
    return parts


def held(setup: Setup) -> Parts:
    """What lies there from the first step to the last."""
    parts, c = lower_bound(setup), setup.config
    loaded = parts.pop("student, as loaded")
    if not setup.full:
        parts = {"student, frozen": loaded} | parts
    elif setup.keeps_base:
        parts["student, frozen second copy"] = loaded
    if c.student.lora.start_from:
        parts["adapters to start from"] = _trainable(setup)
    if setup.in_process is not None:
        parts["teacher's prefixes, at most"] = _prefixes(setup, setup.in_process.spec)
    return parts


def training_step(setup: Setup) -> Parts:
    """The largest moment of an optimizer step: the head, the backward pass or the update."""
    c, trainable = setup.config, _trainable(setup)
    shared = {"batches and teacher's targets": _targets(setup)}
    # XLA reads all parts (the batch and each anchor) forward before it goes back through any, and
    # the loops that go back through them share no memory.
    passes = [
        activations.kept(_pass(setup, rows // c.train.accumulation), c.train.remat)
        for rows, _ in _training_rows(setup)
    ]
    kept = {"activations": sum(each.all_layers for each in passes), "tables": _tables(setup)}
    carried = trainable if c.train.accumulation > 1 else 0
    weights = _layer_weights(setup.student.spec, c.student.compute_dtype)
    one_layer = sum(each.one_layer + each.largest + weights for each in passes)
    moments = (
        kept | {"head": _head(setup), "gradients": carried},
        kept | {"one layer's backward pass": one_layer, "gradients": carried + trainable},
        {"gradients and update": 2 * trainable},
    )
    return shared | max(moments, key=total)


def teacher_forward(setup: Setup) -> Parts:
    """A model in this process reads a whole batch, or an anchor's: it is not cut in parts."""
    read = [_forward(setup, spec, rows) for rows, spec in _training_rows(setup) if spec is not None]
    if not read:
        return {}
    parts = {"batches and teacher's targets": _targets(setup), "one layer's pass": max(read)}
    if setup.config.teacher.top_k is not None and setup.in_process is not None:
        parts["search for the top k"] = _head(setup)
    return parts


def sampling(setup: Setup) -> Parts:
    """The student's or the teacher's writing of training text, whichever takes more."""
    new, writers = setup.config.trajectory.max_new_tokens, []
    if setup.config.gkd.on_policy_fraction > 0:
        writers.append(_writing(setup, setup.student.spec, setup.rows("train"), new))
    if setup.in_process is not None:
        writers.append(_writing(setup, setup.in_process.spec, setup.rows("eval"), new))
    return max(writers, key=total, default={})


def evaluation(setup: Setup) -> Parts:
    """Greedy answers and distances; adapters are merged into a copy of the kernels."""
    c, rows, model = setup.config.eval, setup.rows("eval"), setup.in_process
    specs = [setup.student.spec] if model is None else [setup.student.spec, model.spec]
    moments = [_writing(setup, spec, rows, c.max_new_tokens) for spec in specs]
    read = max(_forward(setup, spec, rows) for spec in specs)
    moments.append({"one layer's pass": read, "head": _head(setup), "tables": _cast(setup)})
    parts = max(moments, key=total)
    if not setup.full:
        parts["student, adapters merged"] = _merged(setup)
    texts = -(-c.rows // setup.devices) * c.max_new_tokens
    parts["texts' targets"] = texts * _target_bytes(setup, model and model.spec)
    parts["student's prefixes, at most"] = _prefixes(setup, setup.student.spec)
    return parts


def total(parts: Parts) -> int:
    return sum(parts.values())


def _trainable(setup: Setup) -> int:
    if setup.full:
        return num_parameters(setup.student.spec) * 4
    return adapter_parameters(setup) * 4


def adapter_parameters(setup: Setup) -> int:
    """Raises UserError for targets that match no kernel."""
    shapes = activations.adapters(setup.student.spec, _student_dtype(setup), setup.rules)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _pass(setup: Setup, rows: int) -> activations.Pass:
    return activations.Pass(
        setup.student.spec,
        _student_dtype(setup),
        setup.config.student.compute_dtype,
        setup.rules,
        rows,
        setup.length,
    )


def _training_rows(setup: Setup) -> list[tuple[int, DecoderSpec | None]]:
    """(rows of one device, who teaches them in this process) of the batch and of each anchor."""
    anchor, teacher = setup.config.anchor, setup.in_process and setup.in_process.spec
    parts = [(setup.rows("train"), teacher)]
    spec = setup.student.spec if anchor.towards == "base" else teacher
    return parts + [(setup.rows("anchor"), spec) for _ in anchor_sets(anchor)]


def _targets(setup: Setup) -> int:
    """Ids, places and masks of both views, and what the teacher said, of all rows of a step."""
    batch = 6 * 4 + 3  # bytes a position
    return sum(
        rows * setup.length * (batch + _target_bytes(setup, spec))
        for rows, spec in _training_rows(setup)
    )


def _target_bytes(setup: Setup, spec: DecoderSpec | None) -> int:
    """Of one target: hidden states of a model in this process, or the best K tokens."""
    c, server = setup.config, setup.config.teacher.backend in SERVERS
    if spec is None or (c.teacher.top_k is not None and not server):
        return 8 * (c.teacher.top_k or 0) + 8  # of a teacher that was handed in, K is unknown
    return spec.width * itemsize(c.student.compute_dtype)


def _head(setup: Setup) -> int:
    return setup.config.gkd.chunk_size * setup.student.spec.vocab_size * 4


def _tables(setup: Setup) -> int:
    """Of a training step: casts, and the head's own gradient to a table that is looked up, too."""
    spec = setup.student.spec
    gradient = 4 * math.prod(_table(spec)) if setup.full and spec.tied_embedding else 0
    return _cast(setup) + gradient


def _cast(setup: Setup) -> int:
    """Unembeddings that are not stored in the compute dtype are cast as a whole."""
    c, compute = setup.config, setup.config.student.compute_dtype
    heads = [(setup.student.spec, _student_dtype(setup))]
    if c.teacher.top_k is None and setup.teacher is not None:
        heads.append((setup.teacher.spec, setup.teacher.dtype(c.teacher.dtype)))
    size = itemsize(compute)
    return sum(size * math.prod(_table(spec)) for spec, dtype in heads if dtype != compute)


def _student_dtype(setup: Setup) -> str:
    """Of the parameters that a step computes with."""
    return "float32" if setup.full else setup.student.dtype(setup.config.student.dtype)


def _table(spec: DecoderSpec) -> tuple[int, int]:
    return spec.vocab_size, spec.width


def _layer_weights(spec: DecoderSpec, compute_dtype: str) -> int:
    """One layer's, taken out of the stack in the compute dtype."""
    sizes = map(math.prod, layer_shapes(spec).values())
    return sum(sizes) // spec.num_layers * itemsize(compute_dtype)


def _forward(setup: Setup, spec: DecoderSpec, rows: int) -> int:
    """Working memory of a forward pass that nobody differentiates: that of its largest layer."""
    size, T = itemsize(setup.config.student.compute_dtype), setup.length
    seen = min(T, 2 * spec.window) if spec.window and not any(spec.is_global_L) else T
    scores = _SCORES * rows * spec.num_heads * T * seen * 4
    mlp = _MLP * rows * T * spec.ffn_width * size
    states = 3 * rows * T * spec.width * size
    return _layer_weights(spec, setup.config.student.compute_dtype) + states + max(scores, mlp)


def kv_bytes(spec: DecoderSpec, slots: int, compute_dtype: str) -> int:
    """Keys and values of one row; local layers keep as many as their window."""
    full = sum(spec.is_global_L)
    local = (spec.num_layers - full) * min(slots, spec.window or slots)
    return 2 * spec.num_kv_heads * spec.head_dim * (full * slots + local) * itemsize(compute_dtype)


def _writing(setup: Setup, spec: DecoderSpec, rows: int, new: int) -> Parts:
    """Prompts of the longest length are read, then `new` tokens of each row are drawn."""
    compute = setup.config.student.compute_dtype
    read = rows * 2 * spec.num_layers * setup.length * spec.num_kv_heads * spec.head_dim
    prefill = _forward(setup, spec, rows) + read * itemsize(compute)
    drawing = _LOGITS * rows * spec.vocab_size * 4 + _layer_weights(spec, compute)
    return {
        "keys and values": rows * kv_bytes(spec, setup.length + new, compute),
        "reading of prompts, drawing": max(prefill, drawing),
    }


def _prefixes(setup: Setup, spec: DecoderSpec) -> int:
    """One prefix of the longest length, or as many as may be kept where each row has its own."""
    c = setup.config.context
    if c.prefix_messages or c.prefix_file or c.system_prompt_file or c.corpus:
        return kv_bytes(spec, setup.length, setup.config.student.compute_dtype)
    return setup.config.teacher.prefix_bytes


def _merged(setup: Setup) -> int:
    """The adapted kernels once more, and what merging the largest of them takes."""
    rules, spec = setup.rules, setup.student.spec
    dtype = _student_dtype(setup)
    counts = [
        a.a.shape[0] * a.a.shape[1] * a.b.shape[2]
        for a in activations.adapters(spec, dtype, rules).values()
    ]
    return sum(counts) * itemsize(dtype) + _MERGED * max(counts) * 4
