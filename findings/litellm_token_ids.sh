#!/usr/bin/env bash
# LiteLLM and a prompt of token ids to one and the same vLLM server. One guesses that its provider
# "hosted_vllm/" passes on what vLLM's own /v1/completions takes, and "openai/" the least of all.
# Behaviour: the other way round. openai/ and text-completion-openai/ send the ids as they are;
# hosted_vllm/ goes through the chat route, raises "Unmapped prompt format", and asks the server nothing.
# Behind the proxy that is a status 500, which looks like an outage and comes back for good.
# Run: findings/litellm_token_ids.sh      (makes a temporary folder and a venv; exit 1: it changed)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'litellm==1.108.7'
cd "$folder"
LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/venv/bin/python" - <<'PY'
import http.server
import importlib.metadata
import json
import sys
import threading

import litellm

litellm.suppress_debug_info = True
IDS = [5, 6, 7]
CHOICE = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": None}
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
asked = []


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        size = int(self.headers["Content-Length"])
        asked.append((self.path, json.loads(self.rfile.read(size)).get("prompt")))
        said = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}
        said = json.dumps(said | {"choices": [CHOICE], "usage": USAGE}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}/v1"
print("litellm", importlib.metadata.version("litellm"))
seen = {}
for provider in ("openai", "text-completion-openai", "hosted_vllm"):
    before, error = len(asked), ""
    try:
        litellm.text_completion(
            model=f"{provider}/m", prompt=IDS, api_base=base, api_key="none", max_tokens=1
        )
    except Exception as raised:
        error = str(raised)[:60]
    seen[provider] = asked[before:], error
    print(f"{provider + '/':24} the server was asked {asked[before:]}", error)
passed = [("/v1/completions", IDS)]
as_seen = (
    seen["openai"] == seen["text-completion-openai"] == (passed, "")
    and seen["hosted_vllm"][0] == []
    and "Unmapped prompt format" in seen["hosted_vllm"][1]
)
sys.exit(0 if as_seen else 1)
PY
