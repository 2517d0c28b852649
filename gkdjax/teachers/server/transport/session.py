"""How to reach a server: its address, the key, and a session that keeps to the clock."""

import http.client
import io
import ipaddress
import os
import re
import socket
import time
import urllib.parse
from http import cookiejar

import requests
import urllib3
from requests import adapters, auth

from gkdjax.utils.errors import UserError

_MOST_CONNECTIONS = 256  # that are kept open; no run asks so many things at once


def root_of(api_base: str) -> str:
    """The address without a trailing "/v1", to which paths like "/v1/models" are appended.

    Raises:
      UserError: it is no http or https address, or has a place where a key could hide.
    """
    key = "config.teacher.api_base"
    if "@" in api_base or "?" in api_base or "#" in api_base:
        raise UserError(
            f"{key} must not have a user, password, query or fragment; a key is read from the"
            " environment variable that config.teacher.api_key_env names"
        )
    root = api_base.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        requests.Request("GET", root).prepare()
        parts = urllib.parse.urlsplit(root)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # requests' own errors of this kind are ValueErrors, too
        sound = False
    if not sound or re.search(r"[\s\\\x00-\x1f\x7f]", root):
        raise UserError(f"{key}={api_base!r} must look like http://host:8000/v1")
    return root


def read_key(api_key_env: str) -> str | None:
    """The value of the environment variable of this name; None if the name is "".

    Raises:
      UserError: no such variable, or no such name or key can be. The key is not in the message,
        nor is the name where it could be the key itself.
    """
    setting = "config.teacher.api_key_env"
    if not api_key_env:
        return None
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", api_key_env) or _may_be_a_key(api_key_env):
        raise UserError(
            f"{setting} must be the name of an environment variable that holds the key, as"
            " TEACHER_API_KEY; what is there looks like a key itself"
        )
    key = os.environ.get(api_key_env)
    if not key:
        raise UserError(f"{setting}={api_key_env!r}: that environment variable is not set")
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"the environment variable {api_key_env} holds a line break, a space or something else"
            " that no key has"
        )
    return key


def is_loopback(root: str) -> bool:
    """Whether what is sent to this address stays on this machine."""
    host = urllib.parse.urlsplit(root).hostname
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_session(key: str | None, *, trust_env: bool) -> requests.Session:
    """For any number of threads: its connections are pooled, and it has no other state."""
    session = _Session()
    session.trust_env = trust_env
    session.auth = None if key is None else _Bearer(key)
    session.headers["Accept-Encoding"] = "identity"  # what is not packed need not be unpacked
    session.cookies.set_policy(cookiejar.DefaultCookiePolicy(allowed_domains=()))
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=_MOST_CONNECTIONS))
    return session


def attempt_timeout(seconds: float) -> urllib3.Timeout:
    """Of one request on such a session: with all of connecting, sending and reading."""
    return urllib3.Timeout(total=seconds, connect=min(10.0, seconds))


def _may_be_a_key(name: str) -> bool:
    """Tokens with underscores are valid names; names are short, or have no lower-case letters."""
    return len(name) >= 20 and bool(re.search("[a-z]", name) and re.search("[0-9]", name))


class _Session(requests.Session):
    def get_redirect_target(self, resp):
        """None: a redirect is an answer like any other; even its body is not read here."""
        return None


class _Bearer(auth.AuthBase):
    """As an auth object the key takes precedence over ~/.netrc, and has no telling repr."""

    def __init__(self, key: str):
        self._key = key

    def __call__(self, r):
        r.headers["Authorization"] = f"Bearer {self._key}"
        return r


class _Clocked(io.RawIOBase):
    """A socket's bytes, for as long as its timeout was when the answer was first waited for.

    A socket's own timeout starts again with each byte, so a server that sends one now and then
    would hold us for good.
    """

    def __init__(self, sock: socket.socket, raw: io.RawIOBase):
        self._sock, self._raw = sock, raw
        self._end = time.monotonic() + sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """All of an answer is read through `fp`: status line, headers, chunk sizes and body."""

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Clocked(sock, self.fp.detach()))


class _HTTPConnection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _Adapter(adapters.HTTPAdapter):
    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _HTTPSConnection if pool.scheme == "https" else _HTTPConnection
        return pool
