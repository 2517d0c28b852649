"""What became of the rows of a stream that are not trained, told in the log or as an error."""

from collections.abc import Mapping, Sequence

from absl import logging

from gkdjax.data import row_lengths, views
from gkdjax.data.views import ViewRules
from gkdjax.errors import UserError
from gkdjax.trajectories.rules import ResponseRules


def report(
    purpose: str,
    fates: Mapping[str, Sequence[str]],
    rules: ViewRules,
    responses: ResponseRules,
    texts: Sequence[str],
    rest: int,
) -> None:
    """Names the rows that are gone.

    Args:
      purpose: of the stream.
      fates: `views.Fate` -> names of its rows.
      rules: by which they were made.
      responses: by which their responses were accepted.
      texts: responses, of which the first is shown if nothing is left.
      rest: number of rows that are left.

    Raises:
      UserError: none is left.
    """
    reasons = {
        views.Fate.DROPPED.value: f"longer than data.max_length={rules.max_length}",
        views.Fate.TRUNCATED.value: f"longer than data.max_length={rules.max_length}",
        views.Fate.UNUSABLE.value: "cannot be read or rendered, see above",
        views.Fate.EMPTY.value: "a response without a token, or with one that is no id here",
        views.Fate.UNMATCHED.value: "nothing to learn with context.target_content_pattern="
        f"{rules.targets.pattern!r}, or no such response in"
        f" {responses.max_refills + 1} attempts",
    }
    gone = [(fate, fates[fate], why) for fate, why in reasons.items() if fate in fates]
    for fate, names, reason in gone:
        if names:
            logging.warning(
                "%s: %d rows %s (%s): %s",
                *(purpose, len(names), fate, reason, row_lengths.some(names)),
            )
    if not rest:
        found = "; ".join(f"{len(names)} rows: {why}" for _, names, why in gone if names)
        seen = f". The first response was {texts[0]!r}" if texts else ""
        advice = {
            views.Fate.DROPPED.value: "raise data.max_length, or let data.too_long cut such rows",
            views.Fate.UNMATCHED.value: "change context.target_content_pattern",
        }
        told = "".join(f"; {advice[fate]}" for fate, names, _ in gone if names and fate in advice)
        raise UserError(f"no row of {purpose} is left: {found}{seen}{told}")
