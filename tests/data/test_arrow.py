"""Parquet files and Hugging Face datasets, made on the spot."""

import dataclasses
import importlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gkdjax.data.examples import read_examples
from gkdjax.types import Message
from gkdjax.utils.errors import UserError

_ROWS = [{"prompt": f"ask {i}", "response": None if i % 2 else "yo"} for i in range(2500)]
_CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def _parquet(path, rows=_ROWS):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def _shown(source):
    """(name, first words, response) of each row."""
    return [(e.name, e.turns[0].content, e.response) for e in read_examples(source, "data.train")]


def _expected(label, numbers):
    return [(f"{label}:{i}", f"ask {n}", None if n % 2 else "yo") for i, n in enumerate(numbers)]


def test_a_parquet_file(tmp_path):
    assert _shown(_parquet(tmp_path / "x.parquet")) == _expected("x.parquet", range(2500))


def test_parquet_rows_of_mixed_shapes(tmp_path):
    rows = [{"prompt": "hi", **dict.fromkeys(_CHAT)}, {"prompt": None, **_CHAT}]
    first, second = read_examples(_parquet(tmp_path / "x.parquet", rows), "data.train")
    assert first.turns == second.turns == (Message("user", "hi"),)
    assert (first.response, second.response) == (None, "yo")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"prompt": ["a"] * 1500 + [" "]}, "x.parquet:1500: prompt is nothing but white space"),
        ({"prompt": [1]}, "x.parquet:0: prompt must be a string, not a number"),
        ({"prompt": [b"a"]}, "x.parquet:0: prompt must be a string, not bytes"),
        ({"prompt": ["a\0"]}, "x.parquet:0: prompt has a NUL"),
        ({"prompt": pa.array([], pa.string())}, "data.train = .*x.parquet: holds no rows"),
    ],
)
def test_bad_columns_are_named(tmp_path, table, expected):
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=expected):
        read_examples(str(tmp_path / "x.parquet"), "data.train")


def test_columns_that_cannot_be_read_are_named(tmp_path):
    offsets, text = pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")
    broken = pa.StringArray.from_buffers(2, offsets, text)
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"id": [0, 1], "prompt": broken}), path)
    with pytest.raises(UserError, match=r"x\.parquet:1: prompt is not UTF-8: .* byte 0xff"):
        read_examples(str(path), "data.train")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match=r"x\.parquet: has the column 'prompt' twice"):
        read_examples(str(path), "data.train")
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"data.train = .*x\.parquet: cannot be read as Parquet"):
        read_examples(str(path), "data.train")
    path.unlink()
    with pytest.raises(UserError, match=r"data.train = .*x\.parquet: No such file or directory"):
        read_examples(str(path), "data.train")


def test_a_dataset_saved_to_disk(tmp_path):
    rows = datasets.Dataset.from_list(_ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict(train=rows, test=rows.select(range(10)))
    splits.save_to_disk(str(tmp_path / "two"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert _shown(one) == _expected("one", range(2500))
    assert _shown(one + ":train[-2:]") == _expected("one:train[-2:]", (2498, 2499))
    assert _shown(two + ":test") == _expected("two:test", range(10))
    assert _shown(two + ":test[20%:50%]") == _expected("two:test[20%:50%]", (2, 3, 4))
    both = "two:train[:2]+test[9:]"
    assert _shown(str(tmp_path / both)) == _expected(both, (0, 1, 9))
    for source, expected in (
        (two, "which split of train, test? Write two:train"),
        (two + ":vali", 'Unknown split "vali"'),
        (two + ":train[1", "Unrecognized instruction format"),
        (two + ":main:train", "has no configs; write NAME:SPLIT"),
        (two + ":train[5:5]", "holds no rows"),
    ):
        with pytest.raises(UserError) as caught:
            read_examples(source, "data.train")
        assert str(caught.value).startswith(f"data.train = {source}: ")
        assert expected in str(caught.value)


def test_a_directory_of_files(tmp_path, monkeypatch):
    home = tmp_path / "mine"
    home.mkdir()
    _parquet(home / "train.parquet", _ROWS[:20])
    _parquet(home / "test.parquet", _ROWS[:2])
    assert _shown(str(home) + ":train[:3]") == _expected("mine:train[:3]", range(3))
    monkeypatch.chdir(tmp_path)
    assert _shown("mine:default:test") == _expected("mine:test", range(2))
    with pytest.raises(UserError, match=r"data\.train = mine: which split of train, test\?"):
        read_examples("mine", "data.train")
    with pytest.raises(UserError, match=r"data\.train = mine:other:test: .*'other' not found"):
        read_examples("mine:other:test", "data.train")


def test_a_directory_of_csv_means_what_its_cells_say(tmp_path):
    home = tmp_path / "mine"
    home.mkdir()
    cells = ["01", "NA", "None", "null", "1.50", "true", ""]
    lines = ["prompt,response,label,weight", *(f"ask,{cell},1,1" for cell in cells)]
    (home / "train.csv").write_text("\n".join(lines))
    found = read_examples(str(home), "data.train")
    assert [e.response for e in found] == [*cells[:-1], None]
    (home / "train.csv").write_text("prompt,response,label\nask,yo,False")
    with pytest.raises(UserError, match="has 'label', which nothing reads"):
        read_examples(str(home), "data.train")


def test_a_directory_of_jsonl_files(tmp_path):
    home = tmp_path / "mine"
    home.mkdir()
    (home / "train.jsonl").write_text('{"question": "hi"}\n{"question": "hi", "answer": ""}\n')
    with pytest.raises(UserError, match=r"^mine:train:1: answer is empty"):
        read_examples(str(home) + ":train", "data.train")
    (home / "train.jsonl").write_text('{"question": "hi"}\n{"question": \n')
    with pytest.raises(UserError, match=r"^train\.jsonl: line 2, column 14: does not parse as"):
        read_examples(str(home), "data.train")
    (home / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"mine: cannot be read as a dataset: .* any data files"):
        read_examples(str(home), "data.train")


# One value of each column that `datasets` would type as Json, or as dates.
_ODD = [
    {"question": "hi", "answer": ["4", "four"]},
    {"question": 'say "hi"\n', "answer": '"42"'},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "answer": "42"},
    {"messages": [{"role": "user", "content": "hi", "weight": 0}], "answer": "2020-01-01"},
    *(
        {
            "messages": [
                {"role": "user", "content": "null"},
                {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"a": a}}]},
                {"role": "tool", "content": "3"},
            ],
            "answer": 7,
        }
        for a in (1, "s")
    ),
]


def _one_for_all(rows, folder, name="train.jsonl"):
    folder.mkdir()
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_a_directory_of_json_means_what_its_files_mean(tmp_path):
    dated = [{"question": "when?", "answer": f"2020-01-0{i}"} for i in (1, 2)]
    for i, rows in enumerate((_ODD, dated)):
        directory = _one_for_all(rows, tmp_path / f"d{i}")
        datasets.load_dataset(directory)  # and what its cache says of it is not asked
        found = read_examples(directory, "eval.questions", match="exact")
        of_file = read_examples(f"{directory}/train.jsonl", "eval.questions", match="exact")
        assert found == [
            dataclasses.replace(row, name=f"d{i}:train:{row.row_id}") for row in of_file
        ]


def test_splits_of_json_are_the_files_that_datasets_finds(tmp_path):
    def files(name, **contents):
        for path, numbers in contents.items():
            path = tmp_path / name / path.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"prompt": f"ask {n}"}) for n in numbers)
            path.with_suffix(".jsonl").write_text("\n".join(lines))
        return str(tmp_path / name)

    def asked(source):
        return [(name, int(words[4:])) for name, words, _ in _shown(source)]

    shards = files(
        *("shards",),
        **{f"data__train-0000{i}-of-00003": [2 * i, 2 * i + 1][: 2 * (i != 1)] for i in range(3)},
        data__test__x=[9],
    )
    assert asked(shards) == [(f"shards:train:{i}", n) for i, n in enumerate((0, 1, 4, 5))]
    named = files("named", train=[0, 1, 2], valid=[3], my_test=[4])
    assert asked(named + ":validation") == [("named:validation:0", 3)]
    assert [n for _, n in asked(named + ":train[-1:]+test")] == [2, 4]
    assert [n for _, n in asked(named + ":all")] == [0, 1, 2, 3, 4]
    plain = files("plain", one=[0], two=[1])
    assert [n for _, n in asked(plain)] == [0, 1]
    (tmp_path / "plain" / "README.md").write_text(
        "---\nconfigs:\n- config_name: b\n  data_files: two.jsonl\n---\n"
    )
    assert [n for _, n in asked(plain + ":b:train")] == [1]
    (tmp_path / "named" / "train.jsonl").rename(tmp_path / "named" / "train.json")
    assert [n for _, n in asked(named + ":train")] == [0, 1, 2]
    for source, told in (
        (named, r"named: which split of train, validation, test\? Write named:train$"),
        (named + ":vali", r"named:vali: cannot be read as a dataset: Unknown split \"vali\""),
        (named + ":train[1", "cannot be read as a dataset: Unrecognized instruction format"),
    ):
        with pytest.raises(UserError, match=told):
            read_examples(source, "data.train")


def _arrow(tmp_path, rows):
    """The same rows as `datasets` holds them: saved, and as Parquet."""
    _one_for_all(rows, tmp_path / "files")
    made = datasets.load_dataset(str(tmp_path / "files"), split="train")
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "x.parquet"))
    return str(tmp_path / "saved"), str(tmp_path / "x.parquet")


def test_columns_of_json_text_are_decoded_where_nothing_is_lost(tmp_path):
    rows = [row for row in _ODD if row["answer"] != "42" and "tool" not in json.dumps(row)]
    rows += [{"messages": _TALK, "answer": a} for a in ("one\ntwo", "{a}", 7, None)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = read_examples(str(tmp_path / "x.jsonl"), "eval.questions", match="exact")
    for source in _arrow(tmp_path, rows):
        found = read_examples(source, "eval.questions", match="exact")
        for mine, theirs in zip(found, wanted, strict=True):
            if mine.expected and mine.expected.any_of == ("42",):
                continue  # quotes of the text's own: the one thing that datasets loses
            assert dataclasses.replace(mine, name="") == dataclasses.replace(theirs, name="")


def test_whole_numbers_among_responses_are_their_digits(tmp_path, caplog):
    rows = [{"prompt": "hi", "response": r} for r in ("one\ntwo", 7, "a")]
    for source in _arrow(tmp_path, rows):
        caplog.clear()
        assert [e.response for e in read_examples(source, "data.train")] == ["one\ntwo", "7", "a"]
        (told,) = (r.getMessage() for r in caplog.records if "arrow.json" in r.getMessage())
        assert (
            "'response' is a column of type arrow.json" in told and "in quotes of its own" in told
        )


_TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x": 1, "y": "2"}}]},
    {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"z": [None, "2"]}}]},
    {"role": "tool", "content": "3"},
]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"prompt": "a", "response": r} for r in ("yo", ["x"], "4.20")],
            ":2: response is 4.20, and whether that is text is not known .* arrow.json",
        ),
        ([{"prompt": p} for p in ("yo", ["x"], "true")], ":2: prompt is true, and whether that"),
        (
            [{"prompt": "a", "response": f"2020-01-0{i}"} for i in (1, 2)],
            ":0: response must be a string, not datetime: the table keeps no text of it",
        ),
    ],
)
def test_what_arrow_has_lost_is_refused_by_column_and_row(tmp_path, rows, told):
    for source in _arrow(tmp_path, rows):
        with pytest.raises(UserError, match=rf"(saved|x\.parquet|saved:train){told}"):
            read_examples(source, "data.train")


def test_strings_that_datasets_rewrote_for_a_late_number_are_refused(tmp_path):
    rows = [{"talk": [{"content": f'say "{i}"'}], "prompt": f"ask {i}"} for i in range(3000)]
    rows[2800]["talk"][0]["content"] = 7
    home = _one_for_all(rows, tmp_path / "big")
    made = datasets.load_dataset(home, split="train", chunksize=50_000)
    assert made[2799]["talk"] == [{"content": json.dumps(rows[2799]["talk"][0]["content"])}]
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"^saved: 64 values of 'content' on end are JSON text in"):
        read_examples(str(tmp_path / "saved"), "data.train")
    assert len(read_examples(home, "data.train")) == 3000  # and its files are what they are
    made.select(range(50)).save_to_disk(str(tmp_path / "good"))
    assert len(read_examples(str(tmp_path / "good"), "data.train")) == 50


def test_values_that_python_cannot_hold_are_named(tmp_path):
    days = pa.array([0, 10**12], pa.timestamp("s"))
    pyarrow.parquet.write_table(
        pa.table({"prompt": ["a", "b"], "day": days}), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match=r"x\.parquet:1: day cannot be read: "):
        read_examples(str(tmp_path / "x.parquet"), "data.train")


def test_a_dataset_of_the_hub_is_asked_for_with_config_and_split(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(_ROWS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _shown("org/name:train[:2]") == _expected("org/name:train[:2]", range(2))
    assert _shown("name:main:train+test[:5]") == _expected("name:train+test[:5]", range(2))
    assert _shown("org/name") == _expected("org/name", range(2))
    assert asked == [
        ("org/name", None, "train[:2]"),
        ("name", "main", "train+test[:5]"),
        ("org/name", None, None),
    ]


def test_what_the_hub_does_not_give_is_told_without_what_may_hold_the_token(monkeypatch):
    with pytest.raises(UserError, match=r"data\.train = org/name:train: .*: ConnectionError\. Che"):
        read_examples("org/name:train", "data.train")  # offline, as all tests are
    for error, told in (
        (OSError("Bearer hf_secret"), "did not give it: OSError."),
        (ValueError('Unknown split "a"'), 'did not give it: Unknown split "a".'),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(UserError) as caught:
            read_examples("org/name:train", "data.train")
        assert told in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "source"),
    [("datasets", "org/name:train"), ("datasets", "mine"), ("pyarrow", "x.parquet")],
)
def test_a_missing_library_is_told_with_what_installs_it(tmp_path, monkeypatch, missing, source):
    def without(name):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return importlib.__import__(name)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(importlib, "import_module", without)
    expected = rf"^data\.train = {source}: needs {missing}, .*: pip install -e '\.\[datasets\]'$"
    with pytest.raises(UserError, match=expected):
        read_examples(source, "data.train")
