"""Padded lengths: few, so that few programs are compiled."""

from collections.abc import Sequence

from gkdjax.utils.errors import UserError


def round_up(length: int, allowed: Sequence[int]) -> int:
    """The least allowed length that holds `length`; with (): 13 -> 16, 100 -> 104, 1000 -> 1024.

    Raises:
      UserError: it is longer than all that are allowed.
    """
    if not allowed:
        step = max(8, 1 << max(length.bit_length() - 4, 0))
        return -(-length // step) * step
    fitting = [n for n in allowed if n >= length]
    if not fitting:
        raise UserError(
            f"a batch needs {length} tokens, and the longest of config.data.bucket_lengths is"
            f" {max(allowed)}; add a longer one, or leave it empty"
        )
    return min(fitting)


def ladder(max_length: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """Lengths for prompts that are not known beforehand: the allowed ones.

    For (): 16, 32, 48, 64, 96, 128, ... up to `max_length`, which is always the last.
    """
    if allowed:
        return tuple(sorted(allowed))
    lengths, power = [16], 32
    while power < max_length:
        lengths += [power, power * 3 // 2]
        power *= 2
    return (*(length for length in lengths if length < max_length), max_length)
