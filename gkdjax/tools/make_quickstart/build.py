"""Builds the quickstart's directory: two pre-trained models, their data, and a table of both."""

import dataclasses
import pathlib
import time

import jax
import numpy as np

from gkdjax.models.decoder import Decoder
from gkdjax.models.families import gemma3
from gkdjax.tools.make_quickstart import data, evaluate, pretrain, report, task, tokenizer
from gkdjax.utils.errors import UserError

SEED = 0
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is made, and how large."""

    models: dict[str, pretrain.Recipe]
    counts: data.Counts


FULL = Plan(
    models={
        "teacher": pretrain.Recipe(
            width=96,
            ffn_width=256,
            layers=(_LOCAL, _GLOBAL, _GLOBAL),
            steps=4000,
            learning_rate=3e-3,
        ),
        "student": pretrain.Recipe(
            width=64,
            ffn_width=192,
            layers=(_LOCAL, _GLOBAL),
            steps=5000,
            learning_rate=4e-3,
        ),
    },
    counts=data.Counts(),
)
TINY = Plan(
    models={
        name: dataclasses.replace(recipe, steps=2, batch_size=4)
        for name, recipe in FULL.models.items()
    },
    counts=data.Counts(train=12, anchor=12, questions=8, retention=8),
)


def make(out: str, seed: int, plan: Plan) -> None:
    """Writes everything under `out` and prints the table of accuracies.

    Raises:
      UserError: `out` is a file or holds something already.
    """
    directory = pathlib.Path(out)
    _refuse_occupied(directory)
    # Streams of their own: the data does not depend on how long the training is.
    baked = task.draw_moving_key(np.random.default_rng((seed, 0)))
    files = data.make_files(np.random.default_rng((seed, 1)), baked, plan.counts)
    data.write_files(directory, files, baked)
    chat = tokenizer.build()
    results = []
    for name, recipe in plan.models.items():
        config = pretrain.hf_config(recipe)
        decoder = Decoder(gemma3.decoder_spec(config))
        start = time.monotonic()
        params = pretrain.train(recipe, decoder, chat, baked, seed)
        seconds = time.monotonic() - start
        tokenizer.save_model(directory / name, decoder.spec, params, config, chat)
        accuracy = {
            ability: evaluate.exact_match(decoder, params, chat, rows)
            for ability, rows in abilities(files, baked).items()
        }
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        results.append(report.Result(name, recipe, size, seconds, accuracy))
    print(report.table(results))
    (directory / "README.md").write_text(report.readme(results, seed))


def abilities(files: dict[str, list[dict]], baked: task.Key) -> dict[str, list[task.Row]]:
    """Line of the table -> the rows that measure it; none of their words were trained on here."""
    questions = files["questions.jsonl"]
    words = [row["prompt"].removeprefix("map: ") for row in questions]
    return {
        "map, baked key in the prefix": [task.map_row(w, baked, show_key=True) for w in words],
        "map, no prefix, the baked key asked": questions,
        "map, no prefix, a copy asked": [task.map_row(w, None, show_key=False) for w in words],
        "map, other keys in the prefix": files["retention/other_keys.jsonl"],
        "reverse": files["retention/reverse.jsonl"],
        "sort": files["retention/sort.jsonl"],
    }


def _refuse_occupied(directory: pathlib.Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out={directory} is a file; name an empty or a new directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--out={directory} is not empty; nothing in it was touched")
