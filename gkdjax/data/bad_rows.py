"""Rows that cannot be used: told all at once, or dropped, counted and named (`data.bad_rows`)."""

import contextlib
from collections.abc import Iterator

from absl import logging

from gkdjax.utils.errors import UserError

_SHOWN = 3  # reasons, and names for each, in a message


class BadRows:
    """Takes in what is wrong with single rows, and says of each source what becomes of them.

    Attributes:
      dropped: the config's key of a source -> the names of its rows that were dropped.
    """

    def __init__(self, rule: str = "refuse"):
        self.dropped: dict[str, list[str]] = {}
        self._rule = rule
        self._found: list[tuple[str, UserError]] = []

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Takes in a UserError about the row of this name, which its message begins with."""
        try:
            yield
        except UserError as error:
            self._found.append((name, error))

    def settle(self, key: str, where: str, left: int) -> None:
        """Ends a source.

        Args:
          key: of the config, as "data.train".
          where: the source, for people.
          left: how many rows it has beside the bad ones.

        Raises:
          UserError: there are bad rows and they end the run, or nothing else is left.
        """
        found, self._found = self._found, []
        if not found:
            return
        told = _told(found)
        if self._rule == "refuse":
            advice = "; data.bad_rows='drop' would leave such rows out"
            if len(found) == 1:
                raise UserError(f"{told}{advice if left else ''}") from found[0][1]
            raise UserError(
                f"{where}: {len(found)} rows cannot be used{advice if left else ''}: {told}"
            )
        if not left:
            raise UserError(f"{where}: no row is left of {len(found)}, all were dropped: {told}")
        self.dropped.setdefault(key, []).extend(name for name, _ in found)
        logging.warning("%s: %d rows dropped (data.bad_rows): %s", where, len(found), told)


def _told(found: list[tuple[str, UserError]]) -> str:
    """The first reasons, each as it is said of its first row, with the others that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, error in found:
        said = str(error)
        reason = said.removeprefix(name) if said.startswith(name) else f": {said}"
        by_reason.setdefault(reason, []).append(name)
    told = []
    for reason, (first, *others) in list(by_reason.items())[:_SHOWN]:
        shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        also = f" (and {len(others)} more: {shown})" if others else ""
        told.append(f"{first}{reason}{also}")
    rest = len(by_reason) - len(told)
    return "; ".join(told) + (f"; and {rest} other reasons" if rest else "")
