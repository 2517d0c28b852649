"""Parameter trees by path: "layers/q_proj/kernel" names a leaf, a regex names many.

Used for what is tuned and what is frozen, for LoRA targets and for sharding rules.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

PyTree = Any


def path_str(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as text: dict keys, indices and field names joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_path(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`fn(path, leaf)` for every leaf, in a tree of the same structure."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), tree)


def match(rules: Sequence[tuple[str, Any]], tree: PyTree) -> PyTree:
    """For every leaf the value of the first rule whose regex matches its whole path.

        match([(r".*/q_proj/kernel", "tune"), (r".*", "freeze")], params)

    Args:
      rules: (regex, value) pairs, tried in order; `re.fullmatch`, so "scale" does not match
        "rescale".
      tree: any pytree.

    Returns:
      A tree of the same structure that holds the rules' values.

    Raises:
      ValueError: a leaf that no rule covers, or a rule that matches no leaf; both are named.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_str(path) for path, _ in leaves]
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"the rule {pattern!r} matches none of: {', '.join(paths)}")
    return structure.unflatten([_first_match(rules, path) for path in paths])


def partition(tree: PyTree, predicate: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Splits a tree by path: (leaves where `predicate(path)`, all others).

    Both results have the tree's containers, with None where a leaf went to the other side; jax
    takes None for an empty subtree, so gradients and optimizers skip the holes. `combine` undoes
    it.
    """
    selected = map_with_path(lambda path, leaf: leaf if predicate(path) else None, tree)
    rest = map_with_path(lambda path, leaf: None if predicate(path) else leaf, tree)
    return selected, rest


def combine(a: PyTree, b: PyTree) -> PyTree:
    """Fills the None holes of each tree from the other.

    Raises:
      ValueError: a place where both trees hold something (it is named), or containers that differ.
    """

    def pick(path, x, y):
        if x is not None and y is not None:
            raise ValueError(f"both trees hold a value at {path_str(path)!r}")
        return y if x is None else x

    return jax.tree_util.tree_map_with_path(pick, a, b, is_leaf=lambda x: x is None)


def _first_match(rules: Sequence[tuple[str, Any]], path: str) -> Any:
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise ValueError(f"no rule covers the leaf {path!r}")
