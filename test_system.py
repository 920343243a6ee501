"""Tests of the two services from outside: real processes, which talk over real sockets.

pytest makes a test's arguments by calling the fixtures of these names. To add a test, copy one."""
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
            super().__init__(command, cwd=HERE, env=env, stderr=log, start_new_session=True)

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
        with suppress(OSError):  # it has ended already
            os.killpg(self.pid, number)  # to all that the command has started, as Ctrl-C does


@pytest.fixture
def start(tmp_path):
    """start(PYTHON, "catalog.py", PORT="8080"): run a command, with settings, until it listens."""
    services = []

    def start(*command, **settings):
        service = Service(command, settings, tmp_path / f"log{len(services)}")
        services.append(service)
        service.wait_for(", try /")
        return service

    yield start  # the test runs here
    for service in services:
        service.kill()
        service.wait(WAIT)
        print(service.log())  # pytest shows it if the test has failed


@pytest.fixture
def catalog(start):
    return start(PYTHON, "catalog.py")


@pytest.fixture
def front_end(start, catalog):
    return start(PYTHON, "front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{catalog.port}")


def begin(service, request):
    """Send a request; return the connection."""
    connection = socket.create_connection(("127.0.0.1", service.port))
    connection.sendall(request.encode())
    return connection


def end(connection):
    """Wait for the reply."""
    with connection, http.client.HTTPResponse(connection) as reply:
        reply.begin()
        return Reply(reply.status, reply.headers["Content-Type"], reply.read())


def ask(service, path):
    return end(begin(service, f"GET {path} HTTP/1.0\r\n\r\n"))


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
def stop(request):
    """The signals of Ctrl-C and `docker stop`: a test with this argument runs once with each."""
    if os.name != "posix":
        pytest.skip("Windows has no such signals")
    return request.param


def test_a_signal_ends_a_service_and_it_can_start_again(start, catalog, front_end, stop):
    for service in (catalog, front_end):
        begin(service, "GET / HTTP/1.0\r\n\r\n").makefile().read()  # the port stays in use for a minute
        service.send_signal(stop)
        assert service.wait(WAIT) == 0
        start(*service.args, PORT=str(service.port))


# ---- A first reading may stop here. ----


@pytest.fixture(params=["catalog.py", "front_end.py"])
def service(request, start):
    """The catalog, then the front end: a test with this argument runs once with each."""
    return start(PYTHON, request.param)


def test_head_is_answered_with_the_headers_alone(catalog, front_end):
    for service, path in ((catalog, "/query/1001"), (front_end, "/lookup/1001")):
        reply = begin(service, f"HEAD {path} HTTP/1.0\r\n\r\n").makefile("rb").read()
        assert b"\r\nContent-Length: 65\r\n" in reply
        assert reply.endswith(b"\r\n\r\n")


def test_a_malformed_request_gets_its_status_as_json(service):
    for request, status in (("garbage\r\n", 400), ("a" * 65537, 414), ('"%s" / HTTP/1.0\r\n\r\n', 501)):
        reply = end(begin(service, request))
        assert reply.status == status
        assert json.loads(reply.body)["error"]["message"]


def test_100_silent_clients_keep_nobody_out_and_are_disconnected(service):
    begun = time.monotonic()
    clients = []
    for _ in range(100):
        clients.append(begin(service, ""))
    connection = begin(service, "GET / HTTP/1.0\r\n\r\n")
    connection.settimeout(4)  # seconds; after 5 a silent client makes room
    assert end(connection).status == 404
    for client in clients:
        assert client.recv(1) == b""
    assert time.monotonic() - begun > 4.9


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
        begin(service, "GET / HTTP/1.0\r\n\r\n")
        service.wait_for("Traceback")


def test_a_client_that_hangs_up_leaves_no_traceback(start, tmp_path):
    for script in ("catalog.py", "front_end.py"):
        big = edited(script, r'b"\n"', 'b"x" * 10_000_000', tmp_path)  # fills all buffers
        service = start(PYTHON, big)
        begin(service, "GET / HTTP/1.0\r\n\r\n").close()
        service.wait_for("GET /")
        assert ask(service, "/").status == 404
        assert "Traceback" not in service.log()


def test_a_bad_or_taken_port_ends_a_service_that_says_why(service):
    for port in ("eighty", "-1", "65536", str(service.port)):
        options = {"cwd": HERE, "env": {**os.environ, "PORT": port}, "timeout": WAIT}
        ended = subprocess.run(service.args, check=False, stderr=subprocess.PIPE, text=True, **options)
        assert ended.returncode == 1
        assert f": can't listen on PORT={port}: " in ended.stderr


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_closed(port):
    deadline = time.monotonic() + WAIT
    while is_open(port):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_same_signal_again_ends_a_service_at_once(service, stop):
    with begin(service, "G"):  # a request without an end
        ask(service, "/")  # has a reply: the one before it was accepted
        service.send_signal(stop)
        wait_until_closed(service.port)
        service.send_signal(stop)
        assert service.wait(WAIT) == -stop  # by the signal


README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readmes_first_command_runs_both_until_ctrl_c(start):
    if os.name != "posix" or is_open(8080) or is_open(8000):
        pytest.skip("no sh (Windows), or port 8080 or 8000 is in use")
    command = "python3 catalog.py | python3 front_end.py"
    assert command in README
    command = command.replace("python3", shlex.quote(PYTHON))
    services = start("sh", "-c", f"unset PORT CATALOG_ADDRESS; {command}")
    for line in (
        "catalog: listening on port 8080, try /query/1001",
        "front_end: listening on port 8000, try /lookup/1001 (catalog at 127.0.0.1:8080)",
    ):
        assert line in README
        services.wait_for(line)
    services.send_signal(signal.SIGINT)
    wait_until_closed(8080)
    wait_until_closed(8000)


# ---- A test in the place of the catalog ----


@pytest.fixture
def begin_lookup(catalog, front_end):
    """begin_lookup() returns two connections: for the query's answer, and for the lookup's reply."""
    catalog.kill()
    catalog.wait(WAIT)
    with socket.create_server(("127.0.0.1", catalog.port)) as listener:
        listener.settimeout(4)  # seconds; after 5 the front end gives up

        def begin_lookup():
            lookup = begin(front_end, "GET /lookup/1001 HTTP/1.0\r\n\r\n")
            query, _ = listener.accept()
            assert query.recv(65536).startswith(b"GET /query/1001 ")
            return query, lookup

        yield begin_lookup


def test_an_answer_is_relayed_as_it_is(begin_lookup):
    body = b"\0\xff\r\n"
    for status in (200, 302, 500):
        query, lookup = begin_lookup()
        with query:
            query.sendall(b"HTTP/1.0 %d x\r\nContent-Type: a/b\r\n\r\n%b" % (status, body))
        assert end(lookup) == Reply(status, "a/b", body)


def test_no_proper_answer_is_502_that_says_why(begin_lookup):
    short = b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nx"
    for data, reason in ((b"", b"closed connection"), (short, b"1 bytes read, 2 more expected")):
        query, lookup = begin_lookup()
        with query:
            query.sendall(data)
        reply = end(lookup)
        assert reply.status == 502
        assert reason in reply.body


def test_silence_is_504_after_5_seconds(begin_lookup):
    begun = time.monotonic()
    _query, lookup = begin_lookup()
    assert end(lookup).status == 504
    assert time.monotonic() - begun > 4.9


def test_100_lookups_are_under_way_at_once(begin_lookup):
    connections = []
    for _ in range(100):
        connections.append(begin_lookup())  # fails if the query waits for a free thread


def test_a_stop_finishes_what_is_under_way(begin_lookup, front_end, stop):
    query, lookup = begin_lookup()
    front_end.send_signal(stop)
    wait_until_closed(front_end.port)
    with query:
        query.sendall(b"HTTP/1.0 200 OK\r\n\r\nx")
    assert end(lookup).body == b"x"
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
CATALOG, FRONT_END = f"{TEST}-catalog", f"{TEST}-front_end"  # names of image and container


def docker(command):
    command = ["docker", *command.split()]
    ended = subprocess.run(command, check=False, cwd=HERE, timeout=600, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def images():
    """Both images, from scripts that only their owner may read, as umask 077 leaves them."""
    try:
        docker("run --rm python:3.14-alpine true")
    except (OSError, AssertionError) as error:
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
    """start_container(CATALOG, "--network", "x"): start it, with options of docker run."""

    def start_container(name, *options):
        port = "127.0.0.1::80"  # any free port, for the container's 80
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
        user = docker(f"inspect -f {{{{.Config.User}}}} {name}")
        assert user == "65534:65534\n"  # by number, for Kubernetes' runAsNonRoot
        docker(f"stop {name}")
        assert container.wait(WAIT) == 0
