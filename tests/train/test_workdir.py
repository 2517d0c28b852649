"""Which config a run's directory belongs to, and who may work in it."""

import json

import pytest
from small_runs import ConstantTeacher, small

import gkdjax
from gkdjax import config
from gkdjax.train import workdir
from gkdjax.utils.errors import TeacherRefused, TeacherUnreachable, UserError


def claims(run, c) -> bool:
    """Whether a config may have the directory, as it is written there then."""
    try:
        workdir.claim(run, config.parse(c))
    except UserError as error:
        assert "holds a run of another config; it differs in config." in str(error)
        return False
    return json.loads((run / "config.json").read_text())["train"]["seed"] == c.train.seed


class Unreachable(ConstantTeacher):
    """A server that is away before it has written anything."""

    def sample(self, prompts, seeds, sampling):
        raise TeacherUnreachable("away")


TOP_1 = {"teacher__top_k": 1}
AWAY = {"backend": "vllm", "api_base": "http://127.0.0.1:9/v1", "deadline_s": 0.1}
# Message -> what is wrong with a config, and with which teacher, if it is not the config's.
REFUSALS = {
    r"data\.train:0": ({"data__train": [{"prompt": 5}]}, None),
    "no/such-model": ({"student__model": "no/such-model"}, None),
    r"mesh": ({"mesh__data": 3}, None),
    "127.0.0.1:9": ({f"teacher__{key}": value for key, value in AWAY.items()}, None),
    "set it to 1": ({}, ConstantTeacher()),
    "row of data.train as well": ({"anchor__data": [{"prompt": "ask 0"}]}, None),
    "away. No step was made yet; the same command goes on": (TOP_1, Unreachable()),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_run_that_was_refused_leaves_its_directory_to_the_next(student, tmp_path, message):
    changes, teacher = REFUSALS[message]
    c = small(student, **changes)
    with pytest.raises((UserError, TeacherUnreachable), match=message):
        gkdjax.run(c, tmp_path, teacher)
    assert claims(tmp_path, c)  # the same one
    (tmp_path / "answers.sqlite").write_text("paid for")
    for other in (c, small(student, train__seed=7)):  # a server may have changed, and no config
        for name in (*workdir._BEGUN_WITH, *workdir._MEASURED):
            (tmp_path / name).write_text("{}")
        (tmp_path / "eval.jsonl").write_text('{"step": 0}\n')
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        assert claims(tmp_path, other)
        left = {path.name for path in tmp_path.iterdir() if path.stat().st_size and path.is_file()}
        assert left == {"config.json", "answers.sqlite"}


class Refuses(ConstantTeacher):
    """A server whose limit shows with the first batch."""

    def targets(self, batch):
        raise TeacherRefused("no more than 16 tokens; set data.max_length=16")


def test_the_advice_of_a_run_refused_at_step_0_can_be_followed(student, tmp_path):
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    c = small(student, **TOP_1, data__train=str(rows))
    for response in ("told", "said"):  # the data is mended in between
        rows.write_text(f'{{"prompt": "ask", "response": "{response}"}}\n' * 6)
        with pytest.raises(TeacherRefused, match=r"length=16\. The run got to step 0 of 4"):
            gkdjax.run(c, run, Refuses())
        assert (run / "before.json").exists()
    assert claims(run, small(student, **TOP_1, data__train=str(rows), train__seed=7))
    assert not (run / "before.json").exists()


COMPUTED = {
    **dict.fromkeys(("trajectories_train.jsonl", "metrics.jsonl", "results.json"), "{}\n"),
    **dict.fromkeys(("checkpoints/2/_METADATA", "merged/config.json", "adapter/a"), "{}\n"),
    **dict.fromkeys(("eval.jsonl", "samples.jsonl"), '{"step": 0}\n{"step": 20, "acc'),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_directory_in_which_something_was_computed_stays_its_configs(student, tmp_path, name):
    c, other = small(student), small(student, train__seed=7)
    assert claims(tmp_path, c)
    workdir.claim_rows(tmp_path, {"train": 1})
    assert claims(tmp_path, c)
    workdir.claim_rows(tmp_path, {"train": 2})  # nothing has come of the first ones
    (tmp_path / "trajectories_train.jsonl").touch()  # opened, and no text yet
    assert claims(tmp_path, other) and claims(tmp_path, c)
    workdir.claim_rows(tmp_path, {"train": 2})
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(COMPUTED[name])
    assert claims(tmp_path, c) and not claims(tmp_path, other)
    with pytest.raises(UserError, match="the rows of train are not those"):
        workdir.claim_rows(tmp_path, {"train": 3})


@pytest.mark.parametrize(
    "text",
    [
        *('{"model_type": "llama"}', "", "[]", "{}", '{"teacher": {"a": 1}}', "[" * 100_000),
        '{"student": {}, "teacher": {}, "data": {}, "train": {}, "eval": 3}',
    ],
)
def test_a_config_of_something_else_is_never_overwritten(student, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not the config of a run.*another"):
        workdir.claim(tmp_path, config.parse(small(student)))
    assert (tmp_path / "config.json").read_text() == text


def test_a_run_with_the_keys_of_an_earlier_release_goes_on(student, tmp_path):
    workdir.claim(tmp_path, config.parse(small(student)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    assert old["data"].pop("bad_rows") == "refuse"
    for key, name in config.RENAMED.items():
        section = old
        *sections, new = name.split(".")
        for one in sections:
            section = section.get(one) or old["trajectory"]
        section[key.rpartition(".")[2]] = section.pop(new)
    path.write_text(json.dumps(old))
    assert claims(tmp_path, small(student))
    with pytest.raises(UserError, match=r"data\.bad_rows \(now 'drop', was 'refuse'\)"):
        workdir.claim(tmp_path, config.parse(small(student, data__bad_rows="drop")))
