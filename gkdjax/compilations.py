"""How many programs XLA has compiled in this process: a step that compiles anew is a slow step."""

import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"  # one event a program, from jax itself
_seen = 0


def count() -> int:
    """Programs compiled (or read from the persistent cache) since this module was imported."""
    return _seen


def _listen(event: str, duration: float, **details) -> None:
    del duration, details
    global _seen
    _seen += event == _COMPILED


jax.monitoring.register_event_duration_secs_listener(_listen)
