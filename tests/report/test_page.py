"""The page of a run: it says what the files say, asks nothing of a network, and trusts no text."""

import html.parser
import json
import pathlib
import re

import made_up_runs as made
import pytest

from gkdjax import report
from gkdjax.report import run_files, tables
from gkdjax.utils.errors import NotWritten, UserError

pytestmark = pytest.mark.drawn

VOID = {"meta", "br", "hr", "img", "input", "link"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "section", "article", "div"),
    *("h1", "h2", "h3", "h4", "p", "b", "i", "span", "ul", "li", "table", "thead", "tbody", "tr"),
    *("th", "td", "figure", "figcaption", "details", "summary", "pre"),
    *("svg", "defs", "style", "g", "path", "use", "text", "clippath", "rect", "tspan"),
}


class Page(html.parser.HTMLParser):
    """Parses a page and keeps what a browser would see of it."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.ids = set(), [], []
        self.words, self.sections, self.open = [], {}, []
        self._heading = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self._heading = ""

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self._heading = data
        if self._heading:
            self.sections.setdefault(self._heading, []).append(data)

    def text(self, section: str | None = None) -> str:
        return " ".join(" ".join(self.sections[section] if section else self.words).split())


def read(run: pathlib.Path) -> Page:
    return Page(report.write_html(run).read_text(encoding="utf-8"))


@pytest.fixture
def finished(tmp_path) -> pathlib.Path:
    return made.write_finished(tmp_path / "run")


@pytest.fixture(scope="module")
def page_of_finished(tmp_path_factory) -> tuple[str, Page]:
    """As it is written, and as it is read."""
    run = made.write_finished(tmp_path_factory.mktemp("shown") / "run")
    text = report.write_html(run).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def shown(page_of_finished) -> Page:
    return page_of_finished[1]


def test_a_finished_run_has_every_part(shown):
    assert list(shown.sections) == [
        *("Curves", "Numbers", "Answers next to each other", "Answers on the way"),
        *("Right and wrong answers", "Text that was trained on", "Config", "Versions"),
    ]
    top = shown.text().split("Curves")[0]
    for message in (
        "run finished, 60 steps. Student: models/student",
        "right answers 3.1% \u2192 96.2% prompted teacher 98.4%",
        "forward KL to the teacher 0.9000 \u2192 0.0400",
        "recovery of the prefix 0.977",
        "kept abilities -1.0% the worst: sort",
        "tokens saved 1,041.2",
    ):
        assert message in top
    assert "not finished" not in shown.text() and "could be read" not in shown.text()


def test_all_tables_and_all_curves_are_there(shown):
    numbers = shown.text("Numbers")
    for table in tables.tables(made.full_results()):
        assert table.title in numbers and table.note in numbers
        for cell in (cell for row in table.rows for cell in row):
            assert " ".join(cell.split()) in numbers
    curves = shown.text("Curves")
    for label in (
        *("training loss", "distance to the teacher", "right answers", "perplexity"),
        *("off-policy, forward_kl", "anchor", "forward KL, student's text", "accuracy"),
        *("side effects", "validation"),
    ):
        assert label in curves


def test_answers_stand_next_to_each_other_and_once_where_they_stay_the_same(shown):
    samples = shown.text("Answers next to each other")
    for question in made.QUESTIONS:
        assert question in samples
    for who in made.CONDITIONS:
        assert f"{who.replace('_', ' ')} {who} thinks: which day comes after tuesday" in samples
    way = shown.text("Answers on the way")
    assert "Which day comes after Tuesday? 5 different" in way
    assert "step 5 half baked 5" in way and "steps 40 to 60 baked 40" in way
    assert "What is 7 times 6? 1 different steps 0 to 60 blue" in way
    assert "steps 0 to 60 2 blanks and line breaks" in way


def test_a_handful_of_right_and_wrong_answers_with_counts(shown):
    text = shown.text("Right and wrong answers")
    # Each condition answers 4 of 12 questions, other ones each time.
    assert "student 4 8 33.3% [13.8, 60.9]" in text
    assert text.count("Some that the student answers wrong") == 3  # sets
    assert "Which day comes after Tuesday? (0) questions.jsonl:0; expected: blue or azure" in text
    questions = text.split("heldout condition")[0]
    wrong, right = questions.split("Some that the student answers right")
    assert wrong.count("expected:") == right.count("expected:") == 4
    assert wrong.count("student \u2717 wrong green, says student") == 4
    assert right.count("student \u2713 right blue") >= 4
    assert "prompted teacher" in wrong and "student other prefix" in right


def test_the_ends_of_the_text_that_was_trained_on_in_the_order_of_the_steps(shown, tmp_path):
    text = shown.text("Text that was trained on")
    assert "trajectories_train.jsonl 9 responses" in text
    assert [place for place in range(9) if f"Told {place}" in text] == [0, 1, 2, 6, 7, 8]
    assert "train.jsonl:1, step 1, cut at the limit user: Ask 1 Told 1" in text
    assert "train.jsonl:2, step 2 user: Ask 2" in text
    run = made.write_begun(tmp_path / "run")
    for step in (100, 20, 3):
        made.write_lines(run / f"trajectories_train_{step}.jsonl", [made.completion(step)])
    text = read(run).text("Text that was trained on")
    places = [text.index(f"trajectories_train_{step}.jsonl 1 responses") for step in (3, 20, 100)]
    assert places == sorted(places)


def test_an_unfinished_run_says_so_and_what_is_missing(tmp_path):
    shown = read(made.write_unfinished(tmp_path / "run", step=20))
    top = shown.text().split("Curves")[0]
    assert "This run is not finished, step 20 of 60." in top
    assert "what the trained student answers" in top and "before.json" not in top
    assert "\u2192" not in top and "Versions" not in shown.sections
    assert "prompted teacher" in shown.text("Numbers")
    assert "after: step 20" in shown.text("Numbers")
    answers = shown.text("Right and wrong answers")
    assert "Some that the prompted teacher answers wrong" in answers
    assert "the student answers" not in answers


def test_a_run_that_has_only_begun_has_its_config(tmp_path):
    shown = read(made.write_begun(tmp_path / "run", optim={"learning_rate": 0.0123}))
    for name in ("step 0 of 60", "before.json", "metrics.jsonl", "eval.jsonl", "results.json"):
        assert name in shown.text()
    assert list(shown.sections) == ["Config"]
    chosen, whole = shown.text("Config").split("All of config.json")
    assert "optim.learning_rate 0.0123" in chosen and "optim.weight_decay" not in chosen
    assert '"weight_decay": 0.0' in whole and '"learning_rate": 0.0123' in whole
    for epochs, planned in ((3, "of 3 epochs"), (None, "of an unknown number")):
        train = {"steps": None, "epochs": epochs}
        run = made.write_begun(tmp_path / planned, train=train)
        assert planned in run_files.read(run).state


CUT = "the last line is cut off, and left out"


@pytest.mark.parametrize("name", ["metrics", "eval", "samples", "answers"])
def test_a_last_line_that_is_cut_off_is_left_out_and_named(finished, name):
    whole = run_files.read(finished)
    path = finished / f"{name}.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    run = run_files.read(finished)
    assert run.damaged == [f"{name}.jsonl: {CUT}"]
    assert run.damaged[0] in read(finished).text()
    field = "evaluations" if name == "eval" else name
    assert getattr(run, field) == getattr(whole, field)[:-1]
    path.write_text("")  # no damage
    run = run_files.read(finished)
    assert getattr(run, field) == run.damaged == []


@pytest.mark.parametrize("bad", [b"\x00\x00", b"\xff{}", b"[1]", b"{}", b'{"step": "1"}', b""])
def test_a_damaged_line_in_the_middle_is_left_out_and_counted(finished, bad):
    path = finished / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], bad, *lines[3:]]))
    run = run_files.read(finished)
    assert run.damaged == ["metrics.jsonl: lines that cannot be read are left out (1: 4)"]
    assert run.metrics == made.three_phases(made.STEPS)
    path.write_bytes(b"\n".join([*[bad] * 5, *lines[:-1], b'{"st']))
    assert run_files.read(finished).damaged == [
        f"metrics.jsonl: {CUT}",
        "metrics.jsonl: lines that cannot be read are left out (5: 1, 2, 3, ...)",
    ]


def test_other_files_that_cannot_be_read_whole(finished):
    (finished / "results.json").write_text('{"steps": ')
    path = finished / "trajectories_train.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    shown = read(finished)
    assert "results.json cannot be read, and is left out" in shown.text()
    assert "not finished, step 60 of 60" in shown.text()
    text = shown.text("Text that was trained on")
    assert "Told 7" in text and "Told 8" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no config.json"), ("{", "does not parse"), ('{"model_type": "x"}', "not a run")],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        report.write_html(tmp_path)
    assert list(tmp_path.glob("report*")) == []


def test_nothing_is_asked_of_a_network_and_nothing_can_run(page_of_finished):
    text, shown = page_of_finished
    assert shown.tags <= ALLOWED
    for _, name, value in shown.attributes:
        assert not name.startswith("on")
        if name.endswith(("href", "src")):
            assert re.fullmatch(r"#\w+", value)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert re.findall(r"url\((?!#)|@import|https?:", text) == []
    # What drawings point to is there once.
    assert len(set(shown.ids)) == len(shown.ids)
    pointed = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    assert pointed and pointed <= set(shown.ids)


HOSTILE = '</pre></style></svg><script>alert(1)</script><img src="http://x/y" onerror=z> {{ 7*7 }}'
HOSTILE += "\x00\x1b[2J\u202e\ud800 & <b>\"'"


def spoiled(value):
    """Every text of a file's content with hostile text after it; keys are left alone."""
    if isinstance(value, dict):
        keep = ("set", "condition", "divergence", "style")
        return {k: v if k in keep else spoiled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_file_is_taken_for_more_than_text(finished):
    for name in ("samples", "answers", "trajectories_train"):
        path = finished / f"{name}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        made.write_lines(path, [spoiled(line) for line in lines])
    metrics = [m | {f"anchor_{HOSTILE}_loss": 0.1} for m in made.three_phases(6)]
    made.write_lines(finished / "metrics.jsonl", metrics)
    found = spoiled(made.full_results(retention={}, side_effects={}, prefix_cost={}))
    found["retention"] = {HOSTILE: {"before": 1.0, "after": 0.5}}
    found["unavailable"] = {HOSTILE: HOSTILE}
    for name, value in (("results", found), ("config", spoiled(made.config()))):
        (finished / f"{name}.json").write_text(json.dumps(value))
    shown = read(finished)
    assert shown.tags <= ALLOWED
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert not [c for c in text if ord(c) < 32 and c != "\n"] and "\u202e" not in text
    assert text.count(r"\x00\x1b[2J\u202e\ud800") > 30
    assert "{{ 7*7 }}" in shown.text() and "alert(1)" in shown.text()


def test_long_answers_are_cut_and_many_steps_thinned(finished):
    lines = made.samples()
    lines[0]["answers"][0] = "long " * 4000
    made.write_lines(finished / "samples.jsonl", lines)
    made.write_lines(finished / "metrics.jsonl", made.three_phases(30_000))
    shown = read(finished)
    assert "... (20,000 characters in all)" in shown.text("Answers on the way")
    assert shown.text().count("long ") == 300
    assert (finished / "report.html").stat().st_size < 500_000


def test_the_same_files_give_the_same_page_and_a_failure_leaves_the_old(finished, monkeypatch):
    first = report.write_html(finished).read_bytes()
    other = finished.parent / "other.html"
    assert report.write_html(finished, other) == other and other.read_bytes() == first
    made.write_lines(finished / "metrics.jsonl", made.three_phases(made.STEPS - 1))
    old = report.write_html(finished).read_bytes()
    assert old != first

    def fail(path, content):
        path.write_text("half a page")
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(NotWritten, match="no space"):
        report.write_html(finished)
    assert (finished / "report.html").read_bytes() == old
    assert list(finished.parent.rglob("*.part")) == []


def test_config_values_that_differ_never_look_alike():
    values = ["a" * 100 + "b", "a" * 100 + "c", [{"prompt": "x" * 99}], [{"prompt": "y" * 99}]]
    values += [None, "", 0, 0.0, False, [], {}, "null ", "a\nb", "a b", "\ud800", "\ud801"]
    shown = run_files.flat({"section": {str(i): value for i, value in enumerate(values)}})
    assert len({*shown.values()}) == len(values)
    assert max(map(len, shown.values())) < 64
    assert shown["section.2"].startswith("a list of 1 (crc32 ") and shown["section.4"] == "null"
