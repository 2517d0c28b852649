"""Which curves a run has: of its training, and of what was measured on the way."""

import itertools
from collections.abc import Iterator, Sequence

from gkdjax.report.curves import BLACK, BLUE, ORANGE, Look, Panel, Series, points

# Off-policy steps have two divergences at most: the warm-up's and the one after it.
_OFF_POLICY = (Look("-", "o", BLUE), Look(":", "v", BLUE))
_ON_POLICY = Look("-.", "x", ORANGE)
_ANCHORS = tuple(Look("--", marker, BLACK) for marker in "+*1234")

_TEXTS = {"teacher_text": ("teacher's text", "o", BLUE)}
_TEXTS |= {"student_text": ("student's text", "s", ORANGE)}
_VALIDATION = {"validation": ("validation", "^", BLACK)}
_SIDE_EFFECTS = {"side_effects": ("unrelated prompts", "o", BLUE)}
_DIVERGENCES = {"forward_kl": ("forward KL", "-", "full")}
_DIVERGENCES |= {"reverse_kl": ("reverse KL", "--", "none")}
_AGREEMENTS = {"top1_agreement": ("top-1 agreement", "-", "full")}
_AGREEMENTS |= {"acceptance_rate": ("acceptance", "--", "none")}
_PERPLEXITY = {"perplexity": ("perplexity", "-", "full")}
_ACCURACY, _LOSS = Look("-", "D", BLACK), Look("-.", "P", BLACK)


def panels(metrics: Sequence[dict], evaluations: Sequence[dict]) -> list[Panel]:
    """The training loss, and what else the lines hold.

    Args:
      metrics: lines of metrics.jsonl; the loss of "step" n is the student's after n steps.
      evaluations: lines of eval.jsonl; "step" counts the steps done.
    """
    nats, share = {"unit": "nats a token"}, {"unit": "share", "scale": "share"}
    lines = evaluations
    validation = [*_one(lines, "validation/loss", "loss", _LOSS)]
    validation += _measured(lines, _VALIDATION, _DIVERGENCES)
    made = [
        Panel("distance to the teacher", _measured(lines, _TEXTS, _DIVERGENCES), **nats),
        Panel("agreement with the teacher", _measured(lines, _TEXTS, _AGREEMENTS), **share),
        Panel("right answers", _one(lines, "accuracy", "accuracy", _ACCURACY), **share),
        Panel("validation", validation, **nats),
        Panel("perplexity", _measured(lines, _TEXTS | _VALIDATION, _PERPLEXITY), unit="a token"),
        Panel("side effects", _measured(lines, _SIDE_EFFECTS, _DIVERGENCES), **nats),
    ]
    loss = Panel("training loss", [*_losses(metrics)], noisy=True, **nats)
    return [loss, *(panel for panel in made if panel.series)]


def _losses(metrics: Sequence[dict]) -> Iterator[Series]:
    """One a divergence and author of the text: losses of different kinds are not comparable."""
    kinds: dict[tuple[bool, str], list[dict]] = {}
    for line in metrics:
        kinds.setdefault((line["on_policy_rows"] > 0, line["divergence"]), []).append(line)
    off_policy = iter(_OFF_POLICY)
    for (on_policy, divergence), lines in kinds.items():
        look = _ON_POLICY if on_policy else next(off_policy)
        label = f"{'on' if on_policy else 'off'}-policy, {divergence}"
        yield Series(label, look, *points(lines, "loss"))
    anchors = [key for key in (metrics[0] if metrics else ()) if key.startswith("anchor")]
    for key, look in zip(anchors, itertools.cycle(_ANCHORS), strict=False):
        label = key.removesuffix("_loss").replace("_", " ", 1)
        yield Series(label, look, *points(metrics, key))


def _one(lines: Sequence[dict], key: str, label: str, look: Look) -> list[Series]:
    steps, values = points(lines, key)
    return [Series(label, look, steps, values)] if len(steps) else []


def _measured(lines: Sequence[dict], texts: dict, names: dict) -> list[Series]:
    found = []
    for text, (text_label, marker, color) in texts.items():
        for name, (label, dashes, fill) in names.items():
            label = label if len(texts) == 1 else f"{label}, {text_label}"
            look = Look(dashes, marker, color, fill)
            found += _one(lines, f"{text}/{name}", label, look)
    return found
