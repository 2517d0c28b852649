"""What a compiled program exchanges between devices, read off its text."""

import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Collective(NamedTuple):
    """One instruction."""

    kind: str
    shapes: list[tuple[int, ...]]  # of its results; several where XLA has joined some
    in_loop: bool  # in the body of a loop, or in what that calls


def collectives(text: str) -> list[Collective]:
    """All of a program, `jax.stages.Compiled.as_text()`."""
    found, calls, bodies, name = [], {}, set(), None
    for line in text.splitlines():
        begins = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if begins:
            name = begins[1]
            calls[name] = set()
            continue
        instruction = re.search(rf" = (.+?) ({_KINDS})(?:-start)?\(", line)
        if instruction:
            found.append((name, instruction[2], _shapes(instruction[1])))
        for role, names in re.findall(r"\b(\w+)=(\{%[^}]*\}|%[\w.\-]+)", line):
            called = set(re.findall(r"%([\w.\-]+)", names))
            calls[name] |= called
            bodies |= called if role == "body" else set()
    looped, ahead = set(), list(bodies)
    while ahead:
        name = ahead.pop()
        if name not in looped:
            looped.add(name)
            ahead += calls.get(name, ())
    return [Collective(kind, shapes, name in looped) for name, kind, shapes in found]


def _shapes(text: str) -> list[tuple[int, ...]]:
    dimensions = re.findall(r"\w+\[([\d,]*)\]", text)
    return [tuple(int(n) for n in each.split(",") if n) for each in dimensions]
