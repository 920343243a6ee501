"""Tests of the two services from outside: real processes, real sockets, ports that the system gives.

The tools come first: start() runs a script, ask() sends a request, relay() plays a catalog that fails.
No wait is longer than WAIT seconds, many times what it needs, and whatever was started is stopped.
"""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

HERE, WAIT = Path(__file__).parent, 40
socket.setdefaulttimeout(WAIT)
connect = socket.create_connection
BOOKS = {
    "1001": b'{"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}\n',
    "1002": b'{"data":{"name":"Xen and the Art of Surviving Graduate School","price":9.99,"quantity":5}}\n',
}
both = pytest.mark.parametrize("script", ["catalog.py", "front_end.py"])
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no POSIX shell and no signals to send")
signals = pytest.mark.parametrize("number", [pytest.param(n, marks=posix) for n in (signal.SIGINT, signal.SIGTERM)])

with contextlib.suppress(ImportError, ValueError):  # macOS lets a process open 256 files; here it needs more
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


# ---- Tools ----
def wait_until(true):
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path):
    """start(script, **settings) runs a script on a free port; returns the process, with its port, address and log()."""
    processes = []

    def start(*arguments, command=(sys.executable,), ends=False, **settings):
        path, env = tmp_path / f"log{len(processes)}", {**os.environ, "PORT": "0", **settings}
        with path.open("wb") as stderr:
            process = subprocess.Popen([*command, *arguments], cwd=HERE, env=env, stderr=stderr, start_new_session=True)
        processes.append(process)
        process.log = lambda: path.read_text(encoding="utf-8", errors="replace")
        if not ends:
            wait_until(lambda: ", try /" in process.log() or process.poll() is not None)
            assert process.poll() is None, process.log()
            process.port = int(re.search(r"listening on port (\d+)", process.log())[1])
            process.address = f"127.0.0.1:{process.port}"
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait(WAIT)


@pytest.fixture
def catalog(start):
    return start("catalog.py")


@pytest.fixture
def front_end(start, catalog):
    return start("front_end.py", CATALOG_ADDRESS=catalog.address)


def listens(port):
    with contextlib.suppress(ConnectionRefusedError), connect(("127.0.0.1", port)):
        return True


def send(port, request):
    """Send the bytes of a request; return the reply's status (0 if it has none), headers (but the date) and body."""
    with connect(("127.0.0.1", port)) as connection, connection.makefile("rb") as reply:
        connection.sendall(request)
        head, _, body = reply.read().rpartition(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in headers if not line.startswith("Date: "))
    return SimpleNamespace(status=int(status[9:12] or 0), headers=headers, body=body)


def ask(port, path, method="GET"):
    return send(port, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))


def error(reply, status):
    """Check that a reply is an error as both services write it; return its message."""
    assert (reply.status, reply.headers["Content-Type"]) == (status, "application/json"), reply
    message = json.loads(reply.body)["error"]["message"]
    assert reply.body.decode() == f'{{"error":{{"code":{status},"message":{json.dumps(message)}}}}}\n'
    return message


@pytest.fixture
def upstream():
    """A socket that listens as a catalog would; what is asked of it waits until a test accepts it."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield SimpleNamespace(accept=listener.accept, address=f"127.0.0.1:{listener.getsockname()[1]}")


def relay(front_end, upstream, answer, path="/lookup/1001", silent=False):
    """Ask the front end, and play the catalog: send an answer, hang up or be silent. Return the reply, the request."""
    with ThreadPoolExecutor() as client:
        lookup = client.submit(ask, front_end.port, path)
        with upstream.accept()[0] as connection:
            request = connection.recv(65536).decode("latin-1")
            connection.sendall(answer)
            if silent:
                lookup.result(WAIT)
        return lookup.result(WAIT), request


# ---- Forwarding, replies ----
def test_a_lookup_at_the_front_end_equals_the_query_at_the_catalog(catalog, front_end):
    for item_id, book in BOOKS.items():
        query = ask(catalog.port, f"/query/{item_id}?x=/1")
        assert (query.status, query.headers["Content-Type"], query.body) == (200, "application/json", book)
        assert ask(front_end.port, f"/lookup/{item_id}?x=/1") == query


def test_an_unknown_item_or_path_is_404_and_the_message_says_what_to_try(catalog, front_end):
    for port, route in ((catalog.port, "/query"), (front_end.port, "/lookup")):
        for item_id in ("9", "", "..", "%2F"):
            assert error(ask(port, f"{route}/{item_id}"), 404) == f"no such item: {item_id}; try one of 1001, 1002"
        for path in ("/", route, f"/x{route}/1001", f"{route}/1001/x", "1001", "*", f"http://x{route}/1001"):
            assert error(ask(port, path), 404) == f"no such path: {path}; try {route}/1001"


def test_head_gets_the_headers_of_get_and_no_body(catalog, front_end):
    for port, path in ((catalog.port, "/query/1001"), (front_end.port, "/lookup/1001"), (front_end.port, "/x")):
        get, head = ask(port, path), ask(port, path, "HEAD")
        assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")
        assert get.headers["Content-Length"] == str(len(get.body))


def test_status_type_and_body_are_relayed_whatever_they_are_and_no_redirect_or_proxy_plays_a_part(start, upstream):
    proxies = dict.fromkeys(["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"], "http://127.0.0.1:1")
    front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address, **proxies)
    body = b"\n " + bytes(range(256)) + b" \r\n"
    for status in (200, 302, 404, 500):
        head = f"HTTP/1.1 {status} Any\r\nContent-Type: a/b; c=d\r\nLocation: http://{upstream.address}/x\r\n\r\n"
        reply, _ = relay(front_end, upstream, head.encode() + body)
        assert (reply.status, reply.headers["Content-Type"], reply.body) == (status, "a/b; c=d", body)
    reply, _ = relay(front_end, upstream, b"HTTP/1.0 200 OK\r\n\r\n")
    assert reply.headers["Content-Type"] == "application/octet-stream"


def test_a_malformed_request_or_another_method_gets_its_status_and_a_reason_as_json(catalog, front_end):
    requests = [
        (400, b"GET /a b HTTP/1.0\r\n\r\n", "Bad request syntax ('GET /a b HTTP/1.0')"),
        (400, b"\x00garbage\xff\r\n", "Bad request syntax"),
        (505, b"GET / HTTP/2.0\r\n", "Invalid HTTP version (2.0)"),
        (414, b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n", "Too Long"),
        (431, b"GET / HTTP/1.0\r\n" + b"Name: value\r\n" * 300 + b"\r\n", "Too many headers"),
        (501, b'P"ST / HTTP/1.0\r\n\r\n', "Unsupported method ('P\"ST')"),
    ]
    for port in (catalog.port, front_end.port):
        for status, request, reason in requests:
            assert reason in error(send(port, request), status)


def test_whatever_a_client_sends_the_catalog_is_asked_for_one_item_or_not_at_all(start, upstream):
    front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
    for path in ("http://127.0.0.1:1/lookup/1001", "@host/lookup/1001", "/lookup/../x", "/lookup/a/b", "/query/1001"):
        assert ask(front_end.port, path).status == 404
    for item_id in ("..", "%2e%2e", "%0d%0aX:%20y", "@host:1", "%", "%zz", "\xe9", "\x01", "\x7f", "#x", "\\", ""):
        reply, request = relay(front_end, upstream, b"HTTP/1.0 200 OK\r\n\r\n", f"/lookup/{item_id}")
        asked = re.match(r"GET /query/([!-.0-~]*) HTTP/1\.1\r\n", request)[1]
        assert reply.status == 200 and unquote(asked) == unquote(item_id)


# ---- A catalog that fails ----
def test_a_wrong_address_is_502_and_the_message_shows_it(start):
    strange = ["", "a b", "a..b", "a:b", "a\rb", "x" * 64, '"catalog:80"', "http://127.0.0.1:1", "127.0.0.1:1/x"]
    for wrong in ("255.255.255.255:80", "127.0.0.1:99999999999", "no-such.invalid", *strange):
        front_end = start("front_end.py", CATALOG_ADDRESS=wrong)
        assert f"no answer from the catalog at {wrong}: " in error(ask(front_end.port, "/lookup/1001"), 502)
        assert "Traceback" not in front_end.log()


def test_a_catalog_that_is_down_is_502_until_it_comes_and_reply_and_log_tell_the_cause(start):
    with socket.socket() as taken:  # bound, but not listening: nobody else gets the port, and connections are refused
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        front_end = start("front_end.py", CATALOG_ADDRESS=where)
        message = error(ask(front_end.port, "/lookup/1001"), 502)
    assert f"catalog at {where}: [" in message and "refused" in message
    cause, request = front_end.log().splitlines()[1:]
    assert cause.startswith("127.0.0.1 - - [") and cause.endswith(f"] {message}")
    assert request.startswith("127.0.0.1 - - [") and request.endswith('] "GET /lookup/1001 HTTP/1.1" 502 -')
    start("catalog.py", PORT=where.partition(":")[2])
    assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]


def test_a_catalog_that_hangs_up_or_sends_garbage_or_a_short_body_is_502(start, upstream):
    front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
    short = b"HTTP/1.0 200 OK\r\nContent-Length: 65\r\n\r\n" + BOOKS["1001"][:60]
    answers = {b"": "closed connection", b"SSH-2.0-OpenSSH_9.2\r\n": "SSH-2.0", short: "60 bytes read, 5 more expected"}
    for answer, words in answers.items():
        assert re.search(f"catalog at {upstream.address}: .*{words}", error(relay(front_end, upstream, answer)[0], 502))
    assert "Traceback" not in front_end.log()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 200 OK\r\nContent-Length: 65\r\n\r\n{"])
def test_a_catalog_that_is_silent_before_or_within_its_answer_is_504_after_5_seconds(start, upstream, answer):
    front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
    begun = time.monotonic()
    reply, _ = relay(front_end, upstream, answer, silent=True)
    assert f"catalog at {upstream.address}: timed out" in error(reply, 504) and time.monotonic() - begun > 4.9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops what a full queue of connections does not take")
def test_a_catalog_whose_packets_get_lost_is_504(start):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, connect(full.getsockname()):
        front_end = start("front_end.py", CATALOG_ADDRESS=f"127.0.0.1:{full.getsockname()[1]}")
        assert "timed out" in error(ask(front_end.port, "/lookup/1001"), 504)


# ---- As a process: start, settings, log ----
@both
def test_a_bad_or_taken_port_or_an_argument_ends_it_with_status_1_and_says_why(start, catalog, script):
    for port in ("eighty", "", "-1", "65536", "9" * 20, str(catalog.port)):
        service = start(script, PORT=port, ends=True)
        assert service.wait(WAIT) == 1 and re.fullmatch(rf"\w+: can't listen on PORT={port}: .+\n", service.log())
    service = start(script, "--help", ends=True)
    assert service.wait(WAIT) == 1 and "from the environment, as in `PORT=" in service.log()


@posix
@both
def test_a_log_that_can_no_longer_be_written_costs_no_reply(start, script):
    service = start(script, command=["sh", "-c", '"$0" "$1" 2>&1 | head -n 1 >&2', sys.executable])  # head reads a line
    assert [ask(service.port, "/").status for _ in range(50)] == [404] * 50


@posix
def test_the_readmes_first_command_runs_both_on_their_own_ports_and_ctrl_c_ends_both(start):
    if listens(8080) or listens(8000):
        pytest.skip("port 8080 or 8000 is in use")
    line = re.search(r"^python3 .* \| python3 .*$", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    shell = f"unset PORT CATALOG_ADDRESS; trap : INT; {line}".replace("python3", f"'{sys.executable}'")
    services = start(command=["sh", "-c", shell])
    wait_until(lambda: services.log().count(", try /") == 2)
    assert ask(8000, "/lookup/1001").body == ask(8080, "/query/1001").body == BOOKS["1001"]
    os.killpg(services.pid, signal.SIGINT)
    assert services.wait(WAIT) == 0 and "Traceback" not in services.log()


# ---- Load, abuse, stop ----
def test_500_clients_at_the_same_instant_are_all_answered(front_end):
    port, gate = front_end.port, threading.Barrier(500)
    with ThreadPoolExecutor(500) as clients:
        replies = clients.map(lambda _: gate.wait(WAIT) < 500 and ask(port, "/lookup/1001"), range(500))
        assert {reply.body for reply in replies} == {BOOKS["1001"]}


@both
def test_400_silent_clients_keep_nobody_out_and_are_disconnected_after_5_seconds(start, script):
    port, begun = start(script).port, time.monotonic()
    clients = [connect(("127.0.0.1", port)) for _ in range(400)]
    assert {ask(port, "/").status for _ in range(10)} == {404} and time.monotonic() - begun < 15  # too few threads: 20
    assert {client.recv(1) for client in clients} == {b""} and time.monotonic() - begun > 4.9


@both
def test_a_client_that_hangs_up_leaves_no_traceback_but_a_bug_does_and_the_service_goes_on(start, script):
    program = f"import {script[:-3]} as service; service.Handler.do_BUG = lambda self: open('no such file'); "
    program += "service.Handler.do_BIG = lambda self: self.reply(200, b'x' * 10_000_000); service.main()"
    service = start("-B", "-c", program)
    for request in (b"", b"GET", b"BIG / HTTP/1.0\r\n\r\n"):
        with connect(("127.0.0.1", service.port)) as client:
            client.sendall(request)
    wait_until(lambda: '"BIG / HTTP/1.0" 200' in service.log())
    assert send(service.port, b"BUG / HTTP/1.0\r\n\r\n").body == b"" and ask(service.port, "/").status == 404
    assert service.log().count("Traceback") == 1 and "FileNotFoundError" in service.log()


@signals
@both
def test_an_idle_service_stops_with_status_0_and_without_a_word_and_can_start_again_at_once(start, script, number):
    service = start(script)
    assert ask(service.port, "/").status == 404
    os.killpg(service.pid, number)
    assert service.wait(WAIT) == 0 and len(service.log().splitlines()) == 3
    start(script, PORT=str(service.port))


@signals
def test_a_stop_finishes_what_is_in_flight(start, upstream, number):
    front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
    with ThreadPoolExecutor(20) as clients:
        lookups = [clients.submit(ask, front_end.port, "/lookup/1001") for _ in range(20)]
        connections = [upstream.accept()[0] for _ in lookups]
        os.killpg(front_end.pid, number)
        wait_until(lambda: not listens(front_end.port))
        for connection in connections:
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + BOOKS["1001"])
        assert {lookup.result(WAIT).body for lookup in lookups} == {BOOKS["1001"]}
    assert front_end.wait(WAIT) == 0 and "Traceback" not in front_end.log()


@signals
@both
def test_the_same_signal_again_ends_a_service_at_once_though_a_client_holds_it_up(start, script, number):
    service = start(script)
    with connect(("127.0.0.1", service.port)) as client:
        client.sendall(b"GET")
        wait_until(lambda: ask(service.port, "/").status == 404)  # by now the client's connection is accepted
        os.killpg(service.pid, number)
        wait_until(lambda: not listens(service.port))
        assert service.poll() is None
        os.killpg(service.pid, number)
        assert service.wait(WAIT) == -number


# ---- In containers: the steps of the README, on a real engine ----
BASE, MARK = "python:3.14-alpine", f"test-{os.getpid()}"  # MARK: in the name or label of all that these tests make


def docker(*arguments):
    """Run a docker command; return what it printed."""
    done = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True, cwd=HERE, timeout=300)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: status {done.returncode}\n{done.stderr}"
    return (done.stdout or done.stderr).strip()


@pytest.fixture(scope="module")
def run():
    """run(name, *options) starts a container and waits until it listens; returns its id, ip and published IPv4 port."""
    try:
        docker("version")
        docker("images", "--quiet", BASE) or docker("pull", BASE)
    except (OSError, AssertionError) as reason:
        (pytest.fail if os.environ.get("NEED_DOCKER") else pytest.skip)(f"no Docker engine or base image: {reason}")
    for name in ("catalog", "front_end"):
        docker("build", ".", "-f", f"Dockerfile.{name}", "-t", f"{name}-{MARK}")

    def run(name, *options):
        container = docker("run", "--detach", "--label", MARK, *options, f"{name}-{MARK}")
        wait_until(lambda: ", try /" in docker("logs", container))
        ip = docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
        return SimpleNamespace(id=container, ip=ip, port=docker("port", container).split("\n")[0].rpartition(":")[2])

    yield run
    docker("rm", "--force", *docker("ps", "--all", "--quiet", "--filter", f"label={MARK}").split())
    subprocess.run(["docker", "network", "rm", MARK], check=False, capture_output=True)
    docker("rmi", "--force", f"catalog-{MARK}", f"front_end-{MARK}")


@pytest.mark.parametrize("name", ["catalog", "front_end"])
def test_an_image_is_small_not_root_and_holds_only_its_script_and_docker_stop_ends_it_with_status_0(run, name):
    size, base = (int(docker("image", "inspect", "-f", "{{.Size}}", image)) for image in (f"{name}-{MARK}", BASE))
    assert size - base < 4_000_000
    container = run(name).id
    assert docker("exec", container, "id", "-u") not in ("", "0")
    assert docker("exec", container, "ls", "-A", "/app") == f"{name}.py"
    docker("stop", container)
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container) == "0"


def test_first_and_second_step_containers_reach_each_other_by_address_and_the_catalog_logs_the_front_ends(run):
    catalog = run("catalog")
    front_end = run("front_end", "-e", f"CATALOG_ADDRESS={catalog.ip}:80")
    assert docker("exec", catalog.id, "wget", "-qO-", f"{front_end.ip}/lookup/1001").encode() + b"\n" == BOOKS["1001"]
    assert f"{front_end.ip} - - " in docker("logs", catalog.id)


def test_names_the_front_end_finds_the_catalog_and_one_that_comes_back_under_another_address(run):
    docker("network", "create", MARK)
    named = ("--network", MARK, "--network-alias", "catalog")
    catalog, front_end = run("catalog", *named), run("front_end", "--network", MARK, "-p", "80")
    assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]
    successor = run("catalog", *named)  # while the first still has its address, so it gets another
    docker("stop", catalog.id)
    assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]
    assert f"{front_end.ip} - - " in docker("logs", successor.id)


def test_final_step_published_ports_reach_across_hosts(run):
    address = f"host.docker.internal:{run('catalog', '-p', '80').port}"
    host = "--add-host=host.docker.internal:host-gateway"
    front_end = run("front_end", "-p", "80", host, "-e", f"CATALOG_ADDRESS={address}")
    assert ask(front_end.port, "/lookup/1002").body == BOOKS["1002"]


# ---- The README and the docstrings ----
def test_the_readme_and_the_docstrings_show_what_the_services_say(start, catalog, front_end):
    replies = [ask(catalog.port, "/query/1001"), ask(front_end.port, "/lookup/1002")]
    replies.append(ask(start("front_end.py", CATALOG_ADDRESS="127.0.0.1:1").port, "/lookup/1001"))
    said = catalog.log() + front_end.log() + "".join(reply.body.decode() for reply in replies)
    texts = [(HERE / name).read_text(encoding="utf-8") for name in ("README.md", "catalog.py", "front_end.py")]
    shown = re.findall(r'(?m)^ *((?:catalog: l|front_end: l|{"data":|{"error":{"code":5).*)', "\n".join(texts))
    shown, said = (  # but for ports, addresses, and the system's reason
        {re.sub(r"port \d+|at [\w.]+:\d+(: .*;)?", "", line) for line in lines} for lines in (shown, said.splitlines())
    )
    assert len(shown) == 5 and shown <= said
