"""What is asked has to fit."""

from gkdjax.errors import UserError
from gkdjax.types import Example


def check_fits(question: Example, length: int, max_length: int) -> None:
    """Raises UserError for a prompt that leaves no room for an answer."""
    if length >= max_length:
        raise UserError(
            f"{question.name}: the question has {length} tokens with its prefix and leaves no room"
            f" in data.max_length = {max_length}; raise it"
        )
