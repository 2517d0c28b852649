#!/usr/bin/env bash
# transformers and a tokenizer.json whose directory names another class or family: "GPT2Tokenizer" beside
# model_type llama, or any tokenizer under model_type qwen2. One guesses that a fast tokenizer is its
# tokenizer.json: AutoTokenizer(text) has the ids of tokenizers.Tokenizer.from_file(path).encode(text).
# Behaviour: 4.57.6 gives the file's ids. 5.24 takes vocabulary and merges from the file, and builds from the
# class what normalises and cuts the text: the file's pre-tokenizer (single digits, here) is gone, and with
# qwen2 text is brought to NFC, too. No error, no warning; a model reads other ids than it was trained with.
# Run: findings/tokenizer_rebuilt_from_class.sh      (makes a temporary folder and venvs; exit 1: it changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.6 5.24.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "transformers==$version"
done
cd "$folder"
cat >tried.py <<'PY'
import json
import pathlib
import sys

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXT = "in 2023  10 cafe\u0301"
CASES = {"llama": "GPT2Tokenizer", "qwen2": "PreTrainedTokenizerFast"}

made = tokenizers.Tokenizer(models.BPE())
cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
made.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
made.train_from_iterator([TEXT + " caf\u00e9"] * 20, trainer)

right = made.encode(TEXT, add_special_tokens=False)
print("transformers", transformers.__version__)
print(f"  {'tokenizer.json':32}", right.tokens)
same = []
for model_type, name in CASES.items():
    folder = pathlib.Path(transformers.__version__, model_type)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    loaded = transformers.AutoTokenizer.from_pretrained(str(folder))
    found = loaded(TEXT, add_special_tokens=False)["input_ids"]
    print(f"  {model_type + ', ' + name:32}", loaded.convert_ids_to_tokens(found), type(loaded).__name__)
    same.append(found == right.ids)
sys.exit(0 if same == [sys.argv[1] == "same"] * 2 else 1)
PY
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
4.57.6/bin/python tried.py same
5.24.0/bin/python tried.py other
