#!/usr/bin/env bash
# transformers 5.24 and a callable among the keyword arguments of apply_chat_template. They are "accessible
# by the chat template", so one guesses that strftime_now=... stands in for the built-in of that name, to
# render with a fixed date.
# Behaviour: it does hide the built-in, but as the text "<function>": all that a template sees is made plain
# first, so the call fails with "'str' object is not callable". With {{ strftime_now }} alone, or where a
# template tests "is defined" or "is string", there is no error at all, only other text.
# Run: findings/chat_template_callables.sh      (makes a temporary folder and a venv; exit 1: it changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'transformers==5.24.0' 'jinja2==3.1.6'
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import sys

import tokenizers
import transformers

core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
said = [{"role": "user", "content": "hi"}]


def render(template):
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(
        said, tokenize=False, strftime_now=lambda form: "26 Jul 2024"
    )


print("transformers", transformers.__version__)
shown = render("{{ strftime_now }}")
try:
    called = render("{{ strftime_now('%d %b %Y') }}")
except Exception as error:
    called = f"{type(error).__name__}: {error}"
print("shown: ", shown)
print("called:", called)
sys.exit(0 if shown == "<function>" and called.endswith("'str' object is not callable") else 1)
PY
