"""Stands in for vLLM's interpreter: a server that has /health, and records how it was started.

STUB_DIR gets "started" (its arguments, key, GPUs and process id) and "stopped", when it is asked to
go. STUB_DELAY_S passes before it answers; "die" makes it end at once. A child of its own is a part
of it, as vLLM's engine is.
"""

import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

DIRECTORY = pathlib.Path(os.environ["STUB_DIR"])


class Health(http.server.BaseHTTPRequestHandler):
    """200 at /health, 404 elsewhere."""

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def stop(*_) -> None:
    (DIRECTORY / "stopped").touch()
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
engine = subprocess.Popen(["sleep", "1000"])
started = {
    "arguments": sys.argv[1:],
    "key": os.environ.get("VLLM_API_KEY"),
    "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "processes": [os.getpid(), engine.pid],
}
(DIRECTORY / "started.part").write_text(json.dumps(started))
(DIRECTORY / "started.part").rename(DIRECTORY / "started")
delay = os.environ.get("STUB_DELAY_S", "0")
if delay == "die":
    engine.kill()
    sys.exit("no memory for the model\nof 12 GiB")
time.sleep(float(delay))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
