"""Models by hub id: from a cache made by hand, and from a small server that speaks as the hub."""

import contextlib
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
FETCHED = (
    *("adapter_config.json", "adapter_model.safetensors"),
    *("LICENSE", "USE_POLICY.md", "Notice.txt", "license.md"),
)
REPOSITORY = pathlib.Path(__file__).parents[2]
# huggingface_hub reads its environment as it is imported, so each case has a process of its own.
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
    """The directory that `local_directory` gives, or "refused: ..."; no token in the output."""
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


def cached(home: pathlib.Path, source: pathlib.Path, leave_out: str = "") -> pathlib.Path:
    """Puts a model directory into the hub's cache as "org/name", as the hub's library does."""
    root = home / "hub/models--org--name"
    for folder in ("refs", "blobs", f"snapshots/{SHA}"):
        (root / folder).mkdir(parents=True)
    (root / "refs/main").write_text(SHA)
    for number, file in enumerate(sorted(source.iterdir())):
        if file.name != leave_out:
            (root / f"blobs/{number:040}").write_bytes(file.read_bytes())
            (root / f"snapshots/{SHA}" / file.name).symlink_to(f"../../blobs/{number:040}")
    return root / f"snapshots/{SHA}"


@pytest.fixture
def source(student) -> pathlib.Path:
    return pathlib.Path(student)


def assert_same_model(directory: str, student: str) -> None:
    jax.tree.map(
        np.testing.assert_array_equal,
        load.load_pretrained(directory)[1],
        load.load_pretrained(student)[1],
    )


def test_a_directory_is_itself(student):
    assert hub.local_directory(student) == pathlib.Path(student)


def test_offline_the_cache_is_enough(tmp_path, source, student):
    snapshot = cached(tmp_path, source)
    found = fetch(tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert found == str(snapshot)
    assert_same_model(found, student)  # through its symlinks


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("org/other", "'org/other' is no directory here and not.*HF_HUB_OFFLINE is set"),
        ("runs/quickstart/student", "neither a directory here nor a hub id"),
        ("", "neither a directory here nor a hub id"),
        ("/nowhere/model", "neither a directory here nor a hub id"),
    ],
)
def test_what_cannot_be_found_offline_is_refused(model, wanted):
    with pytest.raises(UserError, match=wanted):
        hub.local_directory(model)


def test_offline_a_cache_without_weights_is_refused(tmp_path, source):
    cached(tmp_path, source, leave_out="model.safetensors")
    found = fetch(tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert found.startswith("refused: the hub's 'org/name' holds no *.safetensors file")


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


@contextlib.contextmanager
def serving(root: pathlib.Path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        server.root, server.asked = root, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory, student):
    root = tmp_path_factory.mktemp("hub")
    for name in ("open", "private", "gated"):
        (root / "org").mkdir(exist_ok=True)
        (root / "org" / name).symlink_to(student)
    pickled = root / "org/pickled"
    (pickled / "original").mkdir(parents=True)
    (pickled / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "original/model.safetensors"):
        (pickled / name).write_bytes(b"0" * 10)
    adapter = root / "org/adapter"
    (adapter / "checkpoint-1").mkdir(parents=True)
    for name in (*FETCHED, "README.md", "run.py"):
        (adapter / name).write_text("{}")
    with serving(root) as running:
        yield running


def online(server) -> dict[str, str]:
    return {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}


def test_a_model_is_fetched_once_and_then_there_offline(tmp_path, server, student):
    found = fetch(tmp_path, "org/open", **online(server))
    assert_same_model(found, student)
    assert not any(header for _, header in server.asked)
    assert fetch(tmp_path, "org/open", HF_HUB_OFFLINE="1") == found


@pytest.mark.parametrize("model", ["org/private", "org/gated"])
def test_the_token_opens_what_needs_it(tmp_path, server, student, model):
    found = fetch(tmp_path, model, HF_TOKEN=TOKEN, **online(server))
    assert_same_model(found, student)


@pytest.mark.parametrize(
    ("model", "environment", "wanted"),
    [
        ("org/gated", {}, "gated: accept its licence on https://huggingface.co/org/gated"),
        ("org/private", {}, "the hub knows no such model; if it is private, set HF_TOKEN"),
        ("org/none", {"HF_TOKEN": TOKEN}, "no directory here, and the hub knows no such model"),
        ("org/open", {"HF_TOKEN": TOKEN + "x"}, "refuses 'org/open' (status 401): is HF_TOKEN"),
        # What no header may hold: the library's own message repeats it.
        ("org/open", {"HF_TOKEN": TOKEN + "\x0b1"}, "could not be fetched from the hub (Local"),
        ("org/broken", {"HF_TOKEN": TOKEN}, "answers 500 for 'org/broken'"),
        ("org/pickled", {}, "pickle files (pytorch_model.bin), which can run code"),
    ],
)
def test_what_the_hub_refuses_is_explained(tmp_path, server, model, environment, wanted):
    found = fetch(tmp_path, model, **environment, **online(server))
    assert found.startswith("refused: ") and wanted in found


def test_pickles_are_never_downloaded(tmp_path, server):
    fetch(tmp_path, "org/pickled", **online(server))
    resolved = [path for path, _ in server.asked if "/org/pickled/resolve/" in path]
    assert {path.rpartition("/")[2] for path in resolved} == {"config.json"}


def test_a_tokenizer_comes_without_the_weights(tmp_path, server, student):
    found = pathlib.Path(fetch(tmp_path, "org/open", weights=False, **online(server)))
    weights = {"model.safetensors"}
    assert {p.name for p in found.iterdir()} == {
        p.name for p in pathlib.Path(student).iterdir()
    } - weights
    refused = fetch(tmp_path, "org/open", HF_HUB_OFFLINE="1")
    assert "'org/open' is no directory here and not, or not whole, in the hub cache" in refused
    assert fetch(tmp_path, "org/open", **online(server)) == str(found)  # now with them
    assert weights <= {p.name for p in found.iterdir()}


def test_an_adapter_comes_without_what_is_not_needed(tmp_path, server):
    found = fetch(tmp_path, "org/adapter", **online(server))
    names = sorted(path.name for path in pathlib.Path(found).iterdir())
    assert names == sorted(FETCHED)


def test_a_cache_that_others_filled_is_whole_without_the_licence(tmp_path, server):
    """huggingface_hub refuses, offline, a snapshot that lacks one file of the patterns."""
    theirs = "import huggingface_hub, sys; huggingface_hub.snapshot_download("
    theirs += "'org/adapter', allow_patterns=['*.json', '*.safetensors'], ignore_patterns='*/*')"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"} | online(server)
    subprocess.run([sys.executable, "-c", theirs], env=environment, check=True)
    found = pathlib.Path(fetch(tmp_path, "org/adapter", HF_HUB_OFFLINE="1"))
    assert {path.name for path in found.iterdir()} == set(FETCHED[:2])


def test_a_dead_network_is_named_and_the_cache_serves(tmp_path, source):
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
    found = fetch(tmp_path, "org/name", HF_TOKEN=TOKEN, **dead)
    assert found.startswith("refused: 'org/name' is no directory here and could not be fetched")
    assert "network" in found
    snapshot = cached(tmp_path, source)
    assert fetch(tmp_path, "org/name", **dead) == str(snapshot)
