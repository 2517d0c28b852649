"""Memory that `configs/gemma3.py` needs, by XLA's own account: compiled, never run, no weights.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.gemma3_memory --config=configs/gemma3.py

On a CPU, XLA computes bfloat16 in float32 and does nothing in place, so an accelerator needs less.
"""

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from gkdjax import config
from gkdjax.benchmarks.harness import GIB
from gkdjax.benchmarks.models import STUDENTS, TEACHERS, abstract_batch, decoder_spec
from gkdjax.benchmarks.planned_memory import compiled_forward, compiled_step
from gkdjax.parallel.mesh import make_mesh
from gkdjax.utils.text import table

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file with get_config().")
_SHAPES = flags.DEFINE_enum("shapes", "gemma3", list(STUDENTS), "Of both models.")
_VOCAB = flags.DEFINE_integer("vocab", 262_144, "Of both models.")
_STUDENT_TOKENS = flags.DEFINE_integer("student_tokens", 192, "Positions of a student's row.")
_TEACHER_TOKENS = flags.DEFINE_integer("teacher_tokens", 320, "Positions of a teacher's row.")


def main(argv: list[str]) -> None:
    del argv
    c = config.parse(_CONFIG.value)
    lengths = _STUDENT_TOKENS.value, _TEACHER_TOKENS.value, c.rollout.max_new_tokens
    batch = abstract_batch(c.train.batch_size, *lengths)
    shapes = (of[_SHAPES.value] for of in (STUDENTS, TEACHERS))
    student, teacher = (decoder_spec(shape, _VOCAB.value) for shape in shapes)
    mesh = make_mesh(devices=jax.devices()[:1])
    programs = {
        "step": compiled_step(c, student, teacher, mesh, batch, batch, jnp.bfloat16),
        "teacher's forward pass": compiled_forward(teacher, batch, jnp.bfloat16),
    }
    rows = []
    for name, program in programs.items():
        analysis = program.memory_analysis()
        sizes = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
        rows.append([name, *(f"{n / GIB:.2f}" for n in sizes)])
    print(table(["program", "arguments, GiB", "scratch, GiB"], rows))


if __name__ == "__main__":
    app.run(main)
