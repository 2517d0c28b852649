"""Where requests and the key in them go, and where they do not."""

import logging
import shutil
import ssl
import subprocess
import traceback

import pytest
from fake_server import FakeServer, Reply, script

from gkdjax.teachers.server.transport import client
from gkdjax.teachers.server.transport.client import Limits, Transport
from gkdjax.utils.errors import GkdjaxError, TeacherRefused, TeacherUnreachable, UserError

KEY = "sk-canary-0123456789abcdef"
LIMITS = Limits(timeout_s=10.0, deadline_s=100.0, max_retries=1)
HURRIED = Limits(timeout_s=0.5, deadline_s=100.0, max_retries=1)
GOOD = Reply({"fine": True})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(client, "pause", lambda closed, seconds: None)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def connect(request):
    def to(base, key_env="TEACHER_KEY", limits=LIMITS, *, trust_env=False) -> Transport:
        transport = Transport(base, key_env, limits, trust_env=trust_env)
        request.addfinalizer(transport.close)
        return transport

    return to


def everything_about(error: BaseException) -> str:
    """Its traceback and those of all errors that hang on it, shown or not."""
    found, todo = [], [error]
    while todo:
        error = todo.pop()
        found += [*traceback.format_exception(error), repr(error), repr(vars(error))]
        todo += [e for e in (error.__cause__, error.__context__) if e is not None]
    return "".join(found)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_target_hears_nothing(connect, status):
    with FakeServer(script(GOOD)) as target:
        location = {"Location": target.base.replace("//", "//me:pw@") + "/v1/other?token=secret#a"}
        with FakeServer(script(Reply(status=status, headers=location))) as server:
            with pytest.raises(TeacherRefused) as told:
                connect(server.base).post("/v1/x", {}, max_bytes=99)
            assert len(server.requests) == 1
        assert not target.requests
    assert f"{target.base}/v1/other, and" in str(told.value)
    assert "config.teacher.api_base" in str(told.value)
    assert "secret" not in str(told.value) and "pw" not in str(told.value)


@pytest.mark.parametrize("headers", [{}, {"Location": "http://[bad"}])
def test_a_redirect_to_nowhere_is_refused_too(connect, headers):
    nowhere = FakeServer(script(Reply(status=302, headers=headers)))
    with nowhere as server, pytest.raises(TeacherRefused, match="is redirected to"):
        connect(server.base).get("/v1/models")


def test_a_proxy_is_used_only_if_the_environment_is_trusted(connect, monkeypatch):
    with FakeServer(script(GOOD)) as server, FakeServer(script(Reply(["proxied"]))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.base)
        monkeypatch.setenv("http_proxy", proxy.base)
        assert connect(server.base).get("/v1/models") == {"fine": True}
        assert not proxy.requests
        assert connect(server.base, trust_env=True).get("/v1/models") == ["proxied"]
        assert len(server.requests) == 1
        assert proxy.requests[0].path == f"{server.base}/v1/models"


def test_netrc_replaces_no_key(connect, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with FakeServer(script(GOOD)) as server:
        for trust_env in (False, True):
            connect(server.base, trust_env=trust_env).get("/v1/models")
        connect(server.base, "").get("/v1/models")
        sent = [request.headers["Authorization"] for request in server.requests]
    assert sent == [f"Bearer {KEY}", f"Bearer {KEY}", None]


def test_cookies_are_not_kept(connect):
    with FakeServer(script(Reply({}, headers={"Set-Cookie": "a=b"}))) as server:
        transport = connect(server.base)
        for _ in range(2):
            transport.get("/v1/models")
        assert server.requests[1].headers["Cookie"] is None


ECHO = f"your key {KEY}, or {KEY[:12]}..., or ...{KEY[-9:]}, is wrong"


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
        Reply({}, headers={"Content-Length": KEY, "Transfer-Encoding": "chunked"}, cut=1),
        Reply(KEY.encode(), headers={"Transfer-Encoding": "chunked"}, cut=99),
        Reply(silent=True, reset=True),
        Reply(cut=0, reset=True),
        Reply(delay_s=30.0),
    ],
)
def test_the_key_is_in_no_error_and_no_log(connect, caplog, reply):
    caplog.set_level(logging.DEBUG)
    with FakeServer(script(reply)) as server:
        transport = connect(server.base, limits=HURRIED)
        with pytest.raises(GkdjaxError) as told:
            transport.post("/v1/x", {}, max_bytes=999)
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    texts = [everything_about(told.value), repr(transport), str(transport), caplog.text]
    texts += [repr(vars(record)) for record in caplog.records]
    for text in texts:
        assert KEY[:12] not in text and KEY[-9:] not in text
    assert told.value.__cause__ is None and told.value.__context__ is None


def test_the_key_is_in_no_error_if_nobody_is_there(connect, caplog):
    with FakeServer(script(GOOD)) as server:
        transport = connect(server.base)
    with pytest.raises(TeacherUnreachable, match="Connection refused") as told:
        transport.get("/v1/models")
    assert KEY[:12] not in everything_about(told.value) + caplog.text


@pytest.mark.parametrize("name", ["sk-abcdefgh", "hf_aBcDeFgHiJkLmNoPqR5tUvWx", "a b", "1A", "$K"])
def test_a_key_in_the_place_of_its_name_is_not_repeated(connect, name):
    with pytest.raises(UserError, match=r"config\.teacher\.api_key_env must be the name") as told:
        connect("http://127.0.0.1", name)
    assert name not in everything_about(told.value)


@pytest.mark.parametrize(
    "value", ["canary\n", "can\r\nary", "can ary", "cänary", "canary\x7f", " "]
)
def test_what_no_key_can_be_is_refused_and_not_repeated(connect, monkeypatch, value):
    monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(UserError, match="the environment variable TEACHER_KEY holds") as told:
        connect("http://127.0.0.1")
    assert "ary" not in everything_about(told.value)


def test_a_missing_key_is_named(connect, monkeypatch):
    monkeypatch.setenv("EMPTY_KEY", "")
    for name in ("EMPTY_KEY", "NO_SUCH_KEY"):
        with pytest.raises(UserError, match=f"{name}.* is not set"):
            connect("http://127.0.0.1", name)


@pytest.mark.parametrize(
    ("base", "warns"),
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
def test_a_key_over_plain_http_to_elsewhere_is_warned_of_once(connect, caplog, base, warns):
    connect(base)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warns
    caplog.clear()
    connect(base, "")
    assert not caplog.records


@pytest.mark.parametrize(
    "base",
    [
        *("", "127.0.0.1:8000", "localhost:8000/v1", "ftp://host/v1", "file:///etc", "http://"),
        *("http://host:port", "http://host:99999", "http:///v1", "http://ho st", "http://a\nb"),
        *("http://a\\b", "http://.", "http://[::1"),
    ],
)
def test_what_is_no_address_is_refused(connect, base):
    with pytest.raises(UserError, match=r"config\.teacher\.api_base.*http://host:8000/v1"):
        connect(base)


@pytest.mark.parametrize("base", ["http://me:pw@host/v1", "http://h/v1?key=pw", "http://h/#pw"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(connect, base):
    with pytest.raises(UserError, match=r"config\.teacher\.api_base must not") as told:
        connect(base)
    assert "pw" not in str(told.value)


@pytest.fixture
def certificate(tmp_path):
    """Of 127.0.0.1, signed by nobody; its key is in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    file = tmp_path / "certificate.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-keyout", str(tmp_path / "key.pem"), "-out", str(file)]
    command = ["openssl", "req", "-x509", *curve, *names, *out]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text((tmp_path / "key.pem").read_text() + file.read_text())
    return file


def test_a_certificate_has_to_be_known(connect, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    late = Reply({}, drip_headers_s=0.05)
    with FakeServer(script(GOOD, late), tls=context) as server:
        with pytest.raises(TeacherRefused, match="certificate does not hold: self-signed"):
            connect(server.base).get("/v1/models")
        assert not server.requests
        assert connect(server.base, trust_env=True).get("/v1/models") == {"fine": True}
        with pytest.raises(TeacherUnreachable, match=r"no whole answer within 0\.5 s"):
            connect(server.base, limits=HURRIED, trust_env=True).get("/v1/models")
