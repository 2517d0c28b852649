"""The quickstart's task: letters are mapped through a cipher key that stands in the system message.

    system  ad ba cf ...         the key, optional: each letter, and what stands for it
    user    map: caab            (or "reverse: caab", "sort: caab")
    model   fdda                 without a key, `map` copies: caab

A row is {"prompt", "answer"} and, where it shows a key, {"prefix_messages"}.
"""

from collections.abc import Callable, Iterable

import numpy as np

LETTERS = "abcdefghij"
MIN_LENGTH, MAX_LENGTH = 4, 8
# Rows of each file; "retention" is the number for each retained ability.
COUNTS = {"train": 4096, "anchor": 8192, "questions": 1024, "retention": 640}

Key = dict[str, str]  # letter -> the letter that stands for it; a permutation
Row = dict


def random_key(rng: np.random.Generator, is_allowed: Callable[[Key], bool]) -> Key:
    while True:
        key = dict(zip(LETTERS, rng.permutation(list(LETTERS)).tolist(), strict=True))
        if is_allowed(key):
            return key


def moving_key(rng: np.random.Generator) -> Key:
    """A key that moves every letter, so that copying never gives a right answer."""
    return random_key(rng, lambda key: all(letter != image for letter, image in key.items()))


def other_key(rng: np.random.Generator, baked: Key) -> Key:
    return random_key(rng, lambda key: key != baked)


def key_messages(key: Key) -> list[dict]:
    """The key as the prefix that a model reads."""
    content = " ".join(f"{letter}{image}" for letter, image in key.items())
    return [{"role": "system", "content": content}]


def make_row(ability: str, word: str, key: Key | None = None, *, show_key: bool = True) -> Row:
    """One question and its answer; `map` without a key copies."""
    answers = {
        "map": word.translate(str.maketrans(key or {})),
        "reverse": word[::-1],
        "sort": "".join(sorted(word)),
    }
    row = {"prompt": f"{ability}: {word}", "answer": answers[ability]}
    return row | {"prefix_messages": key_messages(key)} if key and show_key else row


def conversation(row: Row) -> list[dict]:
    """The messages up to the answer."""
    return [*row.get("prefix_messages", ()), {"role": "user", "content": row["prompt"]}]


def mixed_row(rng: np.random.Generator, baked: Key) -> Row:
    """One row of pre-training: every ability, with and without a key in front, never the baked one.

    The idle keys (before reverse and sort) teach that a system message alone changes nothing.
    Looking a key up is learned on short words and small keys first, and hardly without them.
    """
    key = other_key(rng, baked)
    if rng.random() >= 0.5:  # only some of its letters
        kept = rng.choice(list(key), size=rng.integers(1, len(key)), replace=False)
        key = {letter: image for letter, image in key.items() if letter in kept}
    word = _random_word(rng, shortest=1)
    keyed_word = _random_word(rng, shortest=1, letters="".join(key))
    kinds = (
        (0.60, ("map", keyed_word, key)),
        (0.10, ("map", word)),
        (0.10, ("reverse", word)),
        (0.10, ("sort", word)),
        (0.05, ("reverse", word, key)),
        (0.05, ("sort", word, key)),
    )
    shares, arguments = zip(*kinds, strict=True)
    return make_row(*arguments[rng.choice(len(kinds), p=shares)])


def make_files(
    rng: np.random.Generator, baked: Key, counts: dict[str, int]
) -> dict[str, list[Row]]:
    """File name -> rows. A held-out word never stands in the training rows of its own ability."""
    train, questions = _split(rng, counts["train"], counts["questions"])
    # Looking up other keys is what baking one of them puts at risk: it gets most of the anchor.
    fifth = counts["anchor"] // 5
    reverse_anchor, reverse = _split(rng, fifth, counts["retention"])
    sort_anchor, sort = _split(rng, fifth, counts["retention"])
    others_anchor, others = _split(rng, counts["anchor"] - 2 * fifth, counts["retention"])

    def by_other_keys(words: Iterable[str]) -> list[Row]:
        return [make_row("map", word, other_key(rng, baked)) for word in words]

    anchor = [make_row("reverse", word) for word in reverse_anchor]
    anchor += [make_row("sort", word) for word in sort_anchor]
    anchor += by_other_keys(others_anchor)
    return {
        "train.jsonl": [{"prompt": f"map: {word}"} for word in train],
        "anchor.jsonl": [_answered(anchor[i]) for i in rng.permutation(len(anchor))],
        "questions.jsonl": [make_row("map", word, baked, show_key=False) for word in questions],
        "retention/reverse.jsonl": [make_row("reverse", word) for word in reverse],
        "retention/sort.jsonl": [make_row("sort", word) for word in sort],
        "retention/other_keys.jsonl": by_other_keys(others),
    }


def _random_word(
    rng: np.random.Generator, shortest: int = MIN_LENGTH, letters: str = LETTERS
) -> str:
    length = rng.integers(shortest, MAX_LENGTH, endpoint=True)
    return "".join(rng.choice(list(letters), size=length))


def _split(rng: np.random.Generator, first: int, second: int) -> tuple[list[str], list[str]]:
    """Different words."""
    words: dict[str, None] = {}  # a set in the order of the draws
    while len(words) < first + second:
        words[_random_word(rng)] = None
    return list(words)[:first], list(words)[first:]


def _answered(row: Row) -> Row:
    """The answer as the response to learn from, so that no teacher has to write one."""
    others = {name: value for name, value in row.items() if name != "answer"}
    return others | {"response": row["answer"]}
