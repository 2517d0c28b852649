"""Directories as runs leave them, finished and not, without running anything."""

import json
import math
import pathlib

from gkdjax import config as config_lib
from gkdjax import report
from gkdjax.losses import Agreement
from gkdjax.report import results
from gkdjax.utils.files import write_lines

MEASURES = (*Agreement._fields, "perplexity")
QUESTIONS = ["Which day comes after Tuesday?", "What is 7 times 6?", "Name a river in France."]
CONDITIONS = tuple(results.CONDITIONS)
SETS = {"questions": 512, "heldout": 256, "sort": 640, "reverse": 64}
TASK = {name: {"rows": 8, "crc32": 100 + i} for i, name in enumerate(("questions", "heldout"))}
TASK |= {"prompts": {"rows": 8, "crc32": 7}, "retention.sort": {"rows": 640, "crc32": 9}}
STEPS = 60
SCHEDULE = (0, 5, 10, 20, 40, 60)


def metric(step: int, loss: float, divergence="forward_kl", on_policy_rows=0, **more) -> dict:
    rest = {"targets": 8, "tokens": 20, "tokens_per_second": 3.5, "grad_norm": 1.0}
    own = {"divergence": divergence, "on_policy_rows": on_policy_rows, "learning_rate": 1e-3}
    return {"step": step, "loss": loss, **own, **rest, "compilations": int(step == 0), **more}


def three_phases(steps: int) -> list[dict]:
    """Off-policy under a warm-up's divergence, then off- and on-policy steps in turn; an anchor."""
    lines = []
    for i in range(steps):
        divergence = "forward_kl" if i < steps // 3 else "reverse_kl"
        on_policy = 8 * (divergence == "reverse_kl" and i % 2)
        loss = (2.0 + math.sin(17 * i) / 3) / (i / 5 + 1)
        lines.append(metric(i, loss, divergence, on_policy, anchor_loss=0.01 * (i + 1)))
    return lines


def measures(start: float, prefix: str = "") -> dict[str, float]:
    """Every value differs."""
    values = {name: start / (1 + i) for i, name in enumerate(MEASURES)}
    values |= {n: 1 - v / 4 for n, v in values.items() if n.endswith(("mass", "ment", "rate"))}
    values["perplexity"] = 1 + 3 * start
    return {prefix + name: value for name, value in values.items()}


def evaluation(step: int, texts=("teacher_text", "student_text")) -> dict:
    """Every value differs, and changes from step to step."""
    line = {"step": step}
    for i, text in enumerate(texts):
        line |= measures(0.9 / (1 + i / 3 + step / 5), f"{text}/")
    return line


def full_evaluation(step: int) -> dict:
    """All that the schedule can measure."""
    more = {"accuracy": 0.95 * step / (step + 5), "validation/loss": 1.1 / (1 + step / 6)}
    more |= measures(0.8 / (1 + step / 7), "validation/")
    return evaluation(step) | more | measures(0.001 * step + 1e-4, "side_effects/")


def answers_of(who: str) -> list[str]:
    return [f"{who} thinks: {question[:-1].lower()}" for question in QUESTIONS]


def condition(place: int) -> dict[str, float]:
    return {
        "accuracy": (0.031, 0.42, 0.984, 0.962, 0.975, 0.105)[place],
        "heldout_accuracy": (0.027, 0.4, 0.98, 0.953, 0.969, 0.11)[place],
        **measures((0.9, 0.5, 0.0, 0.04, 0.03, 0.8)[place]),
    }


def before() -> dict:
    why = "the teacher's server does not score given text; a vLLM server does"
    return {
        **{name: condition(place) for place, name in enumerate(CONDITIONS[:3])},
        "abilities": {"sort": 0.99, "reverse": 0.5},
        "samples": {"question": [*QUESTIONS]} | {name: answers_of(name) for name in CONDITIONS[:3]},
        "task": TASK,
        "unavailable": {"distance on the student's own text": why},
        "counts": SETS,
        "answers": [],
    }


def after() -> dict:
    students = {name: condition(place) for place, name in enumerate(CONDITIONS) if place > 2}
    return {
        **students,
        "abilities": {"sort": 0.98, "reverse": 0.53},
        "samples": {name: answers_of(name) for name in students},
        "side_effects": measures(0.06),
        "prefix_cost": {
            **{"tokens_saved": 1041.25, "rows": 64, "new_tokens": 100},
            "seconds": {"without": 0.8, "with": 2.0, "with_kept": 1.0},
        },
    }


def rows_report() -> dict:
    padding = {"student": 0.6, "teacher": 0.3, "targets": 0.0}
    of = {"rows": 2000, "refused_responses": 3, "padding": padding, "dropped": ["a:1"]}
    return {"train": of, "anchor_chat": of | {"dropped": []}}


def training(metrics: list[dict]) -> dict:
    return {
        **{"steps": len(metrics), "tokens": 20 * len(metrics), "on_policy_steps": 20},
        **{"compilations": 5, "loss": metrics[-1]["loss"], "exports": ["merged/"], "seconds": 92.1},
        "teacher": dict.fromkeys(("asked", "stored", "bought", "read_tokens"), 1234)
        | dict.fromkeys(("written_tokens", "retries", "unmapped", "lost"), 0),
    }


def full_results(**changed) -> dict:
    """As a run with every measure has it."""
    lines = [full_evaluation(step) for step in SCHEDULE]
    found = report.collect(before(), lines, after(), rows_report(), training(three_phases(STEPS)))
    return found | changed


def answers() -> list[dict]:
    lines = []
    for name, rows in (("questions", 12), ("heldout", 6), ("sort", 6)):
        for place, who in enumerate(CONDITIONS if name != "sort" else ("base", "student")):
            for row in range(rows):
                right = (row + place) % 3 == 0
                own = {"set": name, "condition": who, "name": f"{name}.jsonl:{row}", "right": right}
                told = {"question": f"{QUESTIONS[row % 3]} ({row})", "expected": ["blue", "azure"]}
                answer = "blue" if right else f"green, says {who}"
                lines.append(own | told | {"match": "exact", "answer": answer})
    return lines


def samples() -> list[dict]:
    return [
        {"step": s, "answers": [f"{'half ' * (s < 40)}baked {min(s, 40)}", "blue", "\n\n"]}
        for s in SCHEDULE
    ]


def completion(place: int, **changed) -> dict:
    said = [{"role": "user", "content": f"Ask {place}"}]
    own = {"row": f"train.jsonl:{place}", "number": 0, "writer": "teacher", "step": place}
    return own | {"messages": said, "text": f"Told {place}", "finished": place % 2 == 0} | changed


def config(**sections: dict) -> dict:
    """config.json, with other values in these sections."""
    made = config_lib.to_dict(config_lib.Config())
    made["student"]["model"] = "models/student"
    made["train"] |= {"steps": STEPS, "epochs": None}
    return {name: of | (sections.get(name) or {}) for name, of in made.items()}


def write_begun(run: pathlib.Path, **sections: dict) -> pathlib.Path:
    """A run that has its config and nothing else."""
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config(**sections)))
    return run


def write_unfinished(run: pathlib.Path, step: int = 20, **sections: dict) -> pathlib.Path:
    """A run that has made so many steps."""
    write_begun(run, **sections)
    (run / "before.json").write_text(json.dumps(before()))
    write_lines(run / "metrics.jsonl", three_phases(STEPS)[:step])
    done = [s for s in SCHEDULE if s <= step]
    write_lines(run / "eval.jsonl", [full_evaluation(s) for s in done])
    write_lines(run / "samples.jsonl", samples()[: len(done)])
    write_lines(run / "answers.jsonl", [a for a in answers() if a["condition"] in CONDITIONS[:3]])
    write_lines(run / "trajectories_train.jsonl", [completion(i) for i in range(9)])
    return run


def write_finished(run: pathlib.Path, changed: dict | None = None, **sections) -> pathlib.Path:
    """A run with all of its files.

    Args:
      changed: other values in results.json.
    """
    write_unfinished(run, STEPS, **sections)
    write_lines(run / "answers.jsonl", answers())
    (run / "results.json").write_text(json.dumps(full_results(**changed or {})))
    return run
