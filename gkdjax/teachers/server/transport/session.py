"""How a server is reached: its address, the key, and a session whose timeouts are total ones."""

import http.client
import io
import ipaddress
import os
import re
import time
import urllib.parse
from http import cookiejar

import requests
import urllib3
from requests import adapters

from gkdjax.utils.errors import UserError

_MOST_CONNECTIONS = 256  # in the pool; no run has so many requests under way


def root_of(api_base: str) -> str:
    """The address without a trailing "/v1", to which paths such as "/v1/models" are appended.

    Raises:
      UserError: it is no http or https address, or has a part in which a key could stand.
    """
    key = "config.teacher.api_base"
    if re.search("[@?#]", api_base):
        raise UserError(
            f"{key} must not have a user, password, query or fragment; a key is read from the"
            " environment variable that config.teacher.api_key_env names"
        )
    root = api_base.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        requests.Request("GET", root).prepare()
        parts = urllib.parse.urlsplit(root)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the base class of requests' errors about addresses, too
        valid = False
    if not valid or re.search(r"[\s\\\x00-\x1f\x7f]", root):
        raise UserError(f"{key}={api_base!r} must look like http://host:8000/v1")
    return root


def read_key(api_key_env: str) -> str | None:
    """The value of the environment variable of this name; None if the name is "".

    Raises:
      UserError: there is no such variable, or its name or value is malformed. The message never
        holds the key, nor a name that looks like one.
    """
    setting = "config.teacher.api_key_env"
    if not api_key_env:
        return None
    # A key can be a valid name, but names are short or have no lower-case letters.
    like_key = len(api_key_env) >= 20 and re.search("[a-z].*[0-9]|[0-9].*[a-z]", api_key_env)
    if like_key or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        raise UserError(
            f"{setting} must be the name of an environment variable that holds the key, such as"
            " TEACHER_API_KEY; its value looks like a key itself"
        )
    key = os.environ.get(api_key_env)
    if not key:
        raise UserError(f"{setting}={api_key_env!r}: that environment variable is not set")
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"the environment variable {api_key_env} holds a line break, a space or another"
            " character that no key has"
        )
    return key


def is_loopback(root: str) -> bool:
    """Whether this address is on this machine."""
    host = urllib.parse.urlsplit(root).hostname
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_session(key: str | None, *, trust_env: bool) -> requests.Session:
    """Returns a thread-safe session that keeps no cookies, follows and unpacks nothing."""
    session = _Session()
    session.trust_env = trust_env
    if key is not None:

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        session.auth = authorize  # takes precedence over ~/.netrc, and its repr hides the key
    session.headers["Accept-Encoding"] = "identity"
    session.cookies.set_policy(cookiejar.DefaultCookiePolicy(allowed_domains=()))
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Adapter(pool_maxsize=_MOST_CONNECTIONS))
    return session


def attempt_timeout(seconds: float) -> urllib3.Timeout:
    """The timeout of a whole request on such a session: connecting, sending and reading."""
    return urllib3.Timeout(total=seconds, connect=min(10.0, seconds))


class _Session(requests.Session):
    def get_redirect_target(self, resp):
        """None: a redirect is a response like any other, whose body is not read here."""


class _TimedReader(io.RawIOBase):
    """The bytes of a socket, which has its timeout in total.

    A socket's own timeout starts again at each byte: a server that sends one now and then would
    never be given up.
    """

    def __init__(self, sock, raw: io.RawIOBase):
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
    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        # The status line, headers, chunk sizes and body are all read from `fp`.
        self.fp = io.BufferedReader(_TimedReader(sock, self.fp.detach()))

    def _read_status(self) -> tuple:
        """Skips what is sent before the status, such as 103 Early Hints; 101 is final."""
        version, status, reason = super()._read_status()
        while 101 < status < 200:
            http.client.parse_headers(self.fp)
            version, status, reason = super()._read_status()
        return version, status, reason


class _Adapter(adapters.HTTPAdapter):
    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        if pool.ConnectionCls.response_class is not _Response:
            members = {"response_class": _Response}
            pool.ConnectionCls = type("_Connection", (pool.ConnectionCls,), members)
        return pool
