"""Padded shapes, chosen from the data: few, and all of them met in the first epoch.

A shape is a tuple of lengths, as (student, teacher, targets) of a batch. Every shape is a program
to compile, so there are at most a few; each is at least as long in everything as the one before, so
that the last one takes whatever the others cannot.
"""

from collections.abc import Sequence

from gkdjax.models.padding import round_up

MOST = 4


Shape = tuple[int, ...]


def longest(shapes: Sequence[Shape]) -> Shape:
    """The least shape that holds all of them: (3, 9), (5, 2) -> (5, 9)."""
    return tuple(max(lengths) for lengths in zip(*shapes, strict=True))


def choose(needs: Sequence[Shape], allowed: Sequence[int], most: int = MOST) -> tuple[Shape, ...]:
    """At most `most` shapes for batches with these needs, each the smallest for one of them.

    The needs are put in order of size and cut into groups of equal number; a shape holds its group
    and all groups before.

    Args:
      needs: what each batch has to hold; not empty.
      allowed: lengths to round up to; () takes multiples of 8, and longer steps for longer lengths.
      most: at most so many shapes.
    """
    rounded = sorted((tuple(round_up(n, allowed) for n in need) for need in needs), key=_by_size)
    chain: list[Shape] = []
    for part in range(1, most + 1):
        group = rounded[: -(-len(rounded) * part // most)]
        shape = longest(group)
        if not chain or shape != chain[-1]:
            chain.append(shape)
    return tuple(chain)


def extend(shapes: Sequence[Shape], needs: Sequence[Shape], allowed: Sequence[int]):
    """The shapes and, where they do not hold all the needs, one more that does.

    Args:
      shapes: as from `choose`.
      needs: what other batches have to hold.
      allowed: as for `choose`.
    """
    whole = longest([shapes[-1], *needs])
    if whole == shapes[-1]:
        return tuple(shapes)
    return (*shapes, *choose([whole], allowed))


def smallest(shapes: Sequence[Shape], need: Shape) -> Shape:
    """The first of the shapes that holds `need`.

    Raises:
      ValueError: none does.
    """
    for shape in shapes:
        if all(have >= wanted for have, wanted in zip(shape, need, strict=True)):
            return shape
    raise ValueError(f"none of the shapes {list(shapes)} holds {need}")


def _by_size(shape: Shape) -> tuple[int, Shape]:
    return sum(shape), shape
