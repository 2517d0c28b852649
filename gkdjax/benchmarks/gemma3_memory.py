"""What `configs/gemma3.py` needs in memory, by XLA's own account: compiled, never run, no weights.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.gemma3_memory --config=configs/gemma3.py

On a CPU, XLA computes bfloat16 in float32 and does nothing in place, so an accelerator needs less.
"""

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from gkdjax import config
from gkdjax.benchmarks.case import STUDENTS, TEACHERS, decoder_spec
from gkdjax.losses.objective import DenseTargets
from gkdjax.models import lora
from gkdjax.models.decoder import Decoder, abstract_params, unembedding_table
from gkdjax.models.decoder_config import DecoderConfig
from gkdjax.models.prefix_cache import predicting_hidden
from gkdjax.parallel import mesh
from gkdjax.train import optimizer as train_optimizer
from gkdjax.train.step import init_state, make_train_step
from gkdjax.types import Batch
from gkdjax.utils.text import table

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file with get_config().")
_SHAPES = flags.DEFINE_enum("shapes", "gemma3", list(STUDENTS), "Of both models.")
_VOCAB = flags.DEFINE_integer("vocab", 262_144, "Of both models.")
_STUDENT_TOKENS = flags.DEFINE_integer("student_tokens", 192, "Positions of a student's row.")
_TEACHER_TOKENS = flags.DEFINE_integer("teacher_tokens", 320, "Positions of a teacher's row.")


def main(argv: list[str]) -> None:
    del argv
    programs = compiled(config.parse(_CONFIG.value))
    rows = [[name, *sizes(program.memory_analysis())] for name, program in programs.items()]
    print(table(["program", "arguments, GiB", "scratch, GiB"], rows))


def sizes(analysis) -> list[str]:
    return [
        f"{n / 2**30:.2f}" for n in (analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)
    ]


def compiled(c: config.Config) -> dict:
    """The optimizer step of `c`, its anchor included, and the teacher's forward pass."""
    student = decoder_spec(STUDENTS[_SHAPES.value], _VOCAB.value)
    teacher = decoder_spec(TEACHERS[_SHAPES.value], _VOCAB.value)
    base, teacher_params = (abstract_params(spec, jnp.bfloat16) for spec in (student, teacher))
    optimizer = train_optimizer.optimizer(c.optim, c.train.steps)
    state = jax.eval_shape(
        lambda: init_state(lora.init(jax.random.key(0), base, c.student.lora), optimizer)
    )
    step = make_train_step(
        _decoder(student, c.train.remat),
        optimizer,
        train_optimizer.schedule(c.optim, c.train.steps),
        c,
        mesh.make_mesh(),
    )
    batch = _batch(c)
    main_targets, anchor_targets = (
        _targets(spec, params, batch)
        for spec, params in ((teacher, teacher_params), (student, base))
    )
    lowered = step.lower(
        state,
        base,
        batch,
        main_targets,
        {"anchor": (batch, anchor_targets)},
        divergence=c.gkd.divergence,
    )
    forward = predicting_hidden.lower(
        _decoder(teacher, False),
        teacher_params,
        batch.teacher_tokens_BT,
        batch.teacher_mask_BT,
        batch.teacher_at_BN,
    )
    return {"step": lowered.compile(), "teacher's forward pass": forward.compile()}


def _decoder(spec: DecoderConfig, remat: bool) -> Decoder:
    return Decoder(spec, param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16, remat=remat)


def _batch(c: config.Config) -> Batch:
    def tokens(length, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((c.train.batch_size, length), dtype)

    S, T, N = _STUDENT_TOKENS.value, _TEACHER_TOKENS.value, c.rollout.max_new_tokens
    return Batch(
        student_tokens_BS=tokens(S),
        student_mask_BS=tokens(S, bool),
        student_at_BN=tokens(N),
        teacher_tokens_BT=tokens(T),
        teacher_mask_BT=tokens(T, bool),
        teacher_at_BN=tokens(N),
        target_ids_BN=tokens(N),
        target_mask_BN=tokens(N, bool),
        row_id_B=jax.ShapeDtypeStruct((c.train.batch_size,), jnp.int32),
    )


def _targets(spec: DecoderConfig, params: dict, batch: Batch) -> DenseTargets:
    shape = (*batch.target_mask_BN.shape, spec.width)
    hidden_BNE = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return DenseTargets(hidden_BNE, unembedding_table(spec, params), spec.final_softcap)


if __name__ == "__main__":
    app.run(main)
