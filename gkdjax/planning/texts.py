"""Bytes on one device while text is written: for the training, and to be measured."""

import jax

from gkdjax.planning import parts
from gkdjax.planning.models import Setup, itemsize
from gkdjax.planning.parts import Parts, total
from gkdjax.planning.shards import Shard
from gkdjax.sharding import row_shares

_LOGITS = 5  # [rows, V] float32 while a token is drawn: logits, scaled, probabilities, sums, masks
_MERGED = 3  # float32 arrays of one stacked kernel while an adapter is merged into it


def sampling(setup: Setup) -> Parts:
    """The student's or the teacher's writing of training text, whichever takes more."""
    new, writers = setup.config.trajectory.max_new_tokens, []
    if setup.config.gkd.on_policy_fraction > 0:
        writers.append(_writing(setup, setup.of_student, setup.rows("train"), new))
    if setup.of_teacher is not None:
        writers.append(_writing(setup, setup.of_teacher, setup.rows("eval"), new))
    return max(writers, key=total, default={})


def evaluation(setup: Setup) -> Parts:
    """Greedy answers and distances; adapters are merged into a copy of the kernels."""
    c, rows, model = setup.config.eval, setup.rows("eval"), setup.of_teacher
    models = [setup.of_student] if model is None else [setup.of_student, model]
    moments = [_writing(setup, shard, rows, c.max_new_tokens) for shard in models]
    read = max(parts.forward(setup, shard, rows) for shard in models)
    measuring = {"one layer's pass": read, "head": parts.head(setup)}
    moments.append(measuring | {"tables": parts.tables(setup)})
    found = max(moments, key=total)
    if not setup.full:
        found["student, adapters merged"] = _merged(setup)
    texts = -(-c.rows // row_shares(setup.mesh)) * c.max_new_tokens
    found["texts' targets"] = texts * parts.target_bytes(setup, model and model.spec)
    found["student's prefixes, at most"] = prefixes(setup, setup.of_student)
    return found


def kv_bytes(setup: Setup, shard: Shard, slots: int) -> int:
    """Keys and values of one row."""
    return shard.kv_numbers(slots) * itemsize(setup.config.student.compute_dtype)


def prefixes(setup: Setup, shard: Shard) -> int:
    """One prefix of the longest length, or as many as may be kept where each row has its own."""
    c = setup.config.context
    if c.prefix_messages or c.prefix_file or c.system_prompt_file or c.corpus:
        return kv_bytes(setup, shard, setup.length)
    return setup.config.teacher.prefix_bytes


def _writing(setup: Setup, shard: Shard, rows: int, new: int) -> Parts:
    """Prompts of the longest length are read, then `new` tokens of each row are drawn."""
    spec, size = shard.spec, itemsize(setup.config.student.compute_dtype)
    read = rows * 2 * spec.num_layers * setup.length * shard.kv_heads * spec.head_dim * size
    prefill = parts.forward(setup, shard, rows) + read
    drawing = _LOGITS * rows * shard.local.vocab_size * 4 + parts.layer_weights(setup, shard)
    found = {
        "keys and values": rows * kv_bytes(setup, shard, setup.length + new),
        "reading of prompts, drawing": max(prefill, drawing),
    }
    if shard.fsdp > 1:  # once for a whole text, and not for each of its tokens
        found["weights, gathered"] = shard.gathered * itemsize(parts.dtype_of(setup, shard))
    return found


def _merged(setup: Setup) -> int:
    """The adapted kernels once more, and what merging the largest of them takes."""
    shard, size = setup.of_student, itemsize(parts.student_dtype(setup))
    counts = [
        shard.held_of({path: jax.ShapeDtypeStruct((*a.a.shape[:2], a.b.shape[2]), a.a.dtype)})
        for path, a in parts.adapters(setup).items()
    ]
    return sum(counts) * size + _MERGED * max(counts) * 4
