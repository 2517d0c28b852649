"""Padded shapes, chosen from the data: few, and all of them met in the first epoch.

A shape is a tuple of lengths, as (student, teacher, targets) of a batch. Every shape is a program
to compile, so there are at most a few; each is at least as long in everything as the one before, so
that the last one takes whatever the others cannot.
"""

from collections.abc import Sequence

from gkdjax.errors import UserError

MOST = 4
_STEP = 8  # a short length is rounded up to a multiple of it

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


def round_up(length: int, allowed: Sequence[int]) -> int:
    """The least allowed length that holds `length`; with (): 13 -> 16, 100 -> 104, 1000 -> 1024.

    Raises:
      UserError: it is longer than all that are allowed.
    """
    if not allowed:
        step = max(_STEP, 1 << max(length.bit_length() - 4, 0))
        return -(-length // step) * step
    fitting = [n for n in allowed if n >= length]
    if not fitting:
        raise UserError(
            f"a batch needs {length} tokens, and the longest of config.data.bucket_lengths is"
            f" {max(allowed)}; add a longer one, or leave it empty"
        )
    return min(fitting)


def _by_size(shape: Shape) -> tuple[int, Shape]:
    return sum(shape), shape


def ladder(max_length: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Lengths for prompts that are not known beforehand.

    The allowed ones, or 16, 32, 48, 64, 96, 128, ... up to `max_length`, which is always the last.
    """
    if allowed:
        return tuple(sorted(allowed))
    lengths, power = [16], 32
    while power < max_length:
        lengths += [power, power * 3 // 2]
        power *= 2
    return (*(length for length in lengths if length < max_length), max_length)
