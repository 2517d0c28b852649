"""The subject of the planner's tests: a model of Gemma's kind, as numbers alone."""

from gkdjax import config
from gkdjax.benchmarks.models import STUDENTS, TEACHERS, decoder_spec
from gkdjax.train.planning.setup import PlanInputs, Weights, mesh_of

STUDENT = decoder_spec(STUDENTS["small"], 4096)
TEACHER = decoder_spec(TEACHERS["small"], 4096)


def setup(dtype: str = "float32", devices: int = 1, **changes) -> PlanInputs:
    """Plans a config with `changes` like gkd__divergence="mixed"; a teacher if there is one."""
    c = config.default()
    c.student.model, c.data.train = "none", "none.jsonl"
    c.data.max_length = 128
    c.context.prefix_messages = [{"role": "system", "content": "?"}]
    for key, value in changes.items():
        section, _, name = key.partition("__")
        c[section][name] = value
    if c.teacher.backend == "flax":
        c.teacher.model = "none"
    teacher = Weights.of(TEACHER, dtype) if c.teacher.backend == "flax" else None
    toggles = c.teacher.backend == "local-toggle"
    parsed, student = config.parse(c), Weights.of(STUDENT, dtype)
    return PlanInputs(parsed, student, teacher, toggles, mesh_of(parsed, devices))
