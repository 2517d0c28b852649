"""Models by hub id: from a cache made by hand, and from a small server that speaks as the hub."""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import jax
import numpy as np
import pytest

from gkdjax.models.hf import hub, load
from gkdjax.utils.errors import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "S3cret" * 6
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TERMS = {"LICENSE", "USE_POLICY.md", "Notice.txt", "license.md"}
DEAD = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
REPOSITORY = pathlib.Path(__file__).parents[2]
FETCH = """
import sys
from gkdjax.models.hf import hub
from gkdjax.utils import errors
try:
    print(hub.local_directory(sys.argv[1], weights=sys.argv[2] == "True"))
except errors.UserError as error:
    print("refused:", error)
"""


def fetch(home: pathlib.Path, model: str, weights: bool = True, **environment: str) -> str:
    """The directory of `local_directory`, or "refused: ..."; checks that no token is in the output.

    huggingface_hub reads its environment as it is imported, so each case has a process of its own.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    process = subprocess.run(
        [sys.executable, "-c", FETCH, model, str(weights)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**inherited, "HF_HOME": str(home), **environment},
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "S3cret" not in process.stdout + process.stderr
    return process.stdout.strip()


def cached(home: pathlib.Path, source: str, leave_out: str = "") -> pathlib.Path:
    """Puts a model directory into the hub's cache as "org/name", as the hub's library does."""
    root = home / "hub/models--org--name"
    for folder in ("refs", "blobs", f"snapshots/{SHA}"):
        (root / folder).mkdir(parents=True)
    (root / "refs/main").write_text(SHA)
    for number, file in enumerate(sorted(pathlib.Path(source).iterdir())):
        if file.name != leave_out:
            (root / f"blobs/{number:040}").write_bytes(file.read_bytes())
            (root / f"snapshots/{SHA}" / file.name).symlink_to(f"../../blobs/{number:040}")
    return root / f"snapshots/{SHA}"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Repositories are folders of `server.root`; "private" and "gated" ones need the token."""

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append((path, self.headers.get("Authorization")))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        api, _, rest = path.removeprefix("/api/models/").partition("/resolve/")
        model = "/".join(api.strip("/").split("/")[:2])
        folder = self.server.root / model
        if model == "org/broken":
            return self.answer(500)
        if "Authorization" in self.headers and not allowed:
            wrong = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.answer(401, headers=wrong)
        if not folder.is_dir() or (model == "org/private" and not allowed):
            return self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            return self.answer(200, self.describe(model, folder, "/tree/" in path))
        if model == "org/gated" and not allowed:
            return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
        file = folder / rest.partition("/")[2]
        headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": SHA}
        return self.answer(200, file.read_bytes(), headers)

    do_HEAD = do_GET

    def describe(self, model: str, folder: pathlib.Path, tree: bool) -> bytes:
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        names = [str(p.relative_to(folder)) for p in files]
        listing = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{i:040}"}
            for i, (name, file) in enumerate(zip(names, files, strict=True))
        ]
        info = {"id": model, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
        return json.dumps(listing if tree else info).encode()

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory, student):
    root = tmp_path_factory.mktemp("hub")
    pickled, adapter = root / "org/pickled", root / "org/adapter"
    (pickled / "original").mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin", "original/model.safetensors"):
        (pickled / name).write_text("{}")
    for name in ("open", "private", "gated"):
        (root / "org" / name).symlink_to(student)
    (adapter / "checkpoint-1").mkdir(parents=True)
    for name in (*ADAPTER, *TERMS, "README.md", "run.py", "checkpoint-1/adapter_config.json"):
        (adapter / name).write_text("{}")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        server.root, server.asked = root, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def online(server, **more: str) -> dict[str, str]:
    return DEAD | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"} | more


def names(directory: str) -> set[str]:
    return {path.name for path in pathlib.Path(directory).iterdir()}


def assert_same_model(directory: str, student: str) -> None:
    found, wanted = (load.load_pretrained(place)[1] for place in (directory, student))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_directory_is_itself(student):
    assert hub.local_directory(student) == pathlib.Path(student)


@pytest.mark.parametrize("environment", [OFFLINE, DEAD])
def test_the_cache_is_enough(tmp_path, student, environment):
    snapshot = cached(tmp_path, student)
    assert fetch(tmp_path, "org/name", **environment) == str(snapshot)
    assert_same_model(snapshot, student)  # through its symlinks


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("org/other", "'org/other' is no directory here and not.*HF_HUB_OFFLINE is set"),
        ("runs/quickstart/student", "neither a directory here nor a hub id"),
        ("", "neither a directory here nor a hub id"),
        ("/nowhere/model", "neither a directory here nor a hub id"),
    ],
)
def test_a_model_that_cannot_be_found_offline_is_refused(model, wanted):
    with pytest.raises(UserError, match=wanted):
        hub.local_directory(model)


def test_offline_a_cache_without_weights_is_refused(tmp_path, student):
    cached(tmp_path, student, leave_out="model.safetensors")
    found = fetch(tmp_path, "org/name", **OFFLINE)
    assert found.startswith("refused: the hub's 'org/name' holds no *.safetensors file")


def test_a_model_is_fetched_once_and_then_there_offline(tmp_path, server, student):
    found = fetch(tmp_path, "org/open", **online(server))
    assert_same_model(found, student)
    assert not any(header for _, header in server.asked)
    assert fetch(tmp_path, "org/open", **OFFLINE) == found


@pytest.mark.parametrize("model", ["org/private", "org/gated"])
def test_the_token_opens_what_needs_it(tmp_path, server, student, model):
    assert_same_model(fetch(tmp_path, model, **online(server, HF_TOKEN=TOKEN)), student)


@pytest.mark.parametrize(
    ("model", "token", "wanted"),
    [
        ("org/gated", "", "gated: accept its licence on https://huggingface.co/org/gated"),
        ("org/private", "", "the hub knows no such model; if it is private, set HF_TOKEN"),
        ("org/none", TOKEN, "no directory here, and the hub knows no such model"),
        ("org/open", TOKEN + "x", "refuses 'org/open' (status 401): is HF_TOKEN"),
        # What no header may hold: the library's own message repeats it.
        ("org/open", TOKEN + "\x0b1", "could not be fetched from the hub (Local"),
        ("org/broken", TOKEN, "answers 500 for 'org/broken'"),
        ("org/pickled", "", "pickle files (pytorch_model.bin), which can run code"),
    ],
)
def test_refusals_of_the_hub_are_explained(tmp_path, server, model, token, wanted):
    found = fetch(tmp_path, model, **online(server, HF_TOKEN=token))
    assert found.startswith("refused: ") and wanted in found
    # Pickles are never downloaded.
    assert not any(path.endswith(".bin") for path, _ in server.asked if "/resolve/" in path)


def test_a_dead_network_is_named(tmp_path):
    found = fetch(tmp_path, "org/name", HF_TOKEN=TOKEN, **DEAD)
    assert found.startswith("refused: 'org/name' is no directory here and could not be fetched")
    assert "network" in found


def test_a_tokenizer_comes_without_the_weights(tmp_path, server, student):
    found = fetch(tmp_path, "org/open", weights=False, **online(server))
    assert names(found) == names(student) - {"model.safetensors"}
    refused = fetch(tmp_path, "org/open", **OFFLINE)
    assert "'org/open' is no directory here and not, or not whole, in the hub cache" in refused
    assert fetch(tmp_path, "org/open", **online(server)) == found  # now with them
    assert names(found) == names(student)


def test_an_adapter_comes_without_files_that_are_not_needed(tmp_path, server):
    assert names(fetch(tmp_path, "org/adapter", **online(server))) == ADAPTER | TERMS
    described = [path for path, _ in server.asked if path.startswith("/api/models/org/adapter/")]
    assert described[-1].endswith(f"/{SHA}")  # the licences are those of the same commit


def test_a_cache_that_others_filled_is_whole_without_the_licence(tmp_path, server):
    """huggingface_hub refuses, offline, a snapshot that lacks one file of the patterns."""
    theirs = "import huggingface_hub, sys; huggingface_hub.snapshot_download("
    theirs += "'org/adapter', allow_patterns=['*.json', '*.safetensors'], ignore_patterns='*/*')"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"} | online(server)
    subprocess.run([sys.executable, "-c", theirs], env=environment, check=True)
    assert names(fetch(tmp_path, "org/adapter", **OFFLINE)) == ADAPTER
