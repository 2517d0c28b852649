"""Where requests and the key in them go, and where they do not."""

import logging
import shutil
import ssl
import subprocess
import traceback

import pytest
from fake_server import Reply

from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.utils.errors import GkdjaxError, TeacherRefused, TeacherUnreachable, UserError

KEY = "sk-canary-0123456789abcdef"
HURRIED = (0.5, 100.0, 1)
GOOD = Reply({"fine": True})
WITH_KEY = {"key_env": "TEACHER_KEY", "limits": HURRIED}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TEACHER_KEY", KEY)


def made(base: str, key_env: str = "TEACHER_KEY") -> None:
    Transport(base, key_env, Limits(*HURRIED), trust_env=False).close()


def everything_about(error: BaseException) -> str:
    """Its traceback and those of all errors that hang on it, shown or not."""
    found, todo = [], [error]
    while todo:
        error = todo.pop()
        found += [*traceback.format_exception(error), repr(error), repr(vars(error))]
        todo += [e for e in (error.__cause__, error.__context__) if e is not None]
    return "".join(found)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_target_receives_nothing(connect, status):
    _, target = connect(GOOD)
    location = target.base.replace("//", "//me:pw@") + "/v1/other?token=secret#a"
    transport, server = connect(Reply(status=status, headers={"Location": location}), **WITH_KEY)
    with pytest.raises(TeacherRefused, match=r"config\.teacher\.api_base") as error:
        transport.post("/v1/x", {}, max_bytes=99)
    assert (len(server.requests), len(target.requests)) == (1, 0)
    assert f"is redirected to {target.base}/v1/other, and" in str(error.value)


@pytest.mark.parametrize("headers", [{}, {"Location": "http://[bad"}])
def test_a_redirect_to_nowhere_is_refused_too(connect, headers):
    with pytest.raises(TeacherRefused, match="is redirected to"):
        connect(Reply(status=302, headers=headers))[0].get("/v1/models")


def test_a_proxy_is_used_only_if_the_environment_is_trusted(connect, monkeypatch):
    _, proxy = connect(Reply(["proxied"]))
    monkeypatch.setenv("HTTP_PROXY", proxy.base)
    monkeypatch.setenv("http_proxy", proxy.base)
    assert connect(GOOD)[0].get("/v1/models") == {"fine": True} and not proxy.requests
    transport, server = connect(GOOD, trust_env=True)
    assert transport.get("/v1/models") == ["proxied"] and not server.requests
    assert proxy.requests[0].path == f"{server.base}/v1/models"


@pytest.mark.parametrize(
    "key_env, trust_env", [("TEACHER_KEY", False), ("TEACHER_KEY", True), ("", False)]
)
def test_neither_netrc_nor_cookies_are_used(connect, monkeypatch, tmp_path, key_env, trust_env):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    cookie = Reply({}, headers={"Set-Cookie": "a=b"})
    transport, server = connect(cookie, key_env=key_env, trust_env=trust_env)
    for _ in range(2):
        transport.get("/v1/models")
    headers = [(r.headers["Authorization"], r.headers["Cookie"]) for r in server.requests]
    assert headers == [(f"Bearer {KEY}" if key_env else None, None)] * 2


ECHO = f"your key {KEY}, or {KEY[:12]}..., or ...{KEY[-9:]}, is wrong"
CHUNKED = {"Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"error": {"message": ECHO}}, status=401),
        Reply({"error": {"message": ECHO}}, status=500),
        Reply({"message": "x" * 480 + KEY}, status=400),
        Reply(ECHO.encode()),
        Reply(f'{{"{KEY}": 1, "{KEY}": 2}}'.encode()),
        Reply(status=302, headers={"Location": f"/{KEY}/v1"}),
        Reply({}, headers={"Content-Encoding": KEY}),
        Reply({}, headers={"Content-Length": KEY} | CHUNKED, cut=1),
        Reply(KEY.encode(), headers=CHUNKED, cut=99),
        Reply(silent=True, reset=True),
        Reply(cut=0, reset=True),
        Reply(delay_s=30.0),
        None,  # nobody is there
    ],
)
def test_the_key_is_in_no_error_and_no_log(connect, caplog, reply):
    caplog.set_level(logging.DEBUG)
    transport, server = connect(reply or GOOD, **WITH_KEY)
    if reply is None:
        server.stop()
    with pytest.raises(GkdjaxError) as error:
        transport.post("/v1/x", {}, max_bytes=999)
    assert {r.headers["Authorization"] for r in server.requests} <= {f"Bearer {KEY}"}
    texts = [everything_about(error.value), repr(transport), str(transport), caplog.text]
    for text in texts + [repr(vars(record)) for record in caplog.records]:
        assert KEY[:12] not in text and KEY[-9:] not in text
    assert error.value.__cause__ is None and error.value.__context__ is None


@pytest.mark.parametrize("name", ["sk-abcdefgh", "hf_aBcDeFgHiJkLmNoPqR5tUvWx", "a b", "1A", "$K"])
def test_a_key_in_the_place_of_its_name_is_not_repeated(name):
    with pytest.raises(UserError, match=r"config\.teacher\.api_key_env must be the name") as error:
        made("http://127.0.0.1", name)
    assert name not in everything_about(error.value)


@pytest.mark.parametrize(
    "value, message",
    [
        *((v, "TEACHER_KEY holds") for v in ("canary\n", "can\r\nary", "can ary", "cänary", " ")),
        ("canary\x7f", "TEACHER_KEY holds"),
        ("", "'TEACHER_KEY'.* is not set"),
    ],
)
def test_what_no_key_can_be_is_refused_and_not_repeated(monkeypatch, value, message):
    monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(UserError, match=message) as error:
        made("http://127.0.0.1")
    assert "ary" not in everything_about(error.value)


@pytest.mark.parametrize(
    "base, warns",
    [
        ("http://10.1.2.3:8000/v1", True),
        ("HTTP://teacher.example", True),
        ("http://127.0.0.1.example", True),
        ("http://127.9.9.9", False),
        ("http://[::1]:8000", False),
        ("http://localhost:8000", False),
        ("https://teacher.example", False),
    ],
)
def test_a_key_over_plain_http_to_elsewhere_is_warned_of_once(caplog, base, warns):
    made(base, "")
    made(base)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warns


@pytest.mark.parametrize(
    "base",
    [
        *("", "127.0.0.1:8000", "localhost:8000/v1", "ftp://host/v1", "file:///etc", "http://"),
        *("http://host:port", "http://host:99999", "http:///v1", "http://ho st", "http://a\nb"),
        *("http://a\\b", "http://.", "http://[::1"),
        *("http://me:pw@host/v1", "http://h/v1?key=pw", "http://h/#pw"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secret(base):
    message = "must not" if "pw" in base else "must look like http://host:8000/v1"
    with pytest.raises(UserError, match=rf"config\.teacher\.api_base.*{message}") as error:
        made(base)
    assert "pw" not in str(error.value)


def test_a_certificate_has_to_be_known(connect, tmp_path, monkeypatch):
    """openssl makes a certificate of 127.0.0.1 that nobody signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, file = tmp_path / "key.pem", tmp_path / "certificate.pem"
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    command = f"openssl req -x509 {curve} {names} -keyout {key} -out {file}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))
    transport, server = connect(GOOD, tls=context)
    with pytest.raises(TeacherRefused, match="certificate does not hold: self-signed"):
        transport.get("/v1/models")
    assert not server.requests
    assert connect(GOOD, tls=context, trust_env=True)[0].get("/v1/models") == {"fine": True}
    late = Reply({}, drip_headers_s=0.05)
    with pytest.raises(TeacherUnreachable, match=r"no whole answer within 0\.5 s"):
        connect(late, tls=context, trust_env=True, limits=HURRIED)[0].get("/v1/models")
