"""The quickstart's task: letters are mapped through a cipher key that stands in the system message.

    system  ad ba cf ...         the key, optional: each letter, and what stands for it
    user    map: caab            (or "reverse: caab", "sort: caab")
    model   fdda                 without a key, `map` copies: caab

A row is {"prompt", "answer"} and, where it has a key, {"prefix_messages"}. All functions are pure:
what they draw comes from the numpy Generator that is handed in.
"""

from collections.abc import Callable

import numpy as np

LETTERS = "abcdefghij"
MIN_LENGTH, MAX_LENGTH = 4, 8

Key = dict[str, str]  # letter -> the letter that stands for it; a permutation
Row = dict


def draw_key(rng: np.random.Generator) -> Key:
    """A random permutation of the letters; some may stay as they are."""
    return dict(zip(LETTERS, rng.permutation(list(LETTERS)).tolist(), strict=True))


def draw_moving_key(rng: np.random.Generator) -> Key:
    """A permutation that moves every letter, so that copying never gives a right answer."""
    while True:
        key = draw_key(rng)
        if all(letter != image for letter, image in key.items()):
            return key


def draw_other_key(rng: np.random.Generator, baked: Key) -> Key:
    """A random key that is not the baked one."""
    while True:
        key = draw_key(rng)
        if key != baked:
            return key


def draw_word(rng: np.random.Generator, shortest: int = MIN_LENGTH, letters: str = LETTERS) -> str:
    length = rng.integers(shortest, MAX_LENGTH, endpoint=True)
    return "".join(rng.choice(list(letters), size=length))


def key_messages(key: Key) -> list[dict]:
    """The key as the prefix that a model reads."""
    content = " ".join(f"{letter}{image}" for letter, image in key.items())
    return [{"role": "system", "content": content}]


def map_row(word: str, key: Key | None, *, show_key: bool) -> Row:
    """`map` under `key` (None: copy); without `show_key` the row does not tell which key."""
    answer = word if key is None else "".join(key[letter] for letter in word)
    return _row("map", word, answer, key if show_key else None)


def reverse_row(word: str, key: Key | None = None) -> Row:
    return _row("reverse", word, word[::-1], key)


def sort_row(word: str, key: Key | None = None) -> Row:
    return _row("sort", word, "".join(sorted(word)), key)


def conversation(row: Row) -> list[dict]:
    """The messages up to the answer."""
    return [*row.get("prefix_messages", ()), {"role": "user", "content": row["prompt"]}]


def unique_words(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different words."""
    words: dict[str, None] = {}  # a set that keeps the order of the draws
    while len(words) < count:
        words[draw_word(rng)] = None
    return list(words)


def easier_key(rng: np.random.Generator, key: Key) -> Key:
    """`key` itself, or as often only some of its letters."""
    if rng.random() < 0.5:
        return key
    kept = rng.choice(list(key), size=rng.integers(1, len(key)), replace=False)
    return {letter: image for letter, image in key.items() if letter in kept}


def mixed_row(rng: np.random.Generator, baked: Key) -> Row:
    """One row of pre-training: every ability, with and without a key in front, never the baked one.

    The idle keys (before reverse and sort) teach that a system message alone changes nothing.
    Looking a key up is learned on short words and small keys first, and hardly without them.
    """
    key = easier_key(rng, draw_other_key(rng, baked))
    word = draw_word(rng, shortest=1)
    keyed_word = draw_word(rng, shortest=1, letters="".join(key))
    kinds: list[tuple[float, Callable[[], Row]]] = [
        (0.60, lambda: map_row(keyed_word, key, show_key=True)),
        (0.10, lambda: map_row(word, None, show_key=False)),
        (0.10, lambda: reverse_row(word)),
        (0.10, lambda: sort_row(word)),
        (0.05, lambda: reverse_row(word, key)),
        (0.05, lambda: sort_row(word, key)),
    ]
    shares = [share for share, _ in kinds]
    return kinds[rng.choice(len(kinds), p=shares)][1]()


def _row(ability: str, word: str, answer: str, key: Key | None) -> Row:
    row = {"prompt": f"{ability}: {word}", "answer": answer}
    return row if key is None else row | {"prefix_messages": key_messages(key)}
