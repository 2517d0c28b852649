"""Fills the store of a config's teacher ahead of training, and first estimates the cost.

    python -m gkdjax.tools.cache_teacher --config=configs/vllm_teacher.py [--estimate]
        [--input_price=USD --output_price=USD]

Interrupted, the same command goes on; an answer in the store is not bought again. Afterwards the
run asks only about the student's own text; with --config.teacher.offline=True it needs no server.
"""

import contextlib
import pathlib
from collections.abc import Sequence

from absl import flags

from gkdjax.config import Config, cli
from gkdjax.teachers.server.answers import Request, SampleRequest
from gkdjax.train import lock, offline, setup
from gkdjax.train import workdir as workdirs
from gkdjax.utils import remote
from gkdjax.utils.errors import UserError
from gkdjax.utils.text import table

flags.adopt_module_key_flags(cli)
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Print the estimate, and buy nothing.")
_INPUT = flags.DEFINE_float("input_price", None, "USD for a million tokens that are read.", 0)
_OUTPUT = flags.DEFINE_float("output_price", None, "USD for a million that are written.", 0)


def main(config: Config, workdir: str) -> None:
    if remote.is_remote(remote.place(workdir)):
        raise UserError(f"--workdir={workdir}: a store is filled on a disk; name a directory")
    cache(config, pathlib.Path(workdir), _INPUT.value, _OUTPUT.value, buy=not _ESTIMATE.value)


def cache(
    config: Config,
    workdir: pathlib.Path,
    input_price: float | None,
    output_price: float | None,
    *,
    buy: bool,
) -> None:
    """Prints an estimate and, to `buy`, fills the store and prints the counts.

    Prices are as for `estimate`.

    Raises:
      UserError: there is no server or no store; and all errors of the run itself.
      TeacherUnreachable: the server does not answer; earlier answers are in the store.
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
            connections.enter_context(lock.locked(workdir))
            workdirs.claim(workdir, config)
        rows = setup.read(config, workdir, None, connections)
        steps = setup.total_steps(config, len(rows.dataset))
        missing = offline.missing(config, workdir, rows.teacher, steps)
        print(estimate(missing, input_price, output_price))
        if buy:
            offline.prefill_answers(rows, rows.teacher, workdir, steps)
            counts = rows.teacher.report().items()
            lines = [[name.replace("_", " "), f"{count:,}"] for name, count in counts]
            print(table(["answers", "count"], lines))


def estimate(
    missing: Sequence[Request], input_price: float | None, output_price: float | None
) -> str:
    """A table of the requests and their cost, in USD for a million tokens read and written.

    Nobody can foresee responses that are refused and written again.
    """
    samples = [request for request in missing if isinstance(request, SampleRequest)]
    scores = len(missing) - len(samples)
    read = sum(len(request.ids) for request in missing)
    # A server writes one token even when it is only to score.
    written = scores + sum(request.sampling.max_new_tokens for request in samples)
    counts = {
        "requests": len(missing),
        "responses to be written": len(samples),
        "texts to be scored": scores,
        "tokens to be read": read,
        "tokens to be written, at most": written,
    }
    lines = [[name, f"{count:,}"] for name, count in counts.items()]
    if input_price is not None or output_price is not None:
        price = (read * (input_price or 0) + written * (output_price or 0)) / 1e6
        lines.append(["price, at most", f"{price:,.2f} USD"])
    return table(["still to be bought", "count"], lines)


if __name__ == "__main__":
    cli.run(main)
