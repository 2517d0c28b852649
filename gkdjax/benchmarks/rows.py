"""Measures what chat rows cost before the first step: reading, rendering, encoding, batching.

    JAX_PLATFORMS=cpu python -m gkdjax.benchmarks.rows

Rows of about 200 made-up words, a tokenizer trained on such, a ChatML template. Each measurement
has a process of its own, in which `train.setup.read` does what it does for a run, and the first
batch is made.
"""

import argparse
import contextlib
import json
import pathlib
import tempfile
import time

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gkdjax import config
from gkdjax.benchmarks import harness
from gkdjax.train import setup
from gkdjax.utils.files import write_text
from gkdjax.utils.text import table

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words of each message of a row, the user's first; and of a prefix that the teacher reads.
_KINDS = {
    "one turn": ((60, 140), 0),
    "three turns": ((20, 50) * 3, 0),
    "one turn, prefix": ((60, 140), 1000),
    "three turns, prefix": ((20, 50) * 3, 1000),
    "prompt alone": ((200,), 0),
}
_MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser("rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=[*_KINDS])
    parser.add_argument("--rounds", type=int, default=3, help="Timed.")
    parser.add_argument("--out", help="A JSON file for all that was measured.")
    parser.add_argument("--measure", help="Measure this directory (in a fresh process).")
    a = parser.parse_args()
    if a.measure is not None:
        print(json.dumps(measure(pathlib.Path(a.measure))))
        return
    with tempfile.TemporaryDirectory() as root:
        cases, writer = {}, Writer()
        tokenizer = writer.tokenizer()
        for number, kind in enumerate(a.kinds):
            directory = pathlib.Path(root, str(number))
            tokenizer.save_pretrained(directory)
            write_job(directory, writer, a.rows, *_KINDS[kind])
            cases[kind] = lambda d=str(directory): harness.in_new_process(
                "gkdjax.benchmarks.rows", f"--measure={d}"
            )
        results = harness.rounds(cases, a.rounds, a.out)
    print(report(results, a.rows))
    print(harness.where())


def write_job(directory: pathlib.Path, write: "Writer", rows: int, messages, prefix: int) -> None:
    """Writes config.json, train.jsonl and the words of the prefix."""
    write_text(directory / "config.json", json.dumps(_MODEL | {"vocab_size": 16384}))
    write_text(directory / "prefix.txt", write.text(prefix))
    with (directory / "train.jsonl").open("w") as file:
        for _ in range(rows):
            talk = [
                {"role": ("user", "assistant")[i % 2], "content": write.text(count)}
                for i, count in enumerate(messages)
            ]
            file.write(json.dumps({"messages": talk}) + "\n")


class Writer:
    """Writes text of 20,000 words, the frequent ones short."""

    def __init__(self):
        self._rng = np.random.default_rng(0)
        lengths = self._rng.integers(2, 6, 20_000) + np.arange(20_000) // 4_000
        letters = self._rng.choice([*"etaoinshrdlucmfwygpbvk"], lengths.sum())
        self._words = ["".join(part) for part in np.split(letters, np.cumsum(lengths[:-1]))]

    def text(self, words: int) -> str:
        ranks = len(self._words) ** self._rng.random(words) - 1
        ends = self._rng.choice([" ", ", ", ". ", ".\n\n"], words, p=[0.85, 0.07, 0.06, 0.02])
        found = zip(ranks.astype(int), ends, strict=True)
        return "".join(self._words[rank] + end for rank, end in found).strip()

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        special = ["<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        how = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=16_000, **how)
        inner.train_from_iterator((self.text(1000) for _ in range(200)), trainer)
        end = {"eos_token": special[1], "pad_token": special[1]}
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **end)
        made.chat_template = _TEMPLATE
        return made


def measure(directory: pathlib.Path) -> dict:
    """Sets up a run of `write_job`'s rows in this process, which should be a fresh one.

    Returns:
      seconds, cpu_seconds: from before the data are read to the first batch; rise: of the peak
      memory, in bytes; crc32: of all that batches are made of.
    """
    prefix = (directory / "prefix.txt").read_text()
    c = config.default()
    c.student.model, c.data.train = str(directory), str(directory / "train.jsonl")
    if not prefix:  # then another model has to be the teacher
        c.teacher.backend, c.teacher.model = "flax", str(directory)
    else:
        c.context.prefix_messages = ({"role": "system", "content": prefix},)
    c = config.parse(c)
    before = harness.status_bytes("VmHWM")
    start, cpu_start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as workdir, contextlib.ExitStack() as connections:
        dataset = setup.read(c, pathlib.Path(workdir), None, connections).dataset
    if not dataset.needs_responses():
        dataset = dataset.with_rollouts({})
        dataset.batch(0)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "rise": harness.status_bytes("VmHWM") - before,
        "crc32": dataset.fingerprint(),
    }


def report(results: harness.Results, rows: int) -> str:
    """A row of each kind, medians of its rounds."""
    cells = []
    for kind, found in results.items():
        total, wall = (harness.median(found, key) for key in ("cpu_seconds", "seconds"))
        kb = harness.median(found, "rise") / rows / 1e3
        each = (f"{1e3 * total / rows:.2f}", f"{1e3 * wall / rows:.2f}", f"{kb:.1f}")
        cells.append([kind, f"{rows:,}", f"{total:.1f}", *each])
    columns = ["a row", "rows", "CPU s", "CPU ms a row", "ms a row", "peak memory, kB a row"]
    return table(columns, cells)


if __name__ == "__main__":
    main()
