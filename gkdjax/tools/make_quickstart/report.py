"""What the tool tells about the models it has made."""

import dataclasses

from gkdjax.tools.make_quickstart.pretrain import Recipe


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained model: `parameters` in all, `accuracy` per line of the table."""

    name: str
    recipe: Recipe
    parameters: int
    seconds: float
    accuracy: dict[str, float]


def table(results: list[Result]) -> str:
    """Markdown: one column a model, exact match in per cent."""
    lines = [
        "| exact match, % | " + " | ".join(result.name for result in results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    for ability in results[0].accuracy:
        numbers = (f"{100 * result.accuracy[ability]:.1f}" for result in results)
        lines.append(f"| {ability} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def readme(results: list[Result], seed: int) -> str:
    """README.md of the directory."""
    models = "\n".join(
        f"- `{r.name}/`: {r.parameters:,} parameters, width {r.recipe.width}, layers "
        f"{', '.join(kind.removesuffix('_attention') for kind in r.recipe.layers)}; "
        f"{r.recipe.steps:,} steps of {r.recipe.batch_size} rows, {r.seconds / 60:.0f} minutes"
        for r in results
    )
    return _README.format(seed=seed, models=models, table=table(results))


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
