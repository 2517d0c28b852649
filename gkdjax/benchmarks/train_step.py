"""One optimizer step, fused heads against [tokens, vocabulary] logits: seconds and memory.

    python -m gkdjax.benchmarks.train_step [--vocab=32768] [--variants=unfused,dense] [--out=FILE]

Every measurement has a process of its own, because peak memory is per process; a round takes each
case once, because a machine is not equally fast all the time. See the README beside this file.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from gkdjax.benchmarks import table
from gkdjax.benchmarks.case import PLAIN, PROMPTS, STUDENTS, TEACHERS, TUNINGS, VARIANTS, Case

# Left out unless asked for: at this size full fine-tuning takes minutes, and its half of prompts
# shows nothing that the other combinations do not.
_LEFT_OUT = {(262_144, "full", "half")}

_LISTS = {"variants": (*VARIANTS, PLAIN), "tuning": TUNINGS, "prompts": PROMPTS}
_SHARED = ("rows", "length", "top_k", "student", "teacher", "dtype", "chunk_size", "steps")


def main(argv: list[str]) -> None:
    del argv
    if flags.FLAGS.worker is None:
        run(flags.FLAGS)
        return
    from gkdjax.benchmarks import worker  # jax: only where it is measured, it takes a GPU's memory

    print(json.dumps(worker.measure(Case(**json.loads(flags.FLAGS.worker)))))


def run(options) -> None:
    """Measures all rounds and prints the table; the JSON is written after each round."""
    cases = plan(options)
    results: dict[Case, list[dict]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(options.rounds):
            for case in cases:
                results[case].append(in_new_process(case, cache))
                _tell(number, case, results[case][-1])
            rows = table.summarize(results.items())
            where = results[cases[0]][0]["where"]
            if options.out:
                _write(options.out, where, rows, results)
    print(table.render(rows))
    print(", ".join(f"{name} {value}" for name, value in where.items()))


def _write(path: str, where: dict, rows: list[dict], results: dict[Case, list[dict]]) -> None:
    measured = [
        {"case": dataclasses.asdict(case), "rounds": rounds} for case, rounds in results.items()
    ]
    report = {"where": where, "rows": rows, "measured": measured}
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def plan(options) -> list[Case]:
    """The cases of one round, those of one setting next to each other."""
    asked = options["tuning"].present or options["prompts"].present
    settings = itertools.product(map(int, options.vocab), options.tuning, options.prompts)
    shared = {name: options[name].value for name in _SHARED}
    return [
        Case(*setting, variant=variant, **shared)
        for setting in settings
        if asked or setting not in _LEFT_OUT
        for variant in options.variants
    ]


def in_new_process(case: Case, cache: str) -> dict:
    """A worker's result; `cache` keeps compiled programs for the next round.

    Raises:
      RuntimeError: the worker failed; its last words are in the message.
    """
    compile_cache = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = subprocess.run(
        [
            *(sys.executable, "-m", "gkdjax.benchmarks.train_step"),
            f"--worker={json.dumps(dataclasses.asdict(case))}",
        ],
        env=os.environ | compile_cache,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"{case} failed:\n{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def _tell(number: int, case: Case, result: dict) -> None:
    seconds = " ".join(f"{x:.2f}" for x in result["seconds"])
    print(
        f"round {number + 1}: V={case.vocab} {case.tuning} {case.prompts} {case.variant}:"
        f" {seconds} s, peak {result['peak_bytes'] / table.GIB:.2f} GiB",
        file=sys.stderr,
        flush=True,
    )


def _define_flags() -> None:
    flags.DEFINE_list("vocab", ["32768", "262144"], "Vocabulary sizes.")
    for name, known in _LISTS.items():
        usual = [x for x in known if x != PLAIN]
        flags.DEFINE_list(name, usual, f"Of {', '.join(known)}.")
        flags.register_validator(
            name, lambda given, known=known: set(given) <= set(known), f"of {', '.join(known)}"
        )
    flags.DEFINE_integer("rounds", 3, "How often each case is measured.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Timed steps of a measurement.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "Rows of the batch.")
    flags.DEFINE_integer("length", 256, "Positions of a row.")
    flags.DEFINE_integer("top_k", 64, "K of the steps topk and stored.")
    flags.DEFINE_integer("chunk_size", 512, "The config's gkd.chunk_size.")
    flags.DEFINE_enum("student", "small", [*STUDENTS], "Its shape; gemma3 is Gemma 3 270M.")
    flags.DEFINE_enum("teacher", "small", [*TEACHERS], "Its shape; gemma3 is Gemma 3 1B.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Frozen weights and products.")
    flags.DEFINE_string("out", None, "A JSON file for the rows and every single measurement.")
    flags.DEFINE_string("worker", None, "A case as JSON: measure it in this process.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
