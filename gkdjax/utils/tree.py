"""Parameter trees by path: "layers/q_proj/kernel" names a leaf, a regex names many.

Used for LoRA targets and for sharding rules.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

PyTree = Any


def path_str(path: tuple[Any, ...]) -> str:
    """Joins a key path of `jax.tree_util` (dict keys, indices, field names) by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_path(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps `fn(path, leaf)` over every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), tree)


def match(rules: Sequence[tuple[str, Any]], tree: PyTree) -> PyTree:
    """Replaces every leaf by the value of the first rule whose regex matches its whole path.

        match([(r".*/q_proj/kernel", "tune"), (r".*", "freeze")], params)

    Args:
      rules: (regex, value) pairs, tried in order; `re.fullmatch`, so "scale" does not match
        "rescale".
      tree: any pytree.

    Raises:
      ValueError: a leaf that no rule covers, or a rule that matches no leaf; both are named.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_str(path) for path, _ in leaves]
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"the rule {pattern!r} matches none of: {', '.join(paths)}")
    values = []
    for path in paths:
        found = [value for pattern, value in rules if re.fullmatch(pattern, path)]
        if not found:
            raise ValueError(f"no rule covers the leaf {path!r}")
        values.append(found[0])
    return structure.unflatten(values)
