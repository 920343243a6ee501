"""Tests of the two services from outside: real processes, real sockets, ports that the system gives.

A test's arguments come from the fixtures of these names: `catalog` and `front_end` are running services, and
`start` starts others. No wait is longer than WAIT, but for Docker's builds."""
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WAIT = 40  # seconds, far more than needed
socket.setdefaulttimeout(WAIT)
BOOKS = {
    "1001": b'{"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}\n',
    "1002": b'{"data":{"name":"Xen and the Art of Surviving Graduate School","price":9.99,"quantity":5}}\n',
}
Reply = namedtuple("Reply", "status type body")
each = pytest.mark.parametrize  # runs a test once for each value
both = each("script", ["catalog.py", "front_end.py"])
signals = each("number", [signal.SIGINT, signal.SIGTERM])  # Ctrl-C, `docker stop`
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals, nor sh")


class Service:
    """A running service: a process in its own group, with its log in a file."""

    def __init__(self, command, settings, log_file):
        self.log_file = log_file
        env = {**os.environ, "PORT": "0", **settings}
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=HERE, env=env, stderr=log, start_new_session=True)

    def log(self):
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text):
        """Wait until the log holds a text."""
        end = time.monotonic() + WAIT
        while text not in self.log():
            assert self.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)

    def send_signal(self, number):
        send = getattr(os, "killpg", os.kill)  # to the group: sh and docker start others
        send(self.process.pid, number)

    def kill(self):
        if self.process.poll() is None:
            self.send_signal(9)
        self.process.wait(WAIT)


@pytest.fixture
def start(tmp_path):
    """start("catalog.py", PORT="8080"): run it, with settings (environment variables), until it listens."""
    services = []

    def start(script, runner=(sys.executable,), **settings):  # runner: what runs the script
        service = Service([*runner, script], settings, tmp_path / f"log{len(services)}")
        services.append(service)
        service.wait_for(", try /")
        service.port = int(re.search(r"listening on port (\d+)", service.log())[1])
        service.address = f"127.0.0.1:{service.port}"
        return service

    yield start  # here the test runs; what follows is done after it
    for service in services:
        service.kill()
        print(service.log())  # pytest shows it if the test has failed


@pytest.fixture
def catalog(start):
    return start("catalog.py")


@pytest.fixture
def front_end(start, catalog):
    return start("front_end.py", CATALOG_ADDRESS=catalog.address)


def ask(service, path):
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.request("GET", path)
    reply = connection.getresponse()
    return Reply(reply.status, reply.headers["Content-Type"], reply.read())


def error(status, message):
    """The reply that both services give for an error."""
    body = json.dumps({"error": {"code": status, "message": message}}, separators=(",", ":"))
    return Reply(status, "application/json", body.encode() + b"\n")


def test_a_lookup_at_the_front_end_equals_the_query_at_the_catalog(catalog, front_end):
    for item_id, book in BOOKS.items():
        query = ask(catalog, f"/query/{item_id}")
        assert query == Reply(200, "application/json", book)
        assert ask(front_end, f"/lookup/{item_id}") == query


def test_an_unknown_item_is_404_and_the_log_shows_it(catalog, front_end):
    for item_id in ("9", "%0A", ".."):
        reply = error(404, f"no such item: {item_id}; try one of 1001, 1002")
        assert ask(catalog, f"/query/{item_id}") == reply
        assert ask(front_end, f"/lookup/{item_id}") == reply
        assert f"no such item: {item_id}; " in catalog.log()


def test_an_unknown_path_is_404_and_the_catalog_is_not_asked(catalog, front_end):
    for path in ("/", "/lookup/1001", "/x/query/1001", "/query/x/1001"):
        assert ask(catalog, path) == error(404, f"no such path: {path}; try /query/1001")
    for path in ("/", "/query/7", "/x/lookup/7", "/lookup/x/7", "http://127.0.0.1:1/lookup/7"):
        assert ask(front_end, path) == error(404, f"no such path: {path}; try /lookup/1001")
    assert "/query/7" not in catalog.log()


def test_a_lookup_is_502_while_the_catalog_is_down(start, catalog, front_end):
    assert ask(front_end, "/lookup/1001").status == 200
    catalog.kill()
    assert ask(front_end, "/lookup/1001").status == 502
    start("catalog.py", PORT=str(catalog.port))
    assert ask(front_end, "/lookup/1001").status == 200


@posix
@signals
@both
def test_a_signal_ends_an_idle_service_and_it_can_start_again(start, script, number):
    service = start(script)
    ask(service, "/")
    before = service.log()
    service.send_signal(number)
    assert service.process.wait(WAIT) == 0
    assert service.log() == before
    start(script, PORT=str(service.port))


# ---- A first reading may stop here. Below: sections, each with its own tools. ----

# ---- Requests ----


def connect(service):
    return socket.create_connection(("127.0.0.1", service.port))


def send(service, request):
    """Send bytes as they are; return all the bytes that come back."""
    with connect(service) as connection:
        connection.sendall(request)
        return connection.makefile("rb").read()


def text_of(file):
    return (HERE / file).read_text(encoding="utf-8")


def test_head_is_answered_with_the_headers_alone(catalog, front_end):
    query = send(catalog, b"HEAD /query/1001 HTTP/1.0\r\n\r\n")
    lookup = send(front_end, b"HEAD /lookup/1001 HTTP/1.0\r\n\r\n")
    for reply in (query, lookup):
        assert b"\r\nContent-Length: 65\r\n" in reply
        assert reply.endswith(b"\r\n\r\n")


@each("item_id, asked", [
    ("a b:c+d@e", "a%20b:c+d@e"), ("ü", "%C3%BC"), ("a/b", "a%2Fb"), ("5%", "5%25"), ("x", "x?y=/1"),
])
def test_a_new_item_is_found_whatever_its_id(start, tmp_path, item_id, asked):
    edited = tmp_path / "catalog.py"
    edited.write_text(text_of("catalog.py").replace("1001", item_id), encoding="utf-8")
    catalog = start(edited)
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    assert ask(catalog, f"/query/{asked}").body == BOOKS["1001"]
    assert ask(front_end, f"/lookup/{asked}").body == BOOKS["1001"]


@both
@each("sent, status, message", [
    (b"\x01\r\n", 400, "Bad request syntax ('\\x01')"),
    (b"GET / HTTP/2.0\r\n", 505, "Invalid HTTP version (2.0)"),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n", 414, http.HTTPStatus(414).phrase),
    (b'"%s" / HTTP/1.0\r\n\r\n', 501, "Unsupported method ('\"%s\"')"),
], ids=["garbage", "version", "long", "method"])
def test_a_malformed_request_gets_its_status_and_a_reason(start, script, sent, status, message):
    head, _, body = send(start(script), sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 %d " % status)
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert body == error(status, message).body


# ---- A test in the place of the catalog ----


@pytest.fixture
def asking(start):
    """A front end that asks a socket, asking.catalog. A query waits there until the test accepts it."""
    with socket.create_server(("127.0.0.1", 0), backlog=400) as catalog:
        asking = start("front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{catalog.getsockname()[1]}")
        asking.catalog = catalog
        yield asking


def begin_lookup(asking):
    """Send a lookup, but don't wait: the test must answer the query first."""
    lookup = http.client.HTTPConnection("127.0.0.1", asking.port)
    lookup.request("GET", "/lookup/1001")
    return lookup


def accept_query(asking):
    """Accept a query; return the connection, for the answer."""
    connection, _ = asking.catalog.accept()
    connection.recv(65536)
    return connection


OK = b"HTTP/1.0 200 OK\r\n"
ANY = b" \r\n\r\n\0\xff\r\n "


@each("answer, status, kind, body", [
    (OK + b"Content-Type: a/b; c=d\r\n\r\n" + ANY, 200, "a/b; c=d", ANY),
    (b"HTTP/1.0 302 No\r\nContent-Type: a/b\r\nLocation: http://127.0.0.1:1\r\n\r\nx", 302, "a/b", b"x"),
    (b"HTTP/1.1 500 No\r\nContent-Length: 1\r\n\r\nx", 500, "application/octet-stream", b"x"),
    (b"", 502, "application/json", b"Remote end closed connection without response"),
    (b"SSH-2.0\r\n", 502, "application/json", b"SSH-2.0"),
    (OK + b"Content-Length: 3\r\n\r\n{}", 502, "application/json", b"2 bytes read, 1 more expected"),
])
def test_an_answer_is_relayed_as_it_is_and_no_answer_is_502(asking, answer, status, kind, body):
    lookup = begin_lookup(asking)
    with accept_query(asking) as connection:
        connection.sendall(answer)
    reply = lookup.getresponse()
    assert reply.status == status
    assert reply.headers["Content-Type"] == kind
    assert body in reply.read()


def test_a_proxy_is_not_used(start, catalog):
    proxy = {"http_proxy": "http://127.0.0.1:1", "no_proxy": "", "NO_PROXY": ""}
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address, **proxy)
    assert ask(front_end, "/lookup/1001").body == BOOKS["1001"]


@each("item_id, asked", [
    (b"%0d%0aX:%20y", b"%0d%0aX%3A%20y"), (b"@host:1", b"%40host%3A1"),
    (b"\x7f", b"%7F"), (b"\xe9", b"%C3%A9"),
])
def test_whatever_the_id_the_catalog_is_asked_for_it_alone(asking, item_id, asked):
    with connect(asking) as client:
        client.sendall(b"GET /lookup/" + item_id + b" HTTP/1.0\r\n\r\n")
        connection, _ = asking.catalog.accept()
        with connection:
            assert connection.recv(65536).startswith(b"GET /query/" + asked + b" HTTP/1.1\r\n")


@each("part", [b"", OK + b"Content-Length: 65\r\n\r\n{"])
def test_a_catalog_that_is_silent_for_5_seconds_is_504(asking, part):
    begun = time.monotonic()
    lookup = begin_lookup(asking)
    with accept_query(asking) as connection:
        connection.sendall(part)
        reply = lookup.getresponse()
    assert reply.status == 504
    assert b": timed out; " in reply.read()
    assert time.monotonic() - begun > 4.9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops what a full queue can't take")
def test_a_catalog_whose_packets_get_lost_is_504(start):
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    with full, socket.create_connection(full.getsockname()):  # the queue's only place
        front_end = start("front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{full.getsockname()[1]}")
        assert ask(front_end, "/lookup/1001").status == 504


# ---- Start ----


def run(*command, timeout=WAIT, **settings):
    """Run a command to its end."""
    options = {"cwd": HERE, "env": {**os.environ, **settings}, "timeout": timeout}
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


@both
def test_a_bad_or_taken_port_ends_a_service_that_says_why(catalog, script):
    for port in ("eighty", "", "-1", "65536", "9" * 20, str(catalog.port)):
        ended = run(sys.executable, script, PORT=port)
        assert ended.returncode == 1
        assert re.fullmatch(rf"\w+: can't listen on PORT={port}: .+\n", ended.stderr)


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_closed(port):
    end = time.monotonic() + WAIT
    while is_open(port):
        assert time.monotonic() < end
        time.sleep(0.01)


@posix
def test_the_readmes_first_command_runs_both_and_ctrl_c_ends_both(start):
    if is_open(8080) or is_open(8000):
        pytest.skip("port 8080 or 8000 is in use")
    command = re.search(r"python3 catalog.py \| .*", text_of("README.md"))[0]
    command = command.replace("python3", f"'{sys.executable}'")
    services = start(f"unset PORT CATALOG_ADDRESS; {command}", ["sh", "-c"])
    services.wait_for("catalog: listening on port 8080")
    services.wait_for("front_end: listening on port 8000")
    services.port = 8000
    assert ask(services, "/lookup/1001").body == BOOKS["1001"]
    services.send_signal(signal.SIGINT)
    wait_until_closed(8080)
    wait_until_closed(8000)
    assert "Traceback" not in services.log()


# ---- Bugs, rude clients, and what may be missing ----

# A runner: runs a script with more methods than GET.
MORE = [sys.executable, "-c", """
import functools, importlib, os, socket, sys, threading, time
service = importlib.import_module(sys.argv[1].replace(".py", ""))
socket.getfqdn = None  # no look-up of the machine's name, nor of any other
socket.getaddrinfo = functools.partial(socket.getaddrinfo, flags=socket.AI_NUMERICHOST)

class Handler(service.Handler):
    timeout = 1  # not 5: a test waits for it
    def do_BUG(self):
        open("no such file")
    def do_BIG(self):  # too much for the buffers: the write meets the closed connection
        self.reply(200, b"x" * 10_000_000)
    def do_NO_LOG(self):
        sys.stderr = None
    def do_CLOSED_LOG(self):
        os.dup2(os.open(os.devnull, os.O_RDONLY), 2)  # not open for writing
    def do_NO_THREADS(self):
        threading.stack_size(1 << 60)  # more than there is: none can start
        threading.Thread().start()
    def do_SLEEP(self):
        time.sleep(60)
    def do_STOP(self):  # as a signal does (Windows has none)
        self.server.running = False

service.Handler = Handler  # main() looks up this name
service.main()
"""]


@both
@each("sent, tracebacks", [
    (b"G", 0), (b"BIG / HTTP/1.0\r\n\r\n", 0), (b"BUG / HTTP/1.0\r\n\r\n", 1),
])
def test_a_bug_leaves_a_traceback_but_a_hang_up_does_not(start, script, sent, tracebacks):
    service = start(script, MORE)
    with connect(service) as client:
        client.sendall(sent)
    assert ask(service, "/").status == 404
    send(service, b"STOP / HTTP/1.0\r\n\r\n")
    assert service.process.wait(WAIT) == 0  # after it the log is complete
    assert service.log().count("Traceback") == tracebacks


@both
@each("method", [b"NO_LOG", b"CLOSED_LOG"])
def test_a_log_that_is_missing_or_closed_costs_no_reply(start, script, method):
    service = start(script, MORE)
    send(service, method + b" / HTTP/1.0\r\n\r\n")
    before = service.log()
    assert ask(service, "/").status == 404
    assert service.log() == before


@posix
@both
def test_a_connection_waits_where_no_thread_can_start(start, script):
    service = start(script, MORE)
    send(service, b"NO_THREADS / HTTP/1.0\r\n\r\n")
    assert "can't start new thread" in service.log()
    with connect(service):  # silent: has the only thread for a second
        assert ask(service, "/").status == 404


@each("address", [
    "127.0.0.1:1", "127.0.0.1:99999999999", "catalog", "http://catalog:80", "catalog:80/x", "", "a b", "a..b",
])
def test_a_wrong_address_is_502_and_the_log_shows_it(start, address):
    front_end = start("front_end.py", MORE, CATALOG_ADDRESS=address)
    message = f"no answer from the catalog at {address}: "
    reply = ask(front_end, "/lookup/1001")
    assert reply.status == 502
    assert message in reply.body.decode()
    assert message in front_end.log()
    assert front_end.log().endswith('"GET /lookup/1001 HTTP/1.1" 502 -\n')


# ---- Load and stop ----

few_files = os.name == "posix" and os.sysconf("SC_OPEN_MAX") < 1000
open_files = pytest.mark.skipif(few_files, reason="too few open files: ulimit -n 1024")
ANSWER = OK + b"\r\n" + BOOKS["1001"]


@open_files
def test_400_lookups_are_under_way_at_once(asking):
    # With fewer threads, some queries don't come before others are answered, and accept() fails.
    asking.catalog.settimeout(4)  # seconds; after 5 the front end gives up
    lookups = [begin_lookup(asking) for _ in range(400)]
    for connection in [accept_query(asking) for _ in range(400)]:
        with connection:
            connection.sendall(ANSWER)
    for lookup in lookups:
        assert lookup.getresponse().read() == BOOKS["1001"]


@open_files
@both
def test_400_silent_clients_keep_nobody_out_and_are_disconnected(start, script):
    service = start(script)
    begun = time.monotonic()
    clients = [connect(service) for _ in range(400)]
    assert ask(service, "/").status == 404
    assert time.monotonic() - begun < 4.9  # with fewer threads: after 5
    for client in clients:
        with client:
            assert client.recv(1) == b""
    assert time.monotonic() - begun > 4.9


@posix
@signals
def test_a_stop_finishes_what_is_under_way(asking, number):
    lookup = begin_lookup(asking)
    with accept_query(asking) as connection:
        asking.send_signal(number)
        wait_until_closed(asking.port)
        connection.sendall(ANSWER)
    assert lookup.getresponse().read() == BOOKS["1001"]
    assert asking.process.wait(WAIT) == 0


@posix
@signals
@both
def test_the_same_signal_again_ends_a_service_at_once(start, script, number):
    service = start(script, MORE)
    with connect(service) as client:
        client.sendall(b"SLEEP / HTTP/1.0\r\n\r\n")
        ask(service, "/")  # was accepted after the client
        service.send_signal(number)
        wait_until_closed(service.port)
        service.send_signal(number)
        assert service.process.wait(WAIT) == -number


# ---- In containers, on a real engine ----

TEST = f"test-{os.getpid()}"  # in the names of what is made here


def docker(*arguments):
    """Return what a docker command wrote."""
    ended = run("docker", *arguments, timeout=600)
    if ended.returncode != 0:
        raise ChildProcessError(ended.stderr)
    return ended.stdout.strip()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Build both images, from files that only their owner may read, as umask 077 leaves them."""
    try:
        docker("run", "--rm", "python:3.14-alpine", "true")
    except (OSError, subprocess.TimeoutExpired) as reason:
        if os.environ.get("NEED_DOCKER"):
            raise
        pytest.skip(f"no Docker engine or base image: {reason}")
    folder = tmp_path_factory.mktemp("images")
    docker("network", "create", TEST)
    try:
        for name in ("catalog", "front_end"):
            script = folder / f"{name}.py"
            script.write_text(text_of(script.name))
            script.chmod(0o600)
            docker("build", str(folder), "-f", str(HERE / f"Dockerfile.{name}"), "-t", f"{name}-{TEST}")
        yield
    finally:
        docker("network", "rm", TEST)
        docker("rmi", "--force", f"catalog-{TEST}", f"front_end-{TEST}")


@pytest.fixture
def start_container(start, images):
    """start_container("catalog"): as start(), since docker run passes on its container's log and status."""
    names = []

    def start_container(image, *options):
        name = f"{TEST}-{len(names)}"
        names.append(name)
        container = start(f"{image}-{TEST}", ["docker", "run", "-p", "80", "--name", name, *options])
        container.name = name
        container.port = int(re.search(r":(\d+)", docker("port", name))[1])  # the machine's
        container.ip = re.search('"IPAddress": "(.+)"', docker("inspect", name))[1]
        return container

    yield start_container
    docker("rm", "--force", *names)


@each("name", ["catalog", "front_end"])
def test_an_image_is_not_root_and_stops(start_container, name):
    container = start_container(name)
    user = docker("inspect", "-f", "{{.Config.User}}", container.name)
    assert re.fullmatch(r"[1-9]\d*:\d+", user)  # not root; by number, as Kubernetes' runAsNonRoot wants it
    docker("stop", container.name)
    assert container.process.wait(WAIT) == 0


def test_a_catalog_is_found_by_name_at_any_address(start_container):
    named = ["--network", TEST, "--network-alias", "catalog"]
    catalog = start_container("catalog", *named)
    front_end = start_container("front_end", "--network", TEST)
    assert ask(front_end, "/lookup/1001").body == BOOKS["1001"]
    successor = start_container("catalog", *named)  # the first has its address still, so this gets another
    docker("stop", catalog.name)
    assert ask(front_end, "/lookup/1001").body == BOOKS["1001"]
    successor.wait_for(f"{front_end.ip} - - ")


def test_a_catalog_is_found_by_address_and_by_published_port(start_container):
    catalog = start_container("catalog")
    beside = start_container("front_end", "-e", f"CATALOG_ADDRESS={catalog.ip}:80")
    address = f"CATALOG_ADDRESS=host.docker.internal:{catalog.port}"
    far = start_container("front_end", "--add-host=host.docker.internal:host-gateway", "-e", address)
    assert ask(beside, "/lookup/1001").body == BOOKS["1001"]
    assert ask(far, "/lookup/1001").body == BOOKS["1001"]
    catalog.wait_for(f"{beside.ip} - - ")


# ---- The README and the docstrings ----


@pytest.mark.skipif(sys.platform != "linux", reason="the README shows Linux's words")
def test_readme_and_docstrings_show_what_the_services_say(catalog, front_end):
    said = BOOKS["1001"].decode() + BOOKS["1002"].decode() + catalog.log() + front_end.log()
    catalog.kill()
    said += ask(front_end, "/lookup/1001").body.decode()
    said = said.replace(str(catalog.port), "8080").replace(str(front_end.port), "8000")
    lines = said.splitlines()
    for line in lines:
        assert line in text_of("README.md").splitlines()
    for script, line in (("catalog.py", lines[2]), ("front_end.py", lines[3])):
        shown = text_of(script)
        assert f"    {lines[0]}\n" in shown
        assert f"    {line}\n" in shown
