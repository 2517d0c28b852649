"""What a server answered, and how errors quote it."""

import dataclasses
import json
import urllib.parse

import requests
import urllib3


@dataclasses.dataclass(frozen=True)
class Reply:
    """Of whatever status, as far as it was read."""

    status: int
    headers: requests.structures.CaseInsensitiveDict
    body: bytes  # perhaps a little more than was wanted, if there was more

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return f"<{self.packed}>" if self.packed else self.body.decode(errors="replace")

    @property
    def packed(self) -> str:
        """The content encoding; "" if there is none. What is packed stays so: it may be huge."""
        encoding = (self.headers.get("Content-Encoding") or "").strip()
        return "" if encoding.lower() == "identity" else encoding


def read(raw: urllib3.HTTPResponse, most: int) -> bytes:
    """The body as it was sent, or a little more than `most` bytes of it."""
    parts, size = [], 0
    for part in raw.stream(2**16, decode_content=False):
        parts.append(part)
        size += len(part)
        if size > most:
            break
    return b"".join(parts)


def without_key(text: str, key: str) -> str:
    """Servers like to quote a wrong key, or its head and tail."""
    for n in range(len(key), min(8, len(key)) - 1, -1):
        text = text.replace(key[:n], "***").replace(key[-n:], "***")
    return text


def target(url: str, location: str | None) -> str:
    """Where a redirect points to, without what could be a secret."""
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(url, location or ""))
    except ValueError:
        return "what is no address"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def message(text: str) -> str:
    """Of an error's body: the sentence for people, or all of it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return found if isinstance(found, str) else json.dumps(found)
