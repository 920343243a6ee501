"""Tests of the two services from outside: real processes, real sockets, ports that the system gives.

    python -m pytest

Every wait is bounded, and whatever was started is stopped. The services are asked in raw HTTP.
"""
import collections
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WAIT = 15  # seconds after which a test gives up
BOOKS = {
    "1001": b'{"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}\n',
    "1002": b'{"data":{"name":"Xen and the Art of Surviving Graduate School","price":9.99,"quantity":5}}\n',
}
PATHS = {"catalog": "/query/1001", "front_end": "/lookup/1001"}

needs_signals = pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM and no Ctrl-C for one process")
try:  # a crowd of clients needs more open files than some shells allow
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most))
    crowd_fits = True
except (ImportError, OSError, ValueError):
    crowd_fits = False
needs_crowd = pytest.mark.skipif(not crowd_fits, reason="a process may not open 4096 files here")


# ---- Tools: processes ----


def wait_until(true, problem):
    """Wait until true() holds; fail with problem() after WAIT seconds."""
    end = time.monotonic() + WAIT
    while not true():
        if time.monotonic() > end:
            pytest.fail(problem())
        time.sleep(0.01)


class Service:
    """A script as a process, started with PORT=0 unless settings say otherwise (None: not set at all)."""

    def __init__(self, script, wrapper=(), arguments=(), **settings):
        env = {name: value for name, value in os.environ.items() if name not in ("PORT", "CATALOG_ADDRESS")}
        env.update({name: value for name, value in {"PORT": "0", **settings}.items() if value is not None})
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, str(HERE / script), *arguments],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=lambda: [self.lines.append(line) for line in self.process.stderr])
        self.reader.start()

    @property
    def log(self):
        return "".join(self.lines)

    def logged(self, text, times=1):
        """Wait until text stands in the log that many times; return the log."""
        wait_until(lambda: self.log.count(text) >= times, lambda: f"no {text!r} x {times} in the log:\n{self.log}")
        return self.log

    @property
    def port(self):
        return int(re.search(r"listening on port (\d+)", self.logged(", try /"))[1])

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def end(self, within=WAIT):
        """Wait until the process has ended by itself; return its status."""
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {within} s; its log:\n{self.log}")
        self.reader.join(WAIT)
        return self.process.returncode

    def stop(self):
        """Make sure that the process has ended."""
        try:
            self.process.terminate()
            self.process.wait(WAIT)
        finally:
            self.process.kill()
            self.process.wait()
        self.reader.join(WAIT)
        self.process.stdout.close()
        self.process.stderr.close()


@contextlib.contextmanager
def stopping():
    """Give a function that starts a service; stop all that it started at the end."""
    services = []

    def start(*args, **settings):
        services.append(Service(*args, **settings))
        return services[-1]

    try:
        yield start
    finally:
        for service in services:
            service.process.terminate()  # all at once, for speed
        for service in services:
            service.stop()


@pytest.fixture
def start():
    with stopping() as start:
        yield start


@pytest.fixture(scope="module")
def pair():
    """A catalog and a front end that asks it, for tests that change neither; by name."""
    with stopping() as start:
        catalog = start("catalog.py")
        yield {"catalog": catalog, "front_end": start("front_end.py", CATALOG_ADDRESS=catalog.address)}


@pytest.fixture(params=["catalog", "front_end"])
def service(request, pair):
    """Each of the two in turn, with .path set to the path of an item."""
    service = pair[request.param]
    service.path = PATHS[request.param]
    return service


# ---- Tools: HTTP ----

Reply = collections.namedtuple("Reply", "status headers body")


def connect(port, host="127.0.0.1"):
    return socket.create_connection((host, port), timeout=WAIT)


def read_all(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


def parse(data):
    """Return a complete HTTP answer as a Reply."""
    head, blank, body = data.partition(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").split("\r\n")
    assert blank and re.fullmatch(r"HTTP/1\.0 \d{3} [ -~]*", status), f"not a complete answer: {data[:300]}"
    return Reply(int(status.split()[1]), dict(line.split(": ", 1) for line in headers), body)


def send(port, request, host="127.0.0.1"):
    """Send the bytes of a request; return the Reply."""
    with connect(port, host) as connection:
        connection.sendall(request)
        return parse(read_all(connection))


def ask(port, path, method="GET", host="127.0.0.1"):
    return send(port, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"), host)


def error(reply, status):
    """Check that a reply is an error as both services write it; return its message."""
    assert reply.status == status, reply
    assert reply.headers["Content-Type"] == "application/json"
    assert int(reply.headers["Content-Length"]) == len(reply.body) and reply.body.endswith(b"}\n")
    content = json.loads(reply.body)
    assert content == {"error": {"code": status, "message": content["error"]["message"]}}
    return content["error"]["message"]


class Upstream:
    """A stand-in for the catalog that does what behave(connection) does, after it has read a request."""

    def __init__(self, behave):
        self.behave, self.asked, self.open = behave, [], []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                connection = self.listener.accept()[0]
                self.open.append(connection)
                threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            self.asked.append(connection.recv(65536).decode("latin-1"))
            self.behave(connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # else accept() would go on
        self.listener.close()
        for connection in self.open:
            connection.close()


def says(*pieces):
    """A behaviour for Upstream: send these bytes, then hang up."""
    return lambda connection: [connection.sendall(piece) for piece in pieces]


def silent_after(*pieces):
    """A behaviour for Upstream: send these bytes, then nothing for longer than anybody waits."""
    return lambda connection: (says(*pieces)(connection), connection.settimeout(WAIT), connection.recv(1))


# ---- What they answer ----


@pytest.mark.parametrize("item_id, size", [("1001", 65), ("1002", 91)])
def test_catalog_answers_with_the_item_as_json(pair, item_id, size):
    reply = ask(pair["catalog"].port, f"/query/{item_id}")
    assert (reply.status, reply.body) == (200, BOOKS[item_id])
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["Content-Length"] == str(len(reply.body)) == str(size)


@pytest.mark.parametrize("item_id", [*BOOKS, "1003"])
def test_front_end_answers_as_the_catalog_itself_does(pair, item_id):
    direct = ask(pair["catalog"].port, f"/query/{item_id}")
    relayed = ask(pair["front_end"].port, f"/lookup/{item_id}")
    direct.headers.pop("Date"), relayed.headers.pop("Date")
    assert relayed == direct
    assert relayed.body == BOOKS.get(item_id, direct.body)


def test_front_end_relays_any_status_type_and_body_to_the_byte_and_follows_no_redirect(start):
    body = b"\n " + bytes(range(256)) + b" \n"
    with Upstream(None) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for status in (200, 302, 404, 500, 503):
            head = f"HTTP/1.1 {status} Any\r\nContent-Type: a/b; c=d\r\nLocation: http://{upstream.address}/x\r\n\r\n"
            upstream.behave = says(head.encode() + body)
            reply = ask(front_end.port, "/lookup/1001")
            assert (reply.status, reply.headers["Content-Type"], reply.body) == (status, "a/b; c=d", body)
            assert reply.headers["Location"] == f"http://{upstream.address}/x"
        assert len(upstream.asked) == 5


def test_front_end_asks_anew_for_each_lookup(start):
    with Upstream(lambda connection: says(b"HTTP/1.0 200 OK\r\n\r\n%d" % len(upstream.asked))(connection)) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        assert [ask(front_end.port, "/lookup/1001").body for _ in range(3)] == [b"1", b"2", b"3"]


@pytest.mark.parametrize("path", [None, "/", "/no/such/path"])
def test_head_is_answered_with_the_same_head_and_no_body(service, path):
    get, head = ask(service.port, path or service.path), ask(service.port, path or service.path, "HEAD")
    get.headers.pop("Date"), head.headers.pop("Date")
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")


def test_a_query_string_is_ignored(service):
    assert ask(service.port, f"{service.path}?x=1&/y?z").body == BOOKS["1001"]


def test_an_unknown_item_is_404_with_its_name(service):
    message = error(ask(service.port, service.path.replace("1001", "1003")), 404)
    assert message == "no such item: 1003; try GET /query/1001"


@pytest.mark.parametrize(
    "path", ["/", "{0}", "{0}/", "{0}/1001/more", "{1}/1001", "{0}//1001", "*", "http://x{0}/1001", "/1001"]
)
def test_any_other_path_is_404_and_shows_the_path_that_works(service, path):
    base = service.path.rpartition("/")[0]
    message = error(ask(service.port, path.format(base, base.upper())), 404)
    assert f"try GET {service.path}" in message


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_known_method_other_than_get_and_head_is_405(service, method):
    reply = ask(service.port, service.path, method)
    assert error(reply, 405) and reply.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "status, request_line",
    [
        (400, b"garbage\r\n\r\n"),
        (400, b"GET / HTTP/x\r\n\r\n"),
        (400, b"GET /a b HTTP/1.0\r\n\r\n"),
        (400, b'"<script>\xff\x00 \r\n\r\n'),
        (414, b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n"),
        (431, b"GET / HTTP/1.0\r\n" + b"Name: value\r\n" * 300 + b"\r\n"),
        (431, b"GET / HTTP/1.0\r\nName: " + b"a" * 70_000 + b"\r\n\r\n"),
        (501, b'B"REW / HTTP/1.0\r\n\r\n'),
        (505, b"GET / HTTP/2.0\r\n\r\n"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_malformed_request_is_answered_with_its_status_in_full(service, status, request_line):
    assert f"try GET {service.path}" in error(send(service.port, request_line), status) or status == 431


def test_an_error_is_json_whatever_bytes_the_client_sent(service):
    for byte in range(256):
        reply = send(service.port, b"GET /%c HTTP/1.0\r\n\r\n" % byte)
        assert reply.status in (400, 404) and error(reply, reply.status)


# ---- When the catalog fails the front end ----


def test_a_catalog_that_refuses_is_502_in_the_systems_words(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:%d" % listener.getsockname()[1]
    front_end = start("front_end.py", CATALOG_ADDRESS=address)
    message = error(ask(front_end.port, "/lookup/1001"), 502)
    assert f"the catalog at {address}: " in message and "CATALOG_ADDRESS" in message
    if os.name == "posix":
        assert f"{address}: Connection refused; " in message
    assert f"no answer from the catalog at {address}" in front_end.logged("refused")


def test_a_catalog_that_is_unreachable_is_502(start):
    address = "255.255.255.255:80"  # which the system refuses to connect to, without asking the network
    message = error(ask(start("front_end.py", CATALOG_ADDRESS=address).port, "/lookup/1001"), 502)
    assert message.startswith(f"no answer from the catalog at {address}: ") and "CATALOG_ADDRESS" in message


def test_a_catalog_whose_name_is_unknown_is_502(start):
    for address in ("no-such-host.invalid:8080", "a..b", "x" * 64 + ":80"):
        message = error(ask(start("front_end.py", CATALOG_ADDRESS=address).port, "/lookup/1001"), 502)
        assert message.startswith(f"no answer from the catalog at {address}: ") and "CATALOG_ADDRESS" in message


def test_a_catalog_that_hangs_up_or_speaks_garbage_or_cuts_its_body_short_is_502(start):
    start_of_answer = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n"
    answers = {
        b"": "RemoteDisconnected",
        b"SSH-2.0-OpenSSH_9.2\r\n": "SSH-2.0",
        b"\x00\xff\r\n\r\n\r\n": "BadStatusLine",
        b"HTTP/2 200\r\n\r\n": "HTTP/2",
        b"HTTP/1.0 200 OK\r\n" + b"Name: value\r\n" * 300 + b"\r\n": "100 headers",
        start_of_answer % 65 + BOOKS["1001"][:60]: "60 bytes read, 5 more expected",
        start_of_answer % 10**20 + b"x": "",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n": "",
    }
    with Upstream(None) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for answer, reason in answers.items():
            upstream.behave = says(answer)
            message = error(ask(front_end.port, "/lookup/1001"), 502)
            assert upstream.address in message and reason in message and "CATALOG_ADDRESS" in message
    assert "Traceback" not in front_end.logged("no answer from the catalog", times=len(answers))


def test_a_catalog_that_is_silent_before_or_within_its_answer_is_504_after_5_seconds(start):
    begun = time.monotonic()

    def lookup(*pieces):
        with Upstream(silent_after(*pieces)) as upstream:
            front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
            message = error(ask(front_end.port, "/lookup/1001"), 504)
            assert f"{upstream.address}: silent for 5 seconds" in message and "CATALOG_ADDRESS" in message
            front_end.logged("silent for 5 seconds")

    with ThreadPoolExecutor() as threads:
        head = b"HTTP/1.0 200 OK\r\nContent-Length: 65\r\n\r\n"
        list(threads.map(lambda pieces: lookup(*pieces), [[b""], [head[:20]], [head], [head, b"{"]]))
    assert 4.9 < time.monotonic() - begun < 7


def test_front_end_serves_again_once_the_catalog_is_back(start):
    catalog = start("catalog.py")
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    assert ask(front_end.port, "/lookup/1001").status == 200
    catalog.stop()
    assert ask(front_end.port, "/lookup/1001").status == 502
    start("catalog.py", PORT=str(catalog.port)).logged(", try /")
    assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]


def test_proxy_variables_play_no_part(start, pair):
    with Upstream(says(b"HTTP/1.0 200 OK\r\n\r\nthe proxy")) as proxy:
        names = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
        settings = {name: f"http://{proxy.address}" for name in names} | {"CATALOG_ADDRESS": pair["catalog"].address}
        assert ask(start("front_end.py", **settings).port, "/lookup/1001").body == BOOKS["1001"]
        assert proxy.asked == []


def test_the_catalog_is_asked_for_one_item_or_nothing_whatever_the_client_sends(start):
    odd = ["..", ".", "%2e%2e", "%2f..", "..%2f..", "../x", "%0d%0aX:%20y", "a%20b", "@host", "@host:1/x", "%", "%zz",
           "%00", "%ff", "\xe9", "\x01", "\x7f", "#x", ";x", "a:b", "\\", "%5c..", "1001%3fx", "//x", "[::1]", "&", "+"]
    paths = [f"/lookup/{item}" for item in odd]
    paths += ["http://127.0.0.1:1/lookup/1001", "//127.0.0.1:1/lookup/1001", "@host/lookup/1001", "lookup/1001"]
    with Upstream(says(b"HTTP/1.0 200 OK\r\n\r\n")) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        answers = [ask(front_end.port, path).status for path in paths]
        assert set(answers) == {200, 404} and answers.count(200) == len(upstream.asked)
        for request in upstream.asked:
            item = re.match(r"GET /query/([!-.0->@-~]+) HTTP/1\.1\r\n", request)
            assert item and item[1] not in (".", "..") and f"\r\nHost: {upstream.address}\r\n" in request, request
        assert "Traceback" not in front_end.log


def test_an_item_id_reaches_the_catalog_as_the_client_wrote_it(start, tmp_path):
    name = "C\N{LATIN SMALL LETTER E WITH ACUTE}line & co / 100%?"
    text = (HERE / "catalog.py").read_text(encoding="utf-8").replace('"1001":', f"{name!r}:")
    (tmp_path / "catalog.py").write_text(text, encoding="utf-8")
    front_end = start("front_end.py", CATALOG_ADDRESS=start(tmp_path / "catalog.py").address)
    assert ask(front_end.port, "/lookup/C%C3%A9line%20%26%20co%20%2F%20100%25%3F").body == BOOKS["1001"]


# ---- As a process: start, settings, log ----


@pytest.mark.parametrize("script", ["catalog.py", "front_end.py"])
def test_from_start_to_first_answer_takes_less_than_0_3_seconds(start, script):
    def seconds():
        begun = time.monotonic()
        assert ask(start(script).port, "/").status == 404
        return time.monotonic() - begun

    assert min(seconds() for _ in range(5)) < 0.3


def test_the_start_line_names_port_path_and_catalog(start):
    catalog = start("catalog.py")
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    assert catalog.logged("\n") == f"catalog: listening on port {catalog.port}, try /query/1001\n"
    expected = f"front_end: listening on port {front_end.port}, try /lookup/1001 (catalog at {catalog.address})\n"
    assert front_end.logged("\n") == expected


@pytest.mark.parametrize("script", ["catalog.py", "front_end.py"])
def test_an_argument_prints_the_docstring_and_ends(start, script):
    expected = {("-h",): 0, ("--help",): 0, ("9000",): 2, ("--port", "9000"): 2, ("-h", "9000"): 2}
    bad = {"PORT": "not a port", "CATALOG_ADDRESS": "not an address"}  # help comes first
    services = {arguments: start(script, arguments=arguments, **bad) for arguments in expected}
    assert {arguments: service.end() for arguments, service in services.items()} == expected
    for service in services.values():
        assert "from the environment:\n    PORT " in service.process.stdout.read() and service.log == ""


@pytest.mark.parametrize("script", ["catalog.py", "front_end.py"])
def test_a_bad_port_ends_it_with_one_line(start, script):
    for service in [start(script, PORT=port) for port in ("eighty", "", "-1", "65536", "9" * 20, "80.5")]:
        assert service.end() == 1
        assert len(service.lines) == 1 and ": can't listen on PORT=" in service.log and "set PORT" in service.log


def test_a_port_in_use_ends_it_with_one_line(start, service):
    second = start("catalog.py", PORT=str(service.port))
    assert second.end() == 1
    assert len(second.lines) == 1 and f"PORT={service.port}: " in second.log and "in use" in second.log


def test_a_port_that_is_not_permitted_ends_it_with_one_line(start):
    bind = [sys.executable, "-c", "import socket; socket.create_server(('', 81))"]
    for wrapper in ([], ["setpriv", "--bounding-set=-net_bind_service"]):  # the second takes the right from root
        with contextlib.suppress(FileNotFoundError):
            if "PermissionError" in subprocess.run([*wrapper, *bind], capture_output=True, text=True).stderr:
                break
    else:
        pytest.skip("everybody may listen on port 81 here")
    service = start("catalog.py", wrapper=wrapper, PORT="81")
    assert service.end() == 1
    assert service.log == "catalog: can't listen on PORT=81: Permission denied; set PORT to another number\n"


def test_a_bad_catalog_address_ends_it_with_one_line(start):
    bad = ["http://catalog", "catalog/x", "a b", " catalog", "user@catalog", "", ":80", "catalog:", "catalog:0",
           "catalog:65536", "catalog:http", "::1", "fe80::1:80", "[::1", "[catalog]:80", "catalog?x", "catalog\n",
           "cat\xe1logo"]
    for address, service in [(address, start("front_end.py", CATALOG_ADDRESS=address)) for address in bad]:
        assert service.end() == 1
        expected = f"front_end: bad CATALOG_ADDRESS {address!r}; set it to host, host:port or [IPv6]:port\n"
        assert service.log == expected


def test_a_good_catalog_address_is_taken(start):
    good = ["catalog", "my_catalog-1.example:80", "10.0.2.15:8080", "[::1]", "[fe80::1]:8080"]
    for address, service in [(address, start("front_end.py", CATALOG_ADDRESS=address)) for address in good]:
        assert service.logged(f" (catalog at {address})\n")


def test_the_catalog_may_have_an_ipv6_address(start):
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listener:
        listener.settimeout(WAIT)
        front_end = start("front_end.py", CATALOG_ADDRESS="[::1]:%d" % listener.getsockname()[1])
        with connect(front_end.port) as client:
            client.sendall(b"GET /lookup/1001 HTTP/1.0\r\n\r\n")
            with listener.accept()[0] as connection:
                assert connection.recv(65536).startswith(b"GET /query/1001 ")


def test_without_settings_they_listen_on_8080_and_8000_and_find_each_other(start):
    try:
        for port in (8080, 8000):
            socket.create_server(("", port)).close()
    except OSError as error:
        pytest.skip(f"port {port}: {error.strerror}")
    catalog, front_end = start("catalog.py", PORT=None), start("front_end.py", PORT=None)
    assert (catalog.port, front_end.port) == (8080, 8000)
    assert ask(8000, "/lookup/1001").body == BOOKS["1001"]
    catalog.logged('"GET /query/1001 HTTP/1.1" 200')


def test_the_log_has_one_line_for_a_request_with_the_clients_address(start):
    catalog = start("catalog.py")
    for path in ("/query/1001", "/query/1003"):
        ask(catalog.port, path)
    lines = catalog.logged("404").splitlines()[1:]
    assert [re.sub(r"\[.*?\]", "[]", line) for line in lines] == [
        '127.0.0.1 - - [] "GET /query/1001 HTTP/1.1" 200 -',
        '127.0.0.1 - - [] "GET /query/1003 HTTP/1.1" 404 -',
    ]


def test_a_bug_in_an_edit_shows_its_traceback_and_the_service_goes_on(start, tmp_path):
    text = (HERE / "catalog.py").read_text(encoding="utf-8")
    (tmp_path / "catalog.py").write_text(text.replace("not in ITEMS:", "not in TIEMS:"), encoding="utf-8")
    catalog = start(tmp_path / "catalog.py")
    with connect(catalog.port) as client:
        client.sendall(b"GET /query/1001 HTTP/1.0\r\n\r\n")
        assert read_all(client) == b""
    assert "Traceback" in catalog.logged("NameError: name 'TIEMS'")
    assert ask(catalog.port, "/").status == 404


# ---- As a process: load and abuse ----


def hang_up(connection):
    """Close so that the other side gets a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@needs_signals
def test_a_client_that_hangs_up_costs_at_most_one_line(start):
    long_answer = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 10_000_000
    with Upstream(lambda connection: (time.sleep(0.2), connection.sendall(long_answer))) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for request in (b"", b"GET", b"GET /lookup/1001 HTTP/1.0\r\nName", b"GET /lookup/1001 HTTP/1.0\r\n\r\n"):
            client = connect(front_end.port)
            client.sendall(request)
            hang_up(client)
        front_end.logged('"GET /lookup/1001 HTTP/1.0" 200')
        front_end.process.send_signal(signal.SIGTERM)
        assert front_end.end() == 0 and len(front_end.lines) <= 5 and "Traceback" not in front_end.log


@needs_crowd
@needs_signals
def test_500_clients_at_the_same_instant_are_all_answered(pair):
    front_end = pair["front_end"]
    gate = threading.Barrier(500)

    def lookup(_):
        gate.wait(WAIT)
        return ask(front_end.port, "/lookup/1001").body

    with ThreadPoolExecutor(500) as clients:
        assert set(clients.map(lookup, range(500))) == {BOOKS["1001"]}


@needs_crowd
@needs_signals
def test_400_clients_that_never_finish_slow_nobody_and_are_let_go_after_5_seconds(start, pair):
    front_end = start("front_end.py", CATALOG_ADDRESS=pair["catalog"].address)
    begun = time.monotonic()
    silent = [connect(front_end.port) for _ in range(200)]
    slow = [connect(front_end.port) for _ in range(200)]
    for client in silent[:100]:
        client.sendall(b"GET /lookup/1001 HTTP/1.0\r\nName: ")
    slowest = 0
    while time.monotonic() < begun + 4:  # one byte now and then keeps no connection
        for client in slow:
            client.sendall(b"G")
        before = time.monotonic()
        assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]
        slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.5)
    assert slowest < 3
    for client in silent:
        assert read_all(client) == b""
    assert 4.9 < time.monotonic() - begun < 7
    for client in slow:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"G")
            assert read_all(client) == b""
    assert time.monotonic() - begun < 8
    for client in silent + slow:
        client.close()
    front_end.process.terminate()
    assert front_end.end() == 0
    lines = [line for line in front_end.lines if "Request timed out" in line]
    assert len(lines) == 400 and "Traceback" not in front_end.log


# ---- As a process: stop ----


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["catalog.py", "front_end.py"])
def test_an_idle_service_stops_at_once_with_status_0(start, script, number):
    service = start(script)
    service.logged(", try /")
    begun = time.monotonic()
    service.process.send_signal(number)
    assert service.end() == 0 and time.monotonic() - begun < 1
    assert len(service.lines) == 1


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_is_in_flight_and_takes_nothing_new(start, number):
    release = threading.Event()
    behave = lambda connection: (release.wait(WAIT), says(b"HTTP/1.0 200 OK\r\n\r\n" + BOOKS["1001"])(connection))
    with Upstream(behave) as upstream, ThreadPoolExecutor(20) as clients:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        port = front_end.port
        lookups = [clients.submit(ask, port, "/lookup/1001") for _ in range(20)]
        wait_until(lambda: len(upstream.asked) == 20, lambda: front_end.log)
        front_end.process.send_signal(number)

        def refuses():
            try:
                connect(port).close()
            except ConnectionError:
                return True

        wait_until(refuses, lambda: "still takes connections")
        front_end.process.send_signal(number)  # the impatient second Ctrl-C
        release.set()
        assert {lookup.result(WAIT).body for lookup in lookups} == {BOOKS["1001"]}
        assert front_end.end() == 0 and "Traceback" not in front_end.log


@needs_crowd
@needs_signals
def test_a_stop_still_serves_those_who_wait_in_line(start):
    catalog = start("catalog.py")
    clients = [connect(catalog.port) for _ in range(300)]
    for client in clients:
        client.sendall(b"GET /query/1001 HTTP/1.0\r\n\r\n")
    catalog.process.terminate()
    assert {parse(read_all(client)).body for client in clients} == {BOOKS["1001"]}
    for client in clients:
        client.close()
    assert catalog.end() == 0


@needs_signals
def test_a_stop_waits_5_seconds_at_most_for_silent_clients(start):
    catalog = start("catalog.py")
    with connect(catalog.port), connect(catalog.port) as client:
        client.sendall(b"GET /query/1001 HTTP")
        ask(catalog.port, "/query/1001")  # the two before have been accepted by now
        begun = time.monotonic()
        catalog.process.terminate()
        assert catalog.end() == 0 and time.monotonic() - begun < 5.5


# ---- In containers: the steps of the README, on a real engine ----

BASE = "python:3.14-alpine"
MARK = f"test-{os.getpid()}"  # in the name or label of all that these tests make


def docker(*arguments, status=0):
    """Run a docker command; return what it printed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, cwd=HERE, timeout=300)
    assert done.returncode == status, f"docker {' '.join(arguments)}: status {done.returncode}\n{done.stderr}"
    return done.stdout.strip() if status == 0 else done.stderr


class Container:
    """A container in the background, started by `docker run` with these arguments."""

    def __init__(self, *arguments):
        self.id = docker("run", "--detach", "--label", MARK, *arguments)

    @property
    def log(self):
        return subprocess.run(["docker", "logs", self.id], capture_output=True, text=True).stderr

    def logged(self, text):
        """Wait until text stands in the log; return the log."""
        wait_until(lambda: text in self.log, lambda: f"no {text!r} in the log:\n{self.log}")
        return self.log

    @property
    def ip(self):
        return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", self.id)

    @property
    def host_port(self):
        return int(docker("port", self.id, "80").split()[0].rpartition(":")[2])


@pytest.fixture(scope="module")
def images():
    """The two images, built as the README does, but under tags of the test's own; by name."""

    def problem(*arguments):
        try:
            done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300)
            return done.returncode and done.stderr.strip()
        except OSError as error:
            return error

    if reason := problem("version"):
        pytest.skip(f"no Docker engine answers: {reason}")
    if problem("image", "inspect", BASE) and (reason := problem("pull", BASE)):
        pytest.skip(f"no base image: {reason}")
    tags = {name: f"{name}-{MARK}" for name in PATHS}
    try:
        for name, tag in tags.items():
            docker("build", ".", "-f", f"Dockerfile.{name}", "-t", tag)
        yield tags
    finally:
        subprocess.run(["docker", "rmi", "--force", *tags.values()], capture_output=True)


@pytest.fixture
def run(images):
    """A function that starts a container of image "catalog" or "front_end" and waits until it listens."""

    def run(name, *arguments):
        container = Container(*arguments, images[name])
        container.logged(", try /")
        return container

    yield run
    if left := docker("ps", "--all", "--quiet", "--filter", f"label={MARK}").split():
        docker("rm", "--force", *left)


@pytest.fixture
def network(images):
    """The name of a new network; ask for it before run, so that it goes after the containers have gone."""
    docker("network", "create", MARK)
    yield MARK
    docker("network", "rm", MARK)


@pytest.fixture
def host_reaches_containers(images):
    if sys.platform != "linux" or "Desktop" in docker("info", "-f", "{{.OperatingSystem}}"):
        pytest.skip("Docker Desktop: containers are in a virtual machine, out of the host's reach")


def ask_inside(front_end):
    """Ask for a lookup from within the container, which works on any network and any kind of Docker."""
    return docker("exec", front_end.id, "wget", "-qO-", "127.0.0.1/lookup/1001").encode() + b"\n"


@pytest.mark.parametrize("name", PATHS)
def test_an_image_is_small_not_root_and_holds_only_its_script(images, name):
    image = images[name]
    assert docker("run", "--rm", image, "id", "-u") not in ("", "0")
    assert docker("run", "--rm", image, "ls", "-A", "/app") == f"{name}.py"
    sizes = [int(docker("image", "inspect", "-f", "{{.Size}}", i)) for i in (image, BASE)]
    assert sizes[0] - sizes[1] < 4_000_000


@pytest.mark.parametrize("name", PATHS)
def test_docker_ps_shows_the_command_and_the_port(run, name):
    shown = docker("ps", "--filter", f"id={run(name).id}", "--format", "{{.Command}} {{.Ports}}")
    assert shown == f'"python {name}.py" 80/tcp'


def test_first_step_the_host_asks_the_catalog_at_its_bridge_address(run, host_reaches_containers):
    assert ask(80, "/query/1001", host=run("catalog").ip).body == BOOKS["1001"]


def test_second_step_the_catalogs_log_shows_the_front_ends_address(run, host_reaches_containers):
    catalog = run("catalog")
    front_end = run("front_end", "-e", f"CATALOG_ADDRESS={catalog.ip}:80")
    assert ask(80, "/lookup/1001", host=front_end.ip).body == BOOKS["1001"]
    assert f'{front_end.ip} - - ' in catalog.logged('"GET /query/1001')


def test_by_name_the_front_end_finds_the_catalog_and_its_successor(network, run):
    named = ("--network", network, "--network-alias", "catalog")
    catalog, front_end = run("catalog", *named), run("front_end", "--network", network)
    assert ask_inside(front_end) == BOOKS["1001"]
    successor = run("catalog", *named)  # while the first still has its address, so it gets another
    docker("stop", catalog.id)
    assert ask_inside(front_end) == BOOKS["1001"]
    assert front_end.ip in successor.logged('"GET /query/1001')


def test_final_step_published_ports_reach_across_hosts(run):
    catalog = run("catalog", "-p", "80")
    front_end = run(
        "front_end", "-p", "80", "--add-host", "host.docker.internal:host-gateway",
        "-e", f"CATALOG_ADDRESS=host.docker.internal:{catalog.host_port}",
    )  # fmt: skip
    assert ask(front_end.host_port, "/lookup/1002").body == BOOKS["1002"]


@pytest.mark.parametrize("name", PATHS)
def test_docker_stop_is_quick_with_status_0(run, name):
    container = run(name)
    begun = time.monotonic()
    docker("stop", container.id)
    assert time.monotonic() - begun < 2
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container.id) == "0"


def test_a_bad_catalog_address_ends_the_container_with_one_line(images):
    errors = docker("run", "--rm", "-e", "CATALOG_ADDRESS=http://catalog", images["front_end"], status=1)
    assert errors == "front_end: bad CATALOG_ADDRESS 'http://catalog'; set it to host, host:port or [IPv6]:port\n"


def test_hardened_containers_serve_as_any_other(network, run):
    hardened = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", network)
    run("catalog", *hardened, "--network-alias", "catalog")
    front_end = run("front_end", *hardened)
    assert ask_inside(front_end) == BOOKS["1001"]


# ---- The texts: the two files, the README ----


def test_what_both_scripts_need_is_the_same_text_in_both():
    texts = [(HERE / script).read_text(encoding="utf-8") for script in ("catalog.py", "front_end.py")]
    catalog, front_end = (text.partition("    # ---- From here on")[2] for text in texts)
    assert catalog and catalog == front_end.replace("    check_address()\n", "", 1)


def shape(line):
    """Return a line with what differs from run to run taken out: addresses, ports, dates, the system's reasons."""
    line = re.sub(r"(catalog at )[\w.]+:\d+", r"\1ADDRESS", line)
    line = re.sub(r"(ADDRESS|PORT=\d+): [^;]*;", r"\1: REASON;", line)
    line = re.sub(r"(PORT=|listening on port )\d+", r"\1N", line)
    return re.sub(r"^[\d.]+ - - \[.*?\]", "CLIENT - - [DATE]", line)


def test_the_readme_and_the_docstrings_show_what_the_services_say(start):
    catalog = start("catalog.py")
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    replies = [ask(catalog.port, f"/query/{item_id}") for item_id in BOOKS]
    replies += [ask(front_end.port, f"/lookup/{item_id}") for item_id in BOOKS]
    replies += [ask(front_end.port, "/query/1001")]
    second = start("catalog.py", PORT=str(catalog.port))
    misled = start("front_end.py", CATALOG_ADDRESS="http://172.17.0.2:80")
    assert second.end() == misled.end() == 1
    catalog.stop()
    replies += [ask(front_end.port, "/lookup/1001")]
    front_end.stop()
    said = [line for service in (catalog, front_end, second, misled) for line in service.log.splitlines()]
    said += [reply.body.decode().strip() for reply in replies]
    said += [json.loads(reply.body)["error"]["message"] for reply in replies if reply.status >= 400]

    texts = [(HERE / name).read_text(encoding="utf-8") for name in ("README.md", "catalog.py", "front_end.py")]
    texts[1:] = [text.split('"""')[1] for text in texts[1:]]
    shown = [line.strip() for text in texts for line in text.splitlines()] + re.findall("`([^`\n]+)`", texts[0])
    begins = ('{"data":{"name":"', '{"error":{"code":5', "catalog: ", "front_end: ", "no such path: ")
    shown = [line for line in shown if line.startswith(begins) or re.match(r"[\d.]+ - - \[", line)]

    known = {shape(line) for line in said}
    assert [line for line in shown if shape(line) not in known] == []
    assert [begin for begin in begins if not any(line.startswith(begin) for line in shown)] == []


def test_the_readme_names_the_defaults_the_limits_and_the_files_that_there_are():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    program = "import catalog as c, front_end as f; print(c.PORT, f.PORT, f.CATALOG_ADDRESS, c.TIMEOUT, f.TIMEOUT)"
    env = {name: value for name, value in os.environ.items() if name not in ("PORT", "CATALOG_ADDRESS")}
    run = subprocess.run([sys.executable, "-c", program], cwd=HERE, env=env, capture_output=True, text=True, check=True)
    ports, address, limits = run.stdout.split()[:2], run.stdout.split()[2], run.stdout.split()[3:]
    dockerfiles = [(HERE / f"Dockerfile.{name}").read_text(encoding="utf-8") for name in PATHS]
    images = [dict(re.findall(r"(\w+)=(\S+)", text)) for text in dockerfiles]
    assert f"| `PORT` | catalog | `{ports[0]}` | `{images[0]['PORT']}` |" in readme
    assert f"| `PORT` | front end | `{ports[1]}` | `{images[1]['PORT']}` |" in readme
    assert f"| `CATALOG_ADDRESS` | front end | `{address}` | `{images[1]['CATALOG_ADDRESS']}` |" in readme
    assert limits == re.findall(r"silent for (\d+) seconds", readme)[:1] * 2
    for name in re.findall(r"\b(?:\w+\.py|Dockerfile\.\w+)\b", readme):
        assert (HERE / name).is_file(), name
