"""Fills the store of a config's teacher ahead of training, and says first what that takes.

    python -m gkdjax.tools.cache_teacher --config=configs/vllm_teacher.py [--estimate]
        [--input_price=USD --output_price=USD]

Interrupted, the same command goes on; what is in the store is not bought again. Afterwards the run
asks for nothing but what the student writes; with --config.teacher.offline=True it needs no server.
"""

import contextlib
import pathlib
from collections.abc import Sequence

from absl import flags

from gkdjax.config import Config, cli
from gkdjax.teachers.server.answers import Request, SampleRequest
from gkdjax.train import offline, setup
from gkdjax.train import workdir as workdirs
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import table

flags.adopt_module_key_flags(cli)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Say what it takes, and buy nothing.")
_INPUT = flags.DEFINE_float("input_price", None, "USD for a million tokens that are read.", 0)
_OUTPUT = flags.DEFINE_float("output_price", None, "USD for a million that are written.", 0)


def main(config: Config, workdir: pathlib.Path) -> None:
    """As `cache`, with the flags."""
    cache(config, workdir, _INPUT.value, _OUTPUT.value, buy=not _ESTIMATE.value)


def cache(
    config: Config,
    workdir: pathlib.Path,
    input_price: float | None,
    output_price: float | None,
    *,
    buy: bool,
) -> None:
    """Prints an estimate, fills the store, and prints what was bought.

    Args:
      config: of the run.
      workdir: of the run.
      input_price, output_price: see `estimate`.
      buy: False: the estimate is all.

    Raises:
      UserError: there is no server or no store; and all that the run itself would raise.
      TeacherUnreachable: the server does not answer; what came before is in the store.
    """
    if not config.teacher.is_server or config.teacher.offline:
        raise UserError(
            f"config.teacher.backend = {config.teacher.backend!r}, .offline ="
            f" {config.teacher.offline}: there is no server to ask"
        )
    if config.teacher.store is None:
        raise UserError("config.teacher.store = None: there is no store to fill; name its file")
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as connections:
        if buy:
            connections.enter_context(workdirs.locked(workdir))
            workdirs.claim(workdir, config)
        rows = setup.read(config, workdir, None, connections)
        steps = setup.total_steps(config, len(rows.dataset))
        missing = offline.missing(config, workdir, rows.teacher, steps)
        print(estimate(missing, input_price, output_price))
        if not buy:
            return
        offline.prefill_answers(rows, rows.teacher, workdir, steps)
        counts = rows.teacher.report().items()
        print(table(["answers", "count"], [[k.replace("_", " "), f"{n:,}"] for k, n in counts]))


def estimate(
    missing: Sequence[Request], input_price: float | None, output_price: float | None
) -> str:
    """A table of what is to be bought.

    Responses that are refused are written again, which nobody can foresee.

    Args:
      missing: the requests.
      input_price: USD for a million tokens that are read; None: prices are left out.
      output_price: the same for tokens that are written.
    """
    samples = [request for request in missing if isinstance(request, SampleRequest)]
    read = sum(len(request.ids) for request in missing)
    # A server writes one token even when it is only to score.
    written = sum(request.sampling.max_new_tokens for request in samples)
    written += len(missing) - len(samples)
    lines = [
        ["requests", f"{len(missing):,}"],
        ["responses to be written", f"{len(samples):,}"],
        ["texts to be scored", f"{len(missing) - len(samples):,}"],
        ["tokens to be read", f"{read:,}"],
        ["tokens to be written, at most", f"{written:,}"],
    ]
    if input_price is not None or output_price is not None:
        price = (read * (input_price or 0) + written * (output_price or 0)) / 1e6
        lines.append(["price, at most", f"{price:,.2f} USD"])
    return table(["still to be bought", "count"], lines)


if __name__ == "__main__":
    cli.run(main)
