"""Parquet files and Hugging Face datasets, made on the spot."""

import dataclasses
import importlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from gkdjax.data.examples import read_examples
from gkdjax.utils.errors import UserError

_ROWS = [{"prompt": f"ask {i}", "response": None if i % 2 else "yo"} for i in range(2500)]
_CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def _parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path)
    return str(path)


def _jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def _shown(source):
    """(name, first words, response) of each row."""
    return [(e.name, e.turns[0].content, e.response) for e in read_examples(source, "data.train")]


def _expected(label, numbers):
    return [(f"{label}:{i}", f"ask {n}", None if n % 2 else "yo") for i, n in enumerate(numbers)]


def _questions(source):
    """The rows without their names, which differ with where they stand."""
    rows = read_examples(source, "eval.questions", match="exact")
    return [dataclasses.replace(row, name="") for row in rows]


def test_parquet_files(tmp_path):
    path = tmp_path / "x.parquet"
    assert _shown(_parquet(path, _ROWS)) == _expected("x.parquet", range(2500))
    rows = [{"prompt": "hi", **dict.fromkeys(_CHAT)}, {"prompt": None, **_CHAT}]
    assert [row[1:] for row in _shown(_parquet(path, rows))] == [("hi", None), ("hi", "yo")]
    calls = [{"x": 1}, {"y": {"z": 2}}]  # in a table each has all fields of both
    talk = [{"role": "assistant", "content": "a", "tool_calls": [call]} for call in calls]
    (example,) = read_examples(_parquet(path, [{"messages": [*talk, *_CHAT["messages"]]}]), "x")
    fields = [json.loads(turn.fields)["tool_calls"] for turn in example.turns[:2]]
    assert fields == [[call] for call in calls]


_OFFSETS, _BYTES = pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")
_NO_UTF8 = pa.StringArray.from_buffers(2, _OFFSETS, _BYTES)
_DAYS = pa.array([0, 10**12], pa.timestamp("s"))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"prompt": ["a"] * 1500 + [" "]}, "x.parquet:1500: prompt is nothing but white space"),
        ({"prompt": [1]}, "x.parquet:0: prompt must be a string, not a number"),
        ({"prompt": [b"a"]}, "x.parquet:0: prompt must be a string, not bytes"),
        ({"prompt": pa.array([], pa.string())}, "data.train = .*x.parquet: holds no rows"),
        ({"id": [0, 1], "prompt": _NO_UTF8}, r"x\.parquet:1: prompt is not UTF-8: .* byte 0xff"),
        ({"prompt": ["a", "b"], "day": _DAYS}, r"x\.parquet:1: day cannot be read: "),
        (
            pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]),
            r"x\.parquet: has the column 'prompt' twice",
        ),
        (b"PAR1 and no more", r"data.train = .*x\.parquet: cannot be read as Parquet"),
        (None, r"data.train = .*x\.parquet: No such file or directory"),
    ],
)
def test_what_cannot_be_read_of_a_parquet_file_is_named(tmp_path, table, expected):
    path = tmp_path / "x.parquet"
    if isinstance(table, bytes):
        path.write_bytes(table)
    elif table is not None:
        _parquet(path, pa.table(table) if isinstance(table, dict) else table)
    with pytest.raises(UserError, match=expected):
        read_examples(str(path), "data.train")


def test_datasets_saved_to_disk(tmp_path):
    rows = datasets.Dataset.from_list(_ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict(train=rows, test=rows.select(range(10)))
    splits.save_to_disk(str(tmp_path / "two"))
    for source, numbers in (
        ("one", range(2500)),
        ("one:train[-2:]", (2498, 2499)),
        ("two:test", range(10)),
        ("two:test[20%:50%]", (2, 3, 4)),
        ("two:train[:2]+test[9:]", (0, 1, 9)),
    ):
        assert _shown(str(tmp_path / source)) == _expected(source, numbers)
    for split, expected in (
        ("", "which split of train, test? Write two:train"),
        (":vali", 'Unknown split "vali"'),
        (":train[1", "Unrecognized instruction format"),
        (":main:train", "has no configs; write NAME:SPLIT"),
        (":train[5:5]", "holds no rows"),
    ):
        source = str(tmp_path / "two") + split
        with pytest.raises(UserError) as caught:
            read_examples(source, "data.train")
        assert str(caught.value).startswith(f"data.train = {source}: ")
        assert expected in str(caught.value)


def test_directories_of_files(tmp_path, monkeypatch):
    home = tmp_path / "mine"
    _parquet(home / "train.parquet", _ROWS[:20])
    _parquet(home / "test.parquet", _ROWS[:2])
    assert _shown(f"{home}:train[:3]") == _expected("mine:train[:3]", range(3))
    monkeypatch.chdir(tmp_path)
    assert _shown("mine:default:test") == _expected("mine:test", range(2))
    with pytest.raises(UserError, match=r"data\.train = mine: which split of train, test\?"):
        read_examples("mine", "data.train")
    with pytest.raises(UserError, match=r"data\.train = mine:other:test: .*'other' not found"):
        read_examples("mine:other:test", "data.train")
    # Cells of CSV are the text that stands there.
    csv = tmp_path / "csv" / "train.csv"
    csv.parent.mkdir()
    cells = ["01", "NA", "None", "null", "1.50", "true", ""]
    csv.write_text("\n".join(["prompt,response,label,weight", *(f"ask,{c},1,1" for c in cells)]))
    assert [response for _, _, response in _shown("csv")] == [*cells[:-1], None]
    csv.write_text("prompt,response,label\nask,yo,False")
    with pytest.raises(UserError, match="has 'label', which nothing reads"):
        read_examples("csv", "data.train")


def test_directories_of_json_files_have_the_splits_that_datasets_finds(tmp_path):
    def files(name, **contents):
        for path, numbers in contents.items():
            rows = [{"prompt": f"ask {n}"} for n in numbers]
            _jsonl((tmp_path / name / path.replace("__", "/")).with_suffix(".jsonl"), rows)
        return str(tmp_path / name)

    def asked(source):
        return [(name, int(words[4:])) for name, words, _ in _shown(source)]

    shards = {
        f"data__train-0000{i}-of-00003": numbers for i, numbers in enumerate(([0, 1], [], [4]))
    }
    shards = files("shards", **shards, data__test__x=[9])
    assert asked(shards) == [(f"shards:train:{i}", n) for i, n in enumerate((0, 1, 4))]
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
    bad = tmp_path / "bad" / "train.jsonl"
    _jsonl(bad, [{"question": "hi"}, {"question": "hi", "answer": ""}])
    torn = tmp_path / "torn" / "train.jsonl"
    _jsonl(torn, [{"question": "hi"}])
    torn.write_text(torn.read_text() + '\n{"question": \n')
    (tmp_path / "none").mkdir()
    for source, expected in (
        ("named", r"named: which split of train, validation, test\? Write named:train$"),
        ("named:vali", r"named:vali: cannot be read as a dataset: Unknown split \"vali\""),
        ("named:train[1", "cannot be read as a dataset: Unrecognized instruction format"),
        ("bad:train", r"^bad:train:1: answer is empty"),
        ("torn", r"^train\.jsonl: line 2, column 14: does not parse as"),
        ("none", r"none: cannot be read as a dataset: .* any data files"),
    ):
        with pytest.raises(UserError, match=expected):
            read_examples(str(tmp_path / source), "data.train")


# One value of each column that `datasets` would type as Json, or as dates.
_TALKS = [
    [
        {"role": "user", "content": "null"},
        {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"a": a}}]},
        {"role": "tool", "content": "3"},
    ]
    for a in (1, "s")
]
_ODD = [
    {"question": "hi", "answer": ["4", "four"]},
    {"question": 'say "hi"\n', "answer": '"42"'},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "answer": "42"},
    {"messages": [{"role": "user", "content": "hi", "weight": 0}], "answer": "2020-01-01"},
    *({"messages": talk, "answer": 7} for talk in _TALKS),
]
_DATED = [{"question": "when?", "answer": f"2020-01-0{i}"} for i in (1, 2)]


@pytest.mark.parametrize("rows", [_ODD, _DATED])
def test_a_directory_of_json_means_what_its_files_mean(tmp_path, rows):
    file = _jsonl(tmp_path / "home" / "train.jsonl", rows)
    datasets.load_dataset(str(tmp_path / "home"))  # and what its cache says of it is not asked
    assert _questions(str(tmp_path / "home")) == _questions(file)


def _arrow(tmp_path, rows):
    """The same rows as `datasets` holds them: saved, and as Parquet."""
    _jsonl(tmp_path / "files" / "train.jsonl", rows)
    made = datasets.load_dataset(str(tmp_path / "files"), split="train")
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "x.parquet"))
    return str(tmp_path / "saved"), str(tmp_path / "x.parquet")


def test_columns_of_json_text_are_decoded_where_nothing_is_lost(tmp_path, caplog):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"x": 1, "y": "2"}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"z": [None, "2"]}}]},
        {"role": "tool", "content": "3"},
    ]
    rows = [*_ODD[:2], _ODD[3]]
    rows += [{"messages": talk, "answer": a} for a in ("one\ntwo", "{a}", 7, None)]
    wanted = _questions(_jsonl(tmp_path / "x.jsonl", rows))
    for source in _arrow(tmp_path, rows):
        for mine, theirs in zip(_questions(source), wanted, strict=True):
            if mine.expected is None or mine.expected.any_of != ("42",):
                assert mine == theirs
            # Else quotes of the text's own: the one thing that datasets loses.
    # Whole numbers among responses are their digits.
    rows = [{"prompt": "hi", "response": r} for r in ("one\ntwo", 7, "a")]
    for source in _arrow(tmp_path, rows):
        caplog.clear()
        assert [response for _, _, response in _shown(source)] == ["one\ntwo", "7", "a"]
        (told,) = (r.getMessage() for r in caplog.records if "arrow.json" in r.getMessage())
        assert told.startswith("'response' is a column of type arrow.json")
        assert "in quotes of its own" in told


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
    _jsonl(tmp_path / "big" / "train.jsonl", rows)
    made = datasets.load_dataset(str(tmp_path / "big"), split="train", chunksize=50_000)
    assert made[2799]["talk"] == [{"content": json.dumps(rows[2799]["talk"][0]["content"])}]
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"^saved: 64 values of 'content' on end are JSON text in"):
        read_examples(str(tmp_path / "saved"), "data.train")
    assert len(read_examples(str(tmp_path / "big"), "data.train")) == 3000  # its files are whole
    made.select(range(50)).save_to_disk(str(tmp_path / "good"))
    assert len(read_examples(str(tmp_path / "good"), "data.train")) == 50


def test_a_dataset_of_the_hub_is_asked_for_with_config_and_split(monkeypatch):
    with pytest.raises(UserError, match=r"data\.train = org/name:train: .*: ConnectionError\. Che"):
        read_examples("org/name:train", "data.train")  # offline, as all tests are
    asked, failures = [], []

    def load(*given, split):
        asked.append((*given, split))
        if failures:
            raise failures.pop()
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
    for error, told in (
        (OSError("Bearer hf_secret"), "did not give it: OSError."),
        (ValueError('Unknown split "a"'), 'did not give it: Unknown split "a".'),
    ):
        failures.append(error)
        with pytest.raises(UserError) as caught:
            read_examples("org/name:train", "data.train")
        assert told in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "source"),
    [("datasets", "org/name:train"), ("datasets", "mine"), ("pyarrow", "x.parquet")],
)
def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch, missing, source):
    def without(name):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return importlib.__import__(name)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(importlib, "import_module", without)
    expected = rf"^data\.train = {source}: needs {missing}: pip install -e '\.\[datasets\]'$"
    with pytest.raises(UserError, match=expected):
        read_examples(source, "data.train")
