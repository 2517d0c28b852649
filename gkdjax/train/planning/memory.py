"""Bytes on one device, by part: what lies there all the time, and what each phase adds to it.

Weights, adapters and the optimizer's state are cut as `gkdjax.parallel.sharding_rules` cuts them,
rows over "data" and "fsdp". Between layers a row's states are whole over "tensor"; within one,
heads and MLP width are cut; one layer's weights at a time are gathered over "fsdp".

Upper bounds where the data decide: every row is as long as the longest that is allowed. Left out:
the second state that a run has for a moment when it continues from a checkpoint; a
`teacher.adapter`; what devices exchange gradients through; what XLA copies for speed.
"""

import dataclasses

import jax

from gkdjax.config import anchor_sets, rows_at_once
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.parallel.mesh import check_rows, row_shares
from gkdjax.train.planning import activations
from gkdjax.train.planning.setup import PlanInputs, itemsize
from gkdjax.train.planning.shards import Shard
from gkdjax.utils import text

Parts = dict[str, int]  # name -> bytes

# Arrays [rows, heads, length, length] of float32 that attention holds at once: scores, masked
# scores, weights; and [rows, length, ffn width] of the MLP.
_SCORES, _MLP = 3, 2
_LOGITS = 5  # [rows, V] float32 while a token is drawn: logits, scaled, probabilities, sums, masks
_MERGED = 3  # float32 arrays of one stacked kernel while an adapter is merged into it


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device."""

    held: Parts  # from the first step to the last
    phases: dict[str, Parts]  # what each adds while it lasts; they do not overlap
    lower_bound: Parts  # there for certain, whatever the rows are

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak(self) -> int:
        return max(total(self.held) + total(self.phases[self.largest_phase]), self.least)

    @property
    def least(self) -> int:
        return total(self.lower_bound)

    def table(self) -> str:
        """Lists each part's bytes, then the largest phase."""
        rows = [["always", part, text.size(n)] for part, n in self.held.items() if n]
        for phase, parts in self.phases.items():
            rows += [[phase, part, text.size(n)] for part, n in parts.items() if n]
            whole = total(self.held) + total(parts)
            rows.append([phase, "all of it, and what is always there", text.size(whole)])
        rows.append(["peak", f"in: {self.largest_phase}", text.size(self.peak)])
        return text.table(["when", "what, on each device", "size"], rows, widest=60, left=2)


def plan(setup: PlanInputs) -> Plan:
    """Adds the parts up; traces the student, without weights.

    Raises:
      UserError: the mesh does not divide the rows or the weights, or adapters that fit no kernel.
    """
    for key, rows in rows_at_once(setup.config).items():
        check_rows(setup.mesh, key, rows)
    phases = {
        "training step": training_step(setup),
        "teacher's forward pass": teacher_forward(setup),
        "writing of training text": sampling(setup),
        "evaluation": evaluation(setup),
    }
    phases = {name: parts for name, parts in phases.items() if parts}
    return Plan(held(setup), phases, lower_bound(setup))


def total(parts: Parts) -> int:
    return sum(parts.values())


def lower_bound(setup: PlanInputs) -> Parts:
    """Counts what lies there at the first step for certain, whatever the rows are."""
    trainable, shard = trained(setup), setup.of_student
    found = {"student, as loaded": setup.student.nbytes_of(shard, setup.config.student.dtype)}
    found["student, float32" if setup.full else "adapters"] = trainable
    found["optimizer state"] = 2 * trainable
    if setup.teacher is not None:
        dtype = setup.config.teacher.dtype
        found["teacher"] = setup.teacher.nbytes_of(setup.of_teacher, dtype)
    return found


def held(setup: PlanInputs) -> Parts:
    """Counts what lies there from the first step to the last."""
    found, c = lower_bound(setup), setup.config
    loaded = found.pop("student, as loaded")
    if not setup.full:
        found = {"student, frozen": loaded} | found
    elif setup.keeps_base:
        found["student, frozen second copy"] = loaded
    if c.student.lora.init_from:
        found["adapters to start from"] = trained(setup)
    if setup.of_teacher is not None:
        found["teacher's prefixes, at most"] = prefixes(setup, setup.of_teacher)
    return found


def training_step(setup: PlanInputs) -> Parts:
    """The largest moment of an optimizer step: the head, the backward pass or the update."""
    c, trainable = setup.config, trained(setup)
    shared = {"batches and teacher's targets": targets(setup)}
    # XLA reads all parts (the batch and each anchor) forward before it goes back through any, and
    # the loops that go back through them share no memory.
    passes = [
        activations.kept(_pass(setup, rows // c.train.grad_accum_steps), c.train.remat)
        for rows, _ in training_rows(setup)
    ]
    all_layers = sum(each.all_layers - _cast_again(setup) for each in passes)
    kept = {"activations": all_layers, "tables": _tables(setup)}
    carried = trainable if c.train.grad_accum_steps > 1 else 0
    weights = layer_weights(setup, setup.of_student)
    one_layer = sum(each.one_layer + each.largest + weights for each in passes)
    moments = (
        kept | {"head": head(setup), "gradients": carried},
        kept | {"one layer's backward pass": one_layer, "gradients": carried + trainable},
        {"gradients and update": 2 * trainable},
    )
    return shared | max(moments, key=total)


def teacher_forward(setup: PlanInputs) -> Parts:
    """A model in this process reads a whole batch, or an anchor's: it is not cut in parts."""
    read = [
        forward(setup, shard, rows) for rows, shard in training_rows(setup) if shard is not None
    ]
    if not read:
        return {}
    found = {"batches and teacher's targets": targets(setup), "one layer's pass": max(read)}
    if setup.config.teacher.top_k is not None and setup.of_teacher is not None:
        found["search for the top k"] = head(setup)
    return found


def _pass(setup: PlanInputs, rows: int) -> activations.Pass:
    return activations.Pass(
        setup.of_student.local,
        student_dtype(setup),
        setup.config.student.compute_dtype,
        setup.rules,
        rows,
        setup.length,
    )


def _cast_again(setup: PlanInputs) -> int:
    """Kernels in the compute dtype, which a mesh that cuts weights does not keep for the way back.

    See `parallel.sharding_rules.all_but_gathered_weights`.
    """
    shard, compute = setup.of_student, setup.config.student.compute_dtype
    none = setup.config.train.remat or student_dtype(setup) == compute
    if none or not shard.layout.cuts_weights:
        return 0
    return shard.kernels * itemsize(compute)


def _tables(setup: PlanInputs) -> int:
    """Adds the head's own gradient to a table that is looked up, too."""
    tied = setup.student.spec.tied_embedding
    gradient = 4 * setup.of_student.table if setup.full and tied else 0
    return tables(setup) + gradient


def training_rows(setup: PlanInputs) -> list[tuple[int, Shard | None]]:
    """(rows of one device, who teaches them in this process) of the batch and of each anchor."""
    anchor, teacher = setup.config.anchor, setup.of_teacher
    parts = [(setup.rows("train"), teacher)]
    towards = setup.of_student if anchor.reference == "base" else teacher
    return parts + [(setup.rows("anchor"), towards) for _ in anchor_sets(anchor)]


def adapters(setup: PlanInputs) -> dict:
    """Shapes as `jax.ShapeDtypeStruct`; UserError for targets that match no kernel."""
    return activations.adapters(setup.student.spec, student_dtype(setup), setup.rules)


def trained(setup: PlanInputs) -> int:
    """Counts what is trained, in float32, as it is sharded."""
    shard = setup.of_student
    return 4 * (shard.held if setup.full else shard.held_of(adapters(setup)))


def student_dtype(setup: PlanInputs) -> str:
    """Dtype of the parameters that a step computes with."""
    return "float32" if setup.full else setup.student.dtype(setup.config.student.dtype)


def dtype_of(setup: PlanInputs, shard: Shard) -> str:
    """Dtype of a model's parameters in memory."""
    if shard is setup.of_student:
        return student_dtype(setup)
    return setup.teacher.dtype(setup.config.teacher.dtype)


def targets(setup: PlanInputs) -> int:
    """Ids, places and masks of both views, and what the teacher said, of all rows of a step."""
    batch = 6 * 4 + 3  # bytes a position
    return sum(
        rows * setup.length * (batch + target_bytes(setup, shard and shard.spec))
        for rows, shard in training_rows(setup)
    )


def target_bytes(setup: PlanInputs, spec: DecoderConfig | None) -> int:
    """Bytes of one target: hidden states of a model in this process, or the best K tokens."""
    c, server = setup.config, setup.config.teacher.is_server
    if spec is None or (c.teacher.top_k is not None and not server):
        return 8 * (c.teacher.top_k or 0) + 8  # of a teacher that was handed in, K is unknown
    return spec.width * itemsize(c.student.compute_dtype)


def head(setup: PlanInputs) -> int:
    """A chunk's logits, of the device's own words."""
    return setup.config.gkd.chunk_size * setup.of_student.local.vocab_size * 4


def tables(setup: PlanInputs) -> int:
    """Unembeddings that are not used where they lie, but cast, or gathered over "fsdp"."""
    c, compute = setup.config, setup.config.student.compute_dtype
    heads = [setup.of_student]
    if c.teacher.top_k is None and setup.teacher is not None:
        heads.append(setup.of_teacher)
    return itemsize(compute) * sum(
        shard.table for shard in heads if shard.fsdp > 1 or dtype_of(setup, shard) != compute
    )


def layer_weights(setup: PlanInputs, shard: Shard) -> int:
    """One layer's, taken out of the stack in the compute dtype; gathered first, as they lie."""
    compute, stored = setup.config.student.compute_dtype, dtype_of(setup, shard)
    gathered = itemsize(stored) if shard.fsdp > 1 and stored != compute else 0
    return shard.layer * (itemsize(compute) + gathered)


def forward(setup: PlanInputs, shard: Shard, rows: int) -> int:
    """Working memory of a forward pass that nobody differentiates: that of its largest layer."""
    size, T, spec = itemsize(setup.config.student.compute_dtype), setup.length, shard.local
    seen = min(T, 2 * spec.window) if spec.window and not any(spec.is_global_L) else T
    scores = _SCORES * rows * spec.num_heads * T * seen * 4
    mlp = _MLP * rows * T * spec.ffn_width * size
    states = 3 * rows * T * spec.width * size
    return layer_weights(setup, shard) + states + max(scores, mlp)


def sampling(setup: PlanInputs) -> Parts:
    """The student's or the teacher's writing of training text, whichever takes more."""
    new, writers = setup.config.rollout.max_new_tokens, []
    if setup.config.gkd.on_policy_fraction > 0:
        writers.append(_writing(setup, setup.of_student, setup.rows("train"), new))
    if setup.of_teacher is not None:
        writers.append(_writing(setup, setup.of_teacher, setup.rows("eval"), new))
    return max(writers, key=total, default={})


def evaluation(setup: PlanInputs) -> Parts:
    """Greedy answers and distances; adapters are merged into a copy of the kernels."""
    c, rows, model = setup.config.eval, setup.rows("eval"), setup.of_teacher
    models = [setup.of_student] if model is None else [setup.of_student, model]
    moments = [_writing(setup, shard, rows, c.max_new_tokens) for shard in models]
    read = max(forward(setup, shard, rows) for shard in models)
    measuring = {"one layer's pass": read, "head": head(setup)}
    moments.append(measuring | {"tables": tables(setup)})
    found = max(moments, key=total)
    if not setup.full:
        found["student, adapters merged"] = _merged(setup)
    texts = -(-c.rows // row_shares(setup.mesh)) * c.max_new_tokens
    found["texts' targets"] = texts * target_bytes(setup, model and model.spec)
    found["student's prefixes, at most"] = prefixes(setup, setup.of_student)
    return found


def kv_bytes(setup: PlanInputs, shard: Shard, slots: int) -> int:
    """Keys and values of one row."""
    return shard.kv_numbers(slots) * itemsize(setup.config.student.compute_dtype)


def prefixes(setup: PlanInputs, shard: Shard) -> int:
    """One prefix of the longest length, or as many as may be kept where each row has its own."""
    c = setup.config.context
    if c.prefix_messages or c.prefix_file or c.system_prompt_file or c.corpus:
        return kv_bytes(setup, shard, setup.length)
    return setup.config.teacher.prefix_bytes


def _writing(setup: PlanInputs, shard: Shard, rows: int, new: int) -> Parts:
    """Prompts of the longest length are read, then `new` tokens of each row are drawn."""
    spec, size = shard.spec, itemsize(setup.config.student.compute_dtype)
    read = rows * 2 * spec.num_layers * setup.length * shard.kv_heads * spec.head_dim * size
    prefill = forward(setup, shard, rows) + read
    drawing = _LOGITS * rows * shard.local.vocab_size * 4 + layer_weights(setup, shard)
    found = {
        "keys and values": rows * kv_bytes(setup, shard, setup.length + new),
        "reading of prompts, drawing": max(prefill, drawing),
    }
    if shard.fsdp > 1:  # once for a whole text, and not for each of its tokens
        found["weights, gathered"] = shard.gathered * itemsize(dtype_of(setup, shard))
    return found


def _merged(setup: PlanInputs) -> int:
    """The adapted kernels once more, and what merging the largest of them takes."""
    shard, size = setup.of_student, itemsize(student_dtype(setup))
    counts = [
        shard.held_of({path: jax.ShapeDtypeStruct((*a.a.shape[:2], a.b.shape[2]), a.a.dtype)})
        for path, a in adapters(setup).items()
    ]
    return sum(counts) * size + _MERGED * max(counts) * 4
