"""Plans bytes on one device, by part: what always lies there, and what each phase adds to it.

Weights, adapters and the optimizer's state are sharded as `gkdjax.parallel.sharding_rules` says,
rows over "data" and "fsdp". Between layers a row's states are replicated over "tensor"; within a
layer, heads and MLP width are sharded; the weights of one layer at a time are gathered over "fsdp".

Where the data decide, the numbers are upper bounds: every row is as long as the longest allowed.
Left out: the second state that a run has for a moment when it continues from a checkpoint; a
`teacher.adapter`; buffers for the exchange of gradients; copies that XLA makes for speed.
"""

import dataclasses

import jax

from gkdjax.config import anchor_sets, rows_at_once
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.parallel.mesh import check_rows, row_shares
from gkdjax.train.planning import activations
from gkdjax.train.planning.setup import PlanInputs, Shard, itemsize
from gkdjax.utils import text

Parts = dict[str, int]  # name -> bytes

# Arrays [rows, heads, length, length] of float32 that attention holds at once: scores, masked
# scores, weights; and [rows, length, ffn width] of the MLP.
_SCORES, _MLP = 3, 2
_LOGITS = (
    5  # [rows, V] float32 while a token is sampled: logits, scaled, probabilities, sums, masks
)
_MERGED = 3  # float32 arrays of one stacked kernel while an adapter is merged into it


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device."""

    held: Parts  # from the first step to the last
    phases: dict[str, Parts]  # what each adds while it lasts; they do not overlap
    lower_bound: Parts  # certain, whatever the rows are

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
        """Lists the bytes of each part and the largest phase."""
        rows = [["always", part, text.size(n)] for part, n in self.held.items() if n]
        for phase, parts in self.phases.items():
            rows += [[phase, part, text.size(n)] for part, n in parts.items() if n]
            whole = total(self.held) + total(parts)
            rows.append([phase, "all of it, and what is always there", text.size(whole)])
        rows.append(["peak", f"in: {self.largest_phase}", text.size(self.peak)])
        return text.table(["when", "what, on each device", "size"], rows, widest=60, left=2)


def plan(inputs: PlanInputs) -> Plan:
    """Adds up the parts; traces the student, without weights.

    Raises:
      UserError: the mesh does not divide the rows or the weights, or adapters that fit no kernel.
    """
    for key, rows in rows_at_once(inputs.config).items():
        check_rows(inputs.mesh, key, rows)
    phases = {
        "training step": training_step(inputs),
        "teacher's forward pass": teacher_forward(inputs),
        "writing of training text": sampling(inputs),
        "evaluation": evaluation(inputs),
    }
    phases = {name: parts for name, parts in phases.items() if parts}
    return Plan(held(inputs), phases, lower_bound(inputs))


def total(parts: Parts) -> int:
    return sum(parts.values())


def lower_bound(inputs: PlanInputs) -> Parts:
    """Counts what lies there at the first step for certain, whatever the rows are."""
    trainable, config = _trained(inputs), inputs.config
    found = {
        "student, as loaded": inputs.student.nbytes_of(inputs.of_student, config.student.dtype),
        "student, float32" if inputs.full else "adapters": trainable,
        "optimizer state": 2 * trainable,
    }
    if inputs.teacher is not None:
        found["teacher"] = inputs.teacher.nbytes_of(inputs.of_teacher, config.teacher.dtype)
    return found


def held(inputs: PlanInputs) -> Parts:
    """Counts what lies there from the first step to the last."""
    found = lower_bound(inputs)
    loaded = found.pop("student, as loaded")
    if not inputs.full:
        found = {"student, frozen": loaded} | found
    elif inputs.keeps_base:
        found["student, frozen second copy"] = loaded
    if inputs.config.student.lora.init_from:
        found["adapters to start from"] = _trained(inputs)
    if inputs.of_teacher is not None:
        found["teacher's prefixes, at most"] = _prefixes(inputs, inputs.of_teacher)
    return found


def training_step(inputs: PlanInputs) -> Parts:
    """Counts the largest moment of an optimizer step: head, backward pass or update."""
    c, trainable, shard = inputs.config, _trained(inputs), inputs.of_student
    dtype, compute = inputs.student_dtype, c.student.compute_dtype
    # On the way back, a mesh that shards weights casts its kernels again: see
    # `parallel.sharding_rules.all_but_gathered_weights`.
    cast_again = 0
    if not c.train.remat and dtype != compute and shard.layout.cuts_weights:
        cast_again = shard.kernels * itemsize(compute)
    # XLA computes all parts (the batch and each anchor) forward before it goes back through any,
    # and the loops that go back through them share no memory.
    passes = []
    for rows, _ in _training_rows(inputs):
        rows //= c.train.grad_accum_steps
        of = activations.Pass(shard.local, dtype, compute, inputs.rules, rows, inputs.length)
        passes.append(activations.kept(of, c.train.remat))
    table_gradient = 4 * shard.table if inputs.full and inputs.student.spec.tied_embedding else 0
    kept = {
        "activations": sum(each.all_layers - cast_again for each in passes),
        "tables": _tables(inputs) + table_gradient,
    }
    carried = trainable if c.train.grad_accum_steps > 1 else 0
    weights = _layer_weights(inputs, shard)
    one_layer = sum(each.one_layer + each.largest + weights for each in passes)
    moments = (
        kept | {"head": head(inputs), "gradients": carried},
        kept | {"one layer's backward pass": one_layer, "gradients": carried + trainable},
        {"gradients and update": 2 * trainable},
    )
    return {"batches and teacher's targets": _targets(inputs)} | max(moments, key=total)


def teacher_forward(inputs: PlanInputs) -> Parts:
    """Counts the reading of a whole batch, or an anchor's, by a teacher in this process."""
    read = [_forward(inputs, shard, rows) for rows, shard in _training_rows(inputs) if shard]
    if not read:
        return {}
    found = {"batches and teacher's targets": _targets(inputs), "one layer's pass": max(read)}
    if inputs.config.teacher.top_k is not None and inputs.of_teacher is not None:
        found["search for the top k"] = head(inputs)
    return found


def sampling(inputs: PlanInputs) -> Parts:
    """Counts the sampling of rollouts by the student or the teacher, whichever takes more."""
    new, writers = inputs.config.rollout.max_new_tokens, []
    if inputs.config.gkd.on_policy_fraction > 0:
        writers.append(_sampling_of(inputs, inputs.of_student, inputs.rows("train"), new))
    if inputs.of_teacher is not None:
        writers.append(_sampling_of(inputs, inputs.of_teacher, inputs.rows("eval"), new))
    return max(writers, key=total, default={})


def evaluation(inputs: PlanInputs) -> Parts:
    """Counts greedy answers and distances; adapters are merged into a copy of the kernels."""
    c, rows, teacher = inputs.config.eval, inputs.rows("eval"), inputs.of_teacher
    models = [inputs.of_student] if teacher is None else [inputs.of_student, teacher]
    read = max(_forward(inputs, shard, rows) for shard in models)
    measuring = {"one layer's pass": read, "head": head(inputs), "tables": _tables(inputs)}
    moments = [_sampling_of(inputs, shard, rows, c.max_new_tokens) for shard in models]
    found = max([*moments, measuring], key=total)
    if not inputs.full:
        counts = [
            inputs.of_student.held_of(
                {path: jax.ShapeDtypeStruct((*a.a.shape[:2], a.b.shape[2]), a.a.dtype)}
            )
            for path, a in inputs.adapters.items()
        ]
        merged = sum(counts) * itemsize(inputs.student_dtype) + _MERGED * max(counts) * 4
        found["student, adapters merged"] = merged
    texts = -(-c.rows // row_shares(inputs.mesh)) * c.max_new_tokens
    found["texts' targets"] = texts * _target_bytes(inputs, teacher and teacher.spec)
    found["student's prefixes, at most"] = _prefixes(inputs, inputs.of_student)
    return found


def head(inputs: PlanInputs) -> int:
    """Counts the logits of a chunk, over the device's share of the vocabulary."""
    return inputs.config.gkd.chunk_size * inputs.of_student.local.vocab_size * 4


def kv_bytes(inputs: PlanInputs, shard: Shard, slots: int) -> int:
    """Counts keys and values of one row."""
    return shard.kv_numbers(slots) * itemsize(inputs.config.student.compute_dtype)


def _training_rows(inputs: PlanInputs) -> list[tuple[int, Shard | None]]:
    """Lists (rows of one device, their teacher in this process) of the batch and each anchor."""
    anchor, teacher = inputs.config.anchor, inputs.of_teacher
    reference = inputs.of_student if anchor.reference == "base" else teacher
    anchors = [(inputs.rows("anchor"), reference) for _ in anchor_sets(anchor)]
    return [(inputs.rows("train"), teacher), *anchors]


def _trained(inputs: PlanInputs) -> int:
    """Counts what is trained, in float32, as it is sharded."""
    shard = inputs.of_student
    return 4 * (shard.held if inputs.full else shard.held_of(inputs.adapters))


def _dtype_of(inputs: PlanInputs, shard: Shard) -> str:
    """Returns the dtype of a model's parameters in memory."""
    if shard is inputs.of_student:
        return inputs.student_dtype
    return inputs.teacher.dtype(inputs.config.teacher.dtype)


def _targets(inputs: PlanInputs) -> int:
    """Counts ids, positions and masks of both views, and the teacher's targets, of a step."""
    batch = 6 * 4 + 3  # bytes a position
    return sum(
        rows * inputs.length * (batch + _target_bytes(inputs, shard and shard.spec))
        for rows, shard in _training_rows(inputs)
    )


def _target_bytes(inputs: PlanInputs, spec: DecoderConfig | None) -> int:
    """Counts one target: hidden states of a model in this process, or the best K tokens."""
    c = inputs.config
    if spec is None or (c.teacher.top_k is not None and not c.teacher.is_server):
        return 8 * (c.teacher.top_k or 0) + 8  # K of a teacher that was passed in is unknown
    return spec.width * itemsize(c.student.compute_dtype)


def _tables(inputs: PlanInputs) -> int:
    """Counts unembeddings that are not used in place, but cast, or gathered over "fsdp"."""
    compute, heads = inputs.config.student.compute_dtype, [inputs.of_student]
    if inputs.config.teacher.top_k is None and inputs.teacher is not None:
        heads.append(inputs.of_teacher)
    copied = [s for s in heads if s.gathers or _dtype_of(inputs, s) != compute]
    return itemsize(compute) * sum(shard.table for shard in copied)


def _layer_weights(inputs: PlanInputs, shard: Shard) -> int:
    """Counts one layer's weights in the compute dtype, and gathered in their own before."""
    compute, stored = inputs.config.student.compute_dtype, _dtype_of(inputs, shard)
    gathered = itemsize(stored) if shard.gathers and stored != compute else 0
    return shard.layer * (itemsize(compute) + gathered)


def _forward(inputs: PlanInputs, shard: Shard, rows: int) -> int:
    """Counts a forward pass without gradients: the working memory of its largest layer."""
    size, T, spec = itemsize(inputs.config.student.compute_dtype), inputs.length, shard.local
    seen = min(T, 2 * spec.window) if spec.window and not any(spec.is_global_L) else T
    scores = _SCORES * rows * spec.num_heads * T * seen * 4
    mlp = _MLP * rows * T * spec.ffn_width * size
    states = 3 * rows * T * spec.width * size
    return _layer_weights(inputs, shard) + states + max(scores, mlp)


def _prefixes(inputs: PlanInputs, shard: Shard) -> int:
    """Counts one prefix of the longest length, or the limit where each row has its own."""
    c = inputs.config.context
    if c.prefix_messages or c.prefix_file or c.system_prompt_file or c.corpus:
        return kv_bytes(inputs, shard, inputs.length)
    return inputs.config.teacher.prefix_bytes


def _sampling_of(inputs: PlanInputs, shard: Shard, rows: int, new: int) -> Parts:
    """Counts the reading of prompts of the longest length and the sampling of `new` tokens."""
    spec, size = shard.spec, itemsize(inputs.config.student.compute_dtype)
    read = rows * 2 * spec.num_layers * inputs.length * shard.kv_heads * spec.head_dim * size
    prefill = _forward(inputs, shard, rows) + read
    sampled = _LOGITS * rows * shard.local.vocab_size * 4 + _layer_weights(inputs, shard)
    found = {
        "keys and values": rows * kv_bytes(inputs, shard, inputs.length + new),
        "reading of prompts, drawing": max(prefill, sampled),
    }
    if shard.gathers:  # once for a whole text, and not for each of its tokens
        found["weights, gathered"] = shard.gathered * itemsize(_dtype_of(inputs, shard))
    return found
