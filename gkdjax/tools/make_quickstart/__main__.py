"""Makes the embedded quickstart from nothing: data, two pre-trained models, a table of both.

python -m gkdjax.tools.make_quickstart --out=DIR [--seed=0] [--tiny]
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

from gkdjax import tools
from gkdjax.models.decoder import Decoder
from gkdjax.models.families import gemma3
from gkdjax.tools.make_quickstart import pretrain, task
from gkdjax.utils.errors import UserError
from gkdjax.utils.files import write_json, write_lines, write_text

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
RECIPES = {
    "teacher": pretrain.Recipe(96, 256, (_LOCAL, _GLOBAL, _GLOBAL), 4000, 3e-3),
    "student": pretrain.Recipe(64, 192, (_LOCAL, _GLOBAL), 5000, 4e-3),
}
_TINY_COUNTS = {"train": 12, "anchor": 12, "questions": 8, "retention": 8}

_README = """\
# The embedded quickstart

Everything here was made from nothing, without a network, by

    python -m gkdjax.tools.make_quickstart --out=DIR --seed={seed}

The task: letters are mapped through a cipher key that stands in the system message (`prefix.json`:
each letter, then what stands for it). Without a key `map` copies, so the unprompted student scores
0 until the key is baked into its weights. It can also reverse, sort, and map by other keys, and
ought to keep that.

{models}

{table}

Learning to look a key up is a sudden transition in pre-training, and where it falls depends on the
seed and on the machine's rounding: that is why the checkpoints are shipped and not made on the way.

| file | rows |
| --- | --- |
| `train.jsonl` | prompts of the task to bake, without answers |
| `anchor.jsonl` | what must survive, with answers: reverse, sort, map by other keys |
| `questions.jsonl` | held-out questions under the baked key, none of them in `train.jsonl` |
| `retention/*.jsonl` | held-out questions of what must survive, none of them in `anchor.jsonl` |
| `prefix.json` | the messages to bake in |
"""


def make(directory: pathlib.Path, seed: int = 0, *, tiny: bool = False) -> None:
    """Writes everything under `directory`, an empty or a new one, and prints the accuracies.

    The key, the data and the two models follow from `seed`; `tiny` makes few rows and steps.

    Raises:
      UserError: `directory` is a file or holds something already.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out={directory} is a file; name an empty or a new directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--out={directory} is not empty; nothing in it was touched")
    # Streams of their own: the data does not depend on how long the training is.
    baked = task.moving_key(np.random.default_rng((seed, 0)))
    counts = _TINY_COUNTS if tiny else task.COUNTS
    files = task.make_files(np.random.default_rng((seed, 1)), baked, counts)
    for name, rows in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(directory / name, rows)
    write_json(directory / "prefix.json", task.key_messages(baked))

    tokenizer = pretrain.build_tokenizer()
    abilities, lines, accuracies = _abilities(files, baked), [], {}
    for name, recipe in RECIPES.items():
        if tiny:
            recipe = recipe._replace(steps=2, batch_size=4)
        config = pretrain.hf_config(recipe)
        decoder = Decoder(gemma3.decoder_spec(config))
        start = time.monotonic()
        params = pretrain.train(recipe, decoder, tokenizer, baked, seed)
        minutes = (time.monotonic() - start) / 60
        pretrain.save_model(directory / name, decoder.spec, params, config, tokenizer)
        accuracies[name] = [
            pretrain.exact_match(decoder, params, tokenizer, rows) for rows in abilities.values()
        ]
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        kinds = ", ".join(kind.removesuffix("_attention") for kind in recipe.layers)
        lines.append(
            f"- `{name}/`: {size:,} parameters, width {recipe.width}, layers {kinds};"
            f" {recipe.steps:,} steps of {recipe.batch_size} rows, {minutes:.0f} minutes"
        )
    table = accuracy_table(list(abilities), accuracies)
    print(table)
    readme = _README.format(seed=seed, models="\n".join(lines), table=table)
    write_text(directory / "README.md", readme)


def _abilities(files: dict[str, list[dict]], baked: task.Key) -> dict[str, list[task.Row]]:
    """Line of the table -> the rows that measure it; none of their words were trained on here."""
    questions = files["questions.jsonl"]
    words = [row["prompt"].removeprefix("map: ") for row in questions]
    return {
        "map, baked key in the prefix": [task.make_row("map", word, baked) for word in words],
        "map, no prefix, the baked key asked": questions,
        "map, no prefix, a copy asked": [task.make_row("map", word) for word in words],
        "map, other keys in the prefix": files["retention/other_keys.jsonl"],
        "reverse": files["retention/reverse.jsonl"],
        "sort": files["retention/sort.jsonl"],
    }


def accuracy_table(abilities: list[str], accuracies: dict[str, list[float]]) -> str:
    """Markdown: one column a model, exact match in per cent."""
    lines = [["exact match, %", *accuracies], ["---"] * (1 + len(accuracies))]
    for ability, shares in zip(abilities, zip(*accuracies.values(), strict=True), strict=True):
        lines.append([ability, *(f"{100 * share:.1f}" for share in shares)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("make_quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="An empty or new one.")
    parser.add_argument("--seed", type=int, default=0, help="Of the key, the data, the models.")
    parser.add_argument("--tiny", action="store_true", help="A few steps and rows, as a trial.")
    return tools.run(parser, lambda f: make(f.out, f.seed, tiny=f.tiny), argv)


if __name__ == "__main__":
    sys.exit(main())
