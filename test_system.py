"""Tests of the two services from outside: real processes, which talk over real sockets.

pytest makes a test's arguments by calling the fixtures of these names (tmp_path and request are its own)."""
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = sys.executable
WAIT = 40  # seconds, far more than needed
socket.setdefaulttimeout(WAIT)
RPC = b'{"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}\n'
XEN = b'{"data":{"name":"Xen and the Art of Surviving Graduate School","price":9.99,"quantity":5}}\n'
Reply = namedtuple("Reply", "status type body")


class Service(subprocess.Popen):
    """A running command, with its log in a file."""

    def __init__(self, command, settings, log_file):
        self.log_file = log_file
        env = {**os.environ, "PORT": "0", **settings}  # 0: any free port
        with log_file.open("wb") as log:
            super().__init__(command, cwd=HERE, env=env, stderr=log, start_new_session=True)  # for killpg()

    def log(self):
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text):
        deadline = time.monotonic() + WAIT
        while text not in self.log():
            assert self.poll() is None, "the command has ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def port(self):
        return int(re.search(r"listening on port (\d+)", self.log())[1])

    def send_signal(self, number):  # kill() calls it, too
        with suppress(OSError):  # it has ended
            os.killpg(self.pid, number)  # to the command and all that it has started, as Ctrl-C does


@pytest.fixture
def start(tmp_path):
    """start(PYTHON, "catalog.py", PORT="8080"): run a command with settings; wait until it listens."""
    services = []

    def start(*command, **settings):
        service = Service(command, settings, tmp_path / f"log{len(services)}")
        services.append(service)
        service.wait_for(", try /")
        return service

    yield start  # the test gets the inner start(), and runs here
    for service in services:
        service.kill()
        service.wait(WAIT)
        print(service.log())  # pytest shows it if the test fails


@pytest.fixture
def catalog(start):
    return start(PYTHON, "catalog.py")


@pytest.fixture
def front_end(start, catalog):
    return start(PYTHON, "front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{catalog.port}")


def ask(service, path):
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    connection.request("GET", path)
    reply = connection.getresponse()
    return Reply(reply.status, reply.headers["Content-Type"], reply.read())


def test_a_lookup_equals_the_query(catalog, front_end):
    for item_id, book in (("1001", RPC), ("1002", XEN)):
        query = ask(catalog, f"/query/{item_id}")
        assert query == Reply(200, "application/json", book)
        assert ask(front_end, f"/lookup/{item_id}") == query


def test_an_unknown_item_is_404_and_the_log_shows_it(catalog, front_end):
    query = ask(catalog, "/query/9")
    assert query.status == 404
    assert b'{"error":{"code":404,"message":"no such item: 9; try one of 1001' in query.body
    assert "no such item: 9; " in catalog.log()
    assert ask(front_end, "/lookup/9") == query


def test_an_unknown_path_is_404_and_the_catalog_is_not_asked(catalog, front_end):
    assert ask(front_end, "/x/lookup/1001").status == 404
    assert "GET" not in catalog.log()
    assert ask(catalog, "/x/query/1001").status == 404


def test_a_lookup_is_502_while_the_catalog_is_down(start, catalog, front_end):
    assert ask(front_end, "/lookup/1001").status == 200
    catalog.kill()
    catalog.wait(WAIT)
    assert ask(front_end, "/lookup/1001").status == 502
    start(PYTHON, "catalog.py", PORT=str(catalog.port))
    assert ask(front_end, "/lookup/1001").status == 200


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def stop_signal(request):
    """The signals of Ctrl-C and `docker stop`: a test with this argument runs once with each."""
    if os.name != "posix":
        pytest.skip("Windows has no such signals")
    return request.param


def test_a_signal_ends_a_service(catalog, front_end, stop_signal):
    for service in (catalog, front_end):
        service.send_signal(stop_signal)
        assert service.wait(WAIT) == 0


# ---- A first reading may stop here. ----


@pytest.fixture(params=["catalog.py", "front_end.py"])
def service(request, start):
    """The catalog, then the front end: a test runs once with each."""
    return start(PYTHON, request.param)


def send(service, text="GET / HTTP/1.0\r\n\r\n"):
    """Send a request, or any text; return the connection."""
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(text.encode())
    return connection


def receive(connection):
    with connection, http.client.HTTPResponse(connection) as reply:
        reply.begin()  # reads the status and the headers
        return Reply(reply.status, reply.headers["Content-Type"], reply.read())


def test_head_is_answered_with_the_headers_alone(catalog, front_end):
    for service, path in ((catalog, "/query/1001"), (front_end, "/lookup/1001")):
        reply = send(service, f"HEAD {path} HTTP/1.0\r\n\r\n").makefile("rb").read()
        assert b"\r\nContent-Length: 65\r\n" in reply
        assert reply.endswith(b"\r\n\r\n")


def test_a_malformed_request_gets_its_status_as_json(service):
    odd = '"%s" / HTTP/1.0\r\n\r\n'  # quotes for JSON, % for the log
    for text, status in (("garbage\r\n", 400), ("a" * 65537, 414), (odd, 501)):
        reply = receive(send(service, text))
        assert reply.status == status
        assert json.loads(reply.body)["error"]["message"]


def test_100_silent_clients_keep_nobody_out_and_are_disconnected(service):
    begun = time.monotonic()
    clients = []
    for _ in range(100):
        clients.append(send(service, ""))
    connection = send(service)
    connection.settimeout(4)  # seconds; after 5 a silent client makes room
    assert receive(connection).status == 404
    for client in clients:
        assert client.recv(1) == b""
    assert 4.9 < time.monotonic() - begun < 20


def edited(script, old, new, folder):
    """Return the path of a copy of a script, with one text replaced."""
    text = (HERE / script).read_text(encoding="utf-8")
    assert old in text
    copy = folder / script
    copy.write_text(text.replace(old, new), encoding="utf-8")
    return copy


def test_an_id_may_hold_anything(start, tmp_path):
    catalog = start(PYTHON, edited("catalog.py", '"1001"', '"ü/: @#"', tmp_path))
    front_end = start(PYTHON, "front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{catalog.port}")
    assert ask(catalog, "/query/%C3%BC%2F:%20@%23?x=/1").body == RPC
    assert ask(front_end, "/lookup/%C3%BC%2F:%20@#?x=/1").body == RPC


def test_a_bug_leaves_a_traceback(start, tmp_path):
    for script in ("catalog.py", "front_end.py"):
        service = start(PYTHON, edited(script, "json.dumps", "json.bug", tmp_path))
        send(service)
        service.wait_for("Traceback")


def test_a_client_that_hangs_up_leaves_no_traceback(start, tmp_path):
    for script in ("catalog.py", "front_end.py"):
        big = edited(script, r'b"\n"', 'b"x" * 10_000_000', tmp_path)  # so much that a write fails
        service = start(PYTHON, big)
        send(service).close()
        service.wait_for("GET /")
        assert ask(service, "/").status == 404
        assert "Traceback" not in service.log()


def test_a_bad_or_taken_port_ends_a_service_that_says_why(service):
    for port in ("eighty", "65536", str(service.port)):
        options = {"cwd": HERE, "env": {**os.environ, "PORT": port}, "timeout": WAIT}
        ended = subprocess.run(service.args, check=False, capture_output=True, text=True, **options)
        assert ended.returncode == 1
        assert f": can't listen on PORT={port}: " in ended.stderr


def test_an_argument_ends_a_service_that_shows_its_settings(service):
    ended = subprocess.run([*service.args, "9000"], check=False, cwd=HERE, timeout=WAIT, capture_output=True)
    assert ended.returncode == 1
    assert b"PORT=9000" in ended.stderr


def test_a_service_can_start_again_at_once(start, service):
    # A closed connection keeps the port in use for a minute; allow_reuse_address takes it.
    send(service).makefile().read()
    service.kill()
    service.wait(WAIT)
    start(*service.args, PORT=str(service.port))


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_closed(port):
    deadline = time.monotonic() + WAIT
    while is_open(port):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_same_signal_again_ends_a_service_at_once(service, stop_signal):
    with send(service, "G"):  # without an end, so that a stop has to wait
        ask(service, "/")  # its reply shows that the one before was accepted
        service.send_signal(stop_signal)
        wait_until_closed(service.port)
        service.send_signal(stop_signal)
        assert service.wait(WAIT) == -stop_signal  # minus: the signal ended it


README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readmes_first_command_runs_both_until_ctrl_c(start):
    if os.name != "posix" or is_open(8080) or is_open(8000):
        pytest.skip("no sh (Windows), or port 8080 or 8000 is in use")
    command = "python3 catalog.py | python3 front_end.py"  # | only starts both: nothing flows through it
    assert command in README
    command = command.replace("python3", shlex.quote(PYTHON))
    services = start("sh", "-c", f"unset PORT CATALOG_ADDRESS; {command}")
    catalog = "catalog: listening on port 8080, try /query/1001"
    front_end = "front_end: listening on port 8000, try /lookup/1001 (catalog at 127.0.0.1:8080)"
    for line in (catalog, front_end):
        assert line in README
        services.wait_for(line)
    services.send_signal(signal.SIGINT)
    wait_until_closed(8080)
    wait_until_closed(8000)


# ---- A test in the place of the catalog ----


@pytest.fixture
def begin_lookup(catalog, front_end):
    """begin_lookup() returns two connections: for the query's answer, and for the lookup's reply."""
    catalog.kill()  # from here on, the test listens on its port
    catalog.wait(WAIT)
    with socket.create_server(("127.0.0.1", catalog.port)) as listener:
        listener.settimeout(4)  # seconds; after 5 the front end gives up

        def begin_lookup():
            lookup = send(front_end, "GET /lookup/1001 HTTP/1.0\r\n\r\n")
            query, _ = listener.accept()
            assert query.recv(65536).startswith(b"GET /query/1001 ")
            return query, lookup

        yield begin_lookup


def test_an_answer_is_relayed_as_it_is(begin_lookup):
    body = b"\0\xff\r\n"
    for status in (200, 302, 500):
        query, lookup = begin_lookup()
        with query:  # at its end the connection closes: the answer ends
            query.sendall(b"HTTP/1.0 %d x\r\nContent-Type: a/b\r\n\r\n%b" % (status, body))
        assert receive(lookup) == Reply(status, "a/b", body)


def test_no_proper_answer_is_502_that_says_why(begin_lookup):
    answer = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\nx"
    short, huge = answer % 3, answer % 10**13  # huge: MemoryError() or IncompleteRead()
    for data, reason in ((b"", b"closed connection"), (short, b"1 bytes read, 2 more"), (huge, b"(")):
        query, lookup = begin_lookup()
        with query:
            query.sendall(data)
        reply = receive(lookup)
        assert reply.status == 502
        assert reason in reply.body


def test_silence_is_504_after_5_seconds(begin_lookup):
    begun = time.monotonic()
    _query, lookup = begin_lookup()
    assert receive(lookup).status == 504
    assert 4.9 < time.monotonic() - begun < 20


def test_100_lookups_are_under_way_at_once(begin_lookup):
    connections = []
    for _ in range(100):
        connections.append(begin_lookup())  # fails if the query waits for a free thread


def test_a_stop_finishes_what_is_under_way(begin_lookup, front_end, stop_signal):
    query, lookup = begin_lookup()
    front_end.send_signal(stop_signal)
    wait_until_closed(front_end.port)
    with query:
        query.sendall(b"HTTP/1.0 200 OK\r\n\r\nx")
    assert receive(lookup).body == b"x"
    assert front_end.wait(WAIT) == 0


def test_a_wrong_address_is_502_that_shows_it(start):
    for address in ("127.0.0.1:1", "127.0.0.1:x", "a..b"):
        front_end = start(PYTHON, "front_end.py", CATALOG_ADDRESS=address)
        assert ask(front_end, "/lookup/1001").status == 502
        assert f"no answer from the catalog at {address}: " in front_end.log()


def test_a_proxy_is_not_used(start, catalog):
    proxy = {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    front_end = start(PYTHON, "front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{catalog.port}", **proxy)
    assert ask(front_end, "/lookup/1001").body == RPC


def test_the_readme_shows_the_replies(start):
    if sys.platform != "linux":
        pytest.skip("the README shows Linux's words")
    front_end = start(PYTHON, "front_end.py", CATALOG_ADDRESS="127.0.0.1:1")
    refusal = ask(front_end, "/lookup/1001").body.replace(b":1:", b":8080:")
    for reply in (RPC, XEN, refusal):
        assert reply.decode() in README


# ---- Containers ----

TEST = f"test-{os.getpid()}"
CATALOG, FRONT_END = f"{TEST}-catalog", f"{TEST}-front_end"  # image and container


def docker(command):
    command = ["docker", *command.split()]  # at spaces: no path in it
    ended = subprocess.run(command, check=False, cwd=HERE, timeout=200, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def images():
    """Both images, from scripts that only their owner may read (umask 077)."""
    try:
        docker("run --rm python:3.14-alpine true")
    except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Docker: {error}")
    try:
        docker(f"network create {TEST}")
        with tempfile.TemporaryDirectory(dir=HERE) as folder:  # some Dockers can't read /tmp
            for name in ("catalog", "front_end"):
                script = Path(folder, f"{name}.py")
                script.write_bytes((HERE / script.name).read_bytes())
                script.chmod(0o600)
                docker(f"build {script.parent.name} -f Dockerfile.{name} -t {TEST}-{name}")
        yield
    finally:
        docker(f"network rm {TEST}")
        docker(f"rmi -f {CATALOG} {FRONT_END}")


@pytest.fixture
def start_container(start, images):
    """start_container(CATALOG, "--network", "x"): start it with options of docker run."""

    def start_container(name, *options):
        port = "127.0.0.1::80"  # any free port, for its 80
        return start("docker", "run", "--name", name, "-p", port, *options, name)

    yield start_container
    docker(f"rm -f {CATALOG} {FRONT_END}")


def lookup():
    address = docker(f"port {FRONT_END} 80").strip()  # "127.0.0.1:32768"
    connection = http.client.HTTPConnection(address)
    connection.request("GET", "/lookup/1001")
    return connection.getresponse().read()


def test_a_published_front_end_finds_the_catalog_by_name(start_container):
    start_container(CATALOG, "--network", TEST, "--network-alias", "catalog")
    start_container(FRONT_END, "--network", TEST)
    assert lookup() == RPC


def test_a_published_front_end_finds_the_catalog_by_address(start_container):
    start_container(CATALOG)
    address = docker(f"exec {CATALOG} hostname -i").strip()
    start_container(FRONT_END, "-e", f"CATALOG_ADDRESS={address}:80")
    assert lookup() == RPC


def test_a_container_is_not_root_and_docker_stop_ends_it_with_0(start_container):
    for name in (CATALOG, FRONT_END):
        container = start_container(name)
        assert docker("inspect -f {{.Config.User}} " + name) == "65534:65534\n"  # not root, which is 0:0
        docker(f"stop {name}")
        assert container.wait(WAIT) == 0
