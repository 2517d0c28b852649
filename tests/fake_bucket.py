"""Google's object storage on 127.0.0.1, as far as its clients use it here: gcsfs and tensorstore.

with FakeServer(FakeBucket()) as server:
    environ |= variables(server.base)
    ...  # gs://bucket/ANYTHING
"""

import base64
import email
import hashlib
import itertools
import json
import re
import threading
import urllib.parse

from fake_server import Reply, Request

BUCKET = "bucket"
_OBJECT = re.compile(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)(?:/moveTo/o/([^/]+))?")
_PAGE = 50  # objects of a listing, so that there are several
_NOT_FOUND = Reply({"error": {"code": 404, "message": "not found"}}, status=404)
FORBIDDEN = Reply({"error": {"code": 403, "message": "no storage.objects access"}}, status=403)
UNAVAILABLE = Reply({"error": {"code": 503, "message": "try again later"}}, status=503)


def variables(base: str) -> dict[str, str]:
    """Makes the environment in which clients use the server at `base`, without a login."""
    off = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}
    return {"STORAGE_EMULATOR_HOST": base, "TENSORSTORE_GCS_HTTP_URL": base} | off


class FakeBucket:
    """A handler of a `FakeServer`; objects have generations, and requests may have conditions."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}  # name -> content, generation
        self._uploads: dict[str, tuple[str, dict, bytes]] = {}
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def __call__(self, request: Request) -> Reply:
        url = urllib.parse.urlsplit(request.path)
        asked = dict(urllib.parse.parse_qsl(url.query))
        with self._lock:
            if url.path == f"/storage/v1/b/{BUCKET}":
                return Reply({"kind": "storage#bucket", "name": BUCKET})
            if url.path == f"/upload/storage/v1/b/{BUCKET}/o":
                return self._upload(request, asked)
            if url.path == f"/storage/v1/b/{BUCKET}/o":
                return self._list(asked)
            found = _OBJECT.fullmatch(url.path)
            name, target = (found and urllib.parse.unquote(part or "") for part in found.groups())
            if name not in self.objects:
                return _NOT_FOUND
            if request.method == "DELETE":
                del self.objects[name]
                return Reply(status=204)
            if target:
                self.objects[target] = self.objects.pop(name)[0], next(self._numbers)
                return Reply(self._resource(target))
            return self._read(name, request, asked)

    def _list(self, asked: dict) -> Reply:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        names, folders = [], set()
        for name in sorted(name for name in self.objects if name.startswith(prefix)):
            folder, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            folders |= {prefix + folder + cut} if cut else set()
            names += [] if cut else [name]
        start = int(asked.get("pageToken", 0))
        page = {
            "kind": "storage#objects",
            "items": [self._resource(name) for name in names[start : start + _PAGE]],
        }
        page |= {"prefixes": sorted(folders)} if start == 0 else {}
        return Reply(page | ({"nextPageToken": start + _PAGE} if names[start + _PAGE :] else {}))

    def _read(self, name: str, request: Request, asked: dict) -> Reply:
        content, generation = self.objects[name]
        if asked.get("alt") != "media":
            return Reply(self._resource(name))
        if asked.get("ifGenerationNotMatch") == str(generation):
            return Reply(status=304)
        headers = {"X-Goog-Generation": generation, "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["Range"] or "")
        if wanted is None:
            return Reply(content, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            return Reply(status=416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Reply(content[first : last + 1], status=206, headers=headers)

    def _upload(self, request: Request, asked: dict) -> Reply:
        if asked["uploadType"] == "media":
            return self._write(asked["name"], request.raw, asked)
        if asked["uploadType"] == "multipart":
            kind = f"Content-Type: {request.headers['Content-Type']}\n\n"
            message = email.message_from_bytes(kind.encode() + request.raw)
            fields, content = (part.get_payload(decode=True) for part in message.get_payload())
            return self._write(json.loads(fields)["name"], content, asked)
        if "upload_id" not in asked:
            upload = str(next(self._numbers))
            self._uploads[upload] = asked["name"], asked, b""
            location = f"http://{request.headers['Host']}{request.path}&upload_id={upload}"
            return Reply({}, headers={"Location": location})
        name, conditions, content = self._uploads[asked["upload_id"]]
        if request.method == "DELETE":
            return Reply(status=499)
        content += request.raw
        if request.headers["Content-Range"].endswith("/*"):
            self._uploads[asked["upload_id"]] = name, conditions, content
            return Reply(status=308, headers={"Range": f"bytes=0-{len(content) - 1}"})
        return self._write(name, content, conditions)

    def _write(self, name: str, content: bytes, conditions: dict) -> Reply:
        _, generation = self.objects.get(name, (b"", 0))
        if conditions.get("ifGenerationMatch", str(generation)) != str(generation):
            return Reply({"error": {"code": 412, "message": "condition not met"}}, status=412)
        self.objects[name] = content, next(self._numbers)
        return Reply(self._resource(name))

    def _resource(self, name: str) -> dict:
        content, generation = self.objects[name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        fields = {"size": str(len(content)), "generation": str(generation), "md5Hash": digest}
        times = dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")
        return {"kind": "storage#object", "bucket": BUCKET, "name": name} | fields | times
