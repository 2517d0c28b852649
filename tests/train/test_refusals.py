"""Runs that are refused before their first step, each with a message that says what to change."""

import json

import factories
import pytest
from small_runs import PREFIX, ConstantTeacher, small, talk

import gkdjax
from gkdjax.utils.errors import UserError

SYSTEM = {"role": "system", "content": "be brief"}
LONG = {"prompt": "much too long " * 6, "answer": "x"}
GIVEN = [{"prompt": "ask", "response": "no"}]
FILES = {
    "p.txt": "x" * 100,
    "p.json": json.dumps(PREFIX),
    "talk.jsonl": json.dumps(talk("a", "b")) + "\n",
    "empty.jsonl": "\n",
    "mamba/config.json": '{"model_type": "mamba"}',
}
TOP_1 = {"teacher__top_k": 1}
CONSTANT = ConstantTeacher()
# Message -> changes of the config, the teacher; "DIR" is a directory with `FILES` and models.
REFUSED = {
    "top_k=None asks for the whole vocabulary; set it to 1": ({}, CONSTANT),
    r"gkd\.temperature=2\.0": (TOP_1 | {"gkd__temperature": 2.0}, CONSTANT),
    "is no teacher": ({}, object()),
    r"anchor.data:1: .* carries the prefix": (
        {"anchor__data": [{"prompt": "fine"}, {"prompt": "x", "prefix_messages": PREFIX}]},
        None,
    ),
    r"anchor.data:0: .* carries the prefix": (
        {"anchor__data": [{"messages": [SYSTEM, {"role": "user", "content": "other"}]}]},
        None,
    ),
    r"anchor\.data:0: .*carries the prefix": (
        {
            "context__prefix_messages": (),
            "context__prefix_file": "DIR/p.json",
            "anchor__data": [{"prompt": "other", "prefix_messages": PREFIX}],
        },
        None,
    ),
    "anchor.data:1: .* a row of data.train": (
        {"anchor__data": [{"prompt": "fine"}, {"prompt": "ask 3"}]},
        None,
    ),
    r"eval\.retention\.reading:0: .*data\.max_length = 64": (
        {"eval__retention": {"reading": (LONG,)}},
        None,
    ),
    r"train.batch_size: 6 rows.* 4 devices.*is 8": ({"train__batch_size": 6}, None),
    r"config.train.batch_size: 6 rows .* by 4 devices": (
        {"train__batch_size": 6, "mesh__fsdp": 4},
        None,
    ),
    r"config.mesh: tensor=3 needs a multiple of 3 devices": ({"mesh__tensor": 3}, None),
    r"eval\.every_steps = 2: nothing to measure on": ({"eval__every_steps": 2}, None),
    "loss would be zero": (
        {
            "context__prefix_messages": (),
            "context__history_as_prefix": True,
            "context__student_retained_turns": 99,
            "data__train": [talk("aa", "bb", "cc", "dd", "ee")],
        },
        None,
    ),
    r"context\.system_prompt_file = .*p\.txt\) has 102 tokens": (
        {"context__prefix_messages": (), "context__system_prompt_file": "DIR/p.txt"},
        None,
    ),
    r"data\.train:2: .*the teacher .*base.* 42 tokens.* reads 32 at most .*\. Set": (
        {
            "student__model": "DIR/reads 32",
            "data__train": [{"prompt": "ask", "response": "no" * n} for n in (1, 1, 6)],
        },
        None,
    ),
    r"anchor\.data:0: .* with the response .* reads 32 at most .*\. Set": (
        {
            "student__model": "DIR/reads 32",
            "data__train": GIVEN * 2,
            "anchor__data": [{"prompt": "other " * 6}],
        },
        None,
    ),
    # Checked before anything is computed, though no step of this run is on-policy.
    r"data\.train:0: .* with the response .*reads 48 at most .*\. Set": (
        {
            "student__model": "DIR/reads 48",
            "data__train": GIVEN,
            "gkd__on_policy_fraction": 0.5,
            "gkd__on_policy_warmup_steps": 4,
            "rollout__max_new_tokens": 30,
        },
        None,
    ),
    r"eval\.questions:0: .*reads 48 at most .*\. Set": (
        {
            "student__model": "DIR/reads 48",
            "data__train": GIVEN,
            "eval__questions": [{"prompt": "why " * 5, "answer": "x"}],
        },
        None,
    ),
    r"loss would be (zero)": ({"context__student_retained_turns": 1}, None),
    "empty.jsonl": ({"data__train": "DIR/empty.jsonl"}, None),
    r"no row of data\.train is left: 1 rows: longer than data\.max_length=64": (
        {"data__train": [{"prompt": "x" * 100, "response": "b"}]},
        None,
    ),
    r"r_proj.*q_proj": ({"student__lora__targets": ("r_proj",)}, None),
    r"mamba.*gemma3_text": ({"student__model": "DIR/mamba"}, None),
    "System role": ({"student__model": "DIR/no system"}, None),
    "the teacher's tokenizer is not the student's: .*other tokenizer": (
        {"teacher__backend": "flax", "teacher__model": "DIR/other tokenizer"},
        None,
    ),
    r"'critic', .*talk\.jsonl .*assistant \(in 1.*user \(in 1 row": (
        {"data__train": "DIR/talk.jsonl", "context__target_roles": ("assistant", "critic")},
        None,
    ),
    r"context\.target_roles.*learns the student's text": (
        {"gkd__on_policy_fraction": 0.5, "context__target_roles": ["user"]},
        None,
    ),
    r"no row of data\.train is left: 6 rows: .*'\[0-9\]\{3\}', or no such resp.* in 5.*was 'K'": (
        TOP_1 | {"context__target_content_pattern": "[0-9]{3}"},
        CONSTANT,
    ),
    r"Leave it out\. No step was made yet$": (
        TOP_1 | {"rollout__reuse": "a.jsonl", "data__train": GIVEN * 4},
        CONSTANT,
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    made = tmp_path_factory.mktemp("files")
    for length in (32, 48):
        factories.model_dir(made / f"reads {length}", max_position_embeddings=length)
    template = factories.CHAT_TEMPLATE_WITHOUT_SYSTEM
    factories.model_dir(made / "no system", chat_template=template)
    tokenizer = made / "other tokenizer" / "tokenizer.json"
    factories.model_dir(tokenizer.parent)
    tokenizer.write_text(tokenizer.read_text().replace('"A":', '"\\u00c4":'))
    for name, content in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(content)
    return str(made)


@pytest.mark.parametrize("message", REFUSED)
def test_a_run_that_cannot_work_is_refused(student, directory, tmp_path, message):
    changes, teacher = REFUSED[message]
    changes = {
        key: value.replace("DIR", directory) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        gkdjax.run(small(student, **changes), tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
