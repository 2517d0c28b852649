#!/usr/bin/env bash
# datasets 5 and a column of a JSON file whose values are of several types. One guesses that a string
# comes back as the string that it was: json.loads(line)["a"] == load_dataset(...)[i]["a"].
# Behaviour: it does not. The text "42" comes back as the number 42, "null" as None, a text with quotes
# of its own without them; and where the odd value comes late (after the first 10 MiB, `chunksize`) the
# column stays one of strings, and thousands of good strings around it come back as JSON text, in quotes
# and with backslashes. No error, no warning. Values of one file differ by what else the file holds.
# Run: findings/datasets_json_columns.sh      (makes a temporary folder and a venv; exit 1: it changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'datasets==5.2.0'
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import json
import pathlib
import sys

import datasets

datasets.disable_progress_bars()


def loaded(name, values, **how):
    folder = pathlib.Path(name)
    folder.mkdir()
    lines = "\n".join(json.dumps({"a": value}) for value in values)
    (folder / "train.jsonl").write_text(lines)
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"), **how)


print("datasets", datasets.__version__)
texts = ["42", "null", '"quoted"', "plain"]
alone, mixed = loaded("alone", texts), loaded("mixed", [*texts, ["a list"]])
print("strings only:        ", alone.features, alone["a"][:4])
print("beside one list:     ", mixed.features, mixed["a"][:4])
many = [f"line {i}\n" for i in range(4000)]
many[3900] = 7
late = loaded("late", many, chunksize=20_000)
wrong = [i for i in range(4000) if i != 3900 and late[i]["a"] != many[i]]
print("one late number:     ", late.features, f"{len(wrong)} of 3999 strings changed, as",
      repr(late[wrong[0]]["a"]), "for", repr(many[wrong[0]]) if wrong else "")
as_seen = (
    alone["a"][:4] == texts
    and mixed["a"][:4] == [42, None, "quoted", "plain"]
    and late.features["a"] == datasets.Value("string")
    and len(wrong) > 100
)
sys.exit(0 if as_seen else 1)
PY
