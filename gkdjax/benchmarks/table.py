"""Rounds of measurements -> one row a case, as numbers and as a table."""

import statistics
from collections.abc import Iterable

from gkdjax.benchmarks.case import UNFUSED, Case

GIB = 2**30
_COLUMNS = ("V", "tuning", "prompts", "step", "s", "CPU s", "tokens/s", "peak GiB", "temp GiB")
_COLUMNS += ("times as fast", "of its CPU s", "of its peak")
_SHARES = ("times_as_fast", "of_cpu_seconds", "of_peak")


def summarize(measured: Iterable[tuple[Case, list[dict]]]) -> list[dict]:
    """One row a case, from its workers' results, one a round.

    A row's ratios are medians over the rounds, each of one round's case against the same round's
    "unfused"; None if that was not measured.
    """
    measured = list(measured)
    unfused = {_setting(case): rounds for case, rounds in measured if case.variant == UNFUSED}
    return [_row(case, rounds, unfused.get(_setting(case))) for case, rounds in measured]


def render(rows: list[dict]) -> str:
    """A Markdown table."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _setting(case: Case) -> tuple:
    return case.vocab, case.tuning, case.prompts


def _row(case: Case, rounds: list[dict], unfused: list[dict] | None) -> dict:
    seconds = _median(rounds, "seconds")
    row = {
        "vocab": case.vocab,
        "tuning": case.tuning,
        "prompts": case.prompts,
        "variant": case.variant,
        "seconds": seconds,
        "cpu_seconds": _median(rounds, "cpu_seconds"),
        "tokens_per_second": case.tokens / seconds,
        "peak_bytes": _median(rounds, "peak_bytes"),
        "temp_bytes": _median(rounds, "temp_bytes"),
        "loss": rounds[-1]["losses"][0],
    }
    if unfused is None:
        return row | dict.fromkeys(_SHARES)
    return row | {
        "times_as_fast": _median_ratio(unfused, rounds, "seconds"),
        "of_cpu_seconds": _median_ratio(rounds, unfused, "cpu_seconds"),
        "of_peak": _median_ratio(rounds, unfused, "peak_bytes"),
    }


def _median_ratio(rounds: list[dict], to: list[dict], key: str) -> float:
    pairs = zip(rounds, to, strict=True)
    return statistics.median(_value(one, key) / _value(other, key) for one, other in pairs)


def _median(rounds: list[dict], key: str) -> float:
    return statistics.median(_value(result, key) for result in rounds)


def _value(result: dict, key: str) -> float:
    """A round's number: the median of its steps where there is one a step."""
    return statistics.median(result[key]) if isinstance(result[key], list) else result[key]


def _cells(row: dict) -> list[str]:
    share = ("-" if row[name] is None else f"{row[name]:.2f}" for name in _SHARES)
    return [
        f"{row['vocab']:,}",
        row["tuning"],
        row["prompts"],
        row["variant"],
        f"{row['seconds']:.2f}",
        f"{row['cpu_seconds']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_bytes'] / GIB:.2f}",
        f"{row['temp_bytes'] / GIB:.2f}",
        *share,
    ]
