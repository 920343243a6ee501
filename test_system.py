"""Tests of the two services from outside: real processes, real sockets, ports that the system gives.

    python -m pytest

Every wait is bounded, and whatever was started is stopped. The tools that the tests share stand at the end.
"""
import collections
import contextlib
import errno
import json
import os
import re
import shlex
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def test_a_lookup_at_the_front_end_equals_the_query_at_the_catalog(start):
    catalog = start("catalog.py")
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    for item_id, book in BOOKS.items():
        query = ask(catalog.port, f"/query/{item_id}")
        lookup = ask(front_end.port, f"/lookup/{item_id}")
        assert (query.status, query.body) == (200, book)
        assert (lookup.status, lookup.body) == (200, book)


BOOKS = {
    "1001": b'{"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}\n',
    "1002": b'{"data":{"name":"Xen and the Art of Surviving Graduate School","price":9.99,"quantity":5}}\n',
}
PATHS = {"catalog": "/query/1001", "front_end": "/lookup/1001"}
HERE = Path(__file__).parent
WAIT = 60  # seconds after which a test gives up
both = pytest.mark.parametrize("script", ["catalog.py", "front_end.py"])
posix = pytest.mark.skipif(os.name != "posix", reason="there is no POSIX shell and no SIGTERM")


# ---- What they answer ----


def test_status_headers_and_body_through_the_front_end_are_the_catalogs_and_a_query_string_is_ignored(pair):
    for item_id in ("1001", "1002", "1001?x=1&/y?z", "9", "", "..", "a/b", "%zz", "a%2Fb%20%C3%A9", "\xe9"):
        query, lookup = (ask(pair[name].port, PATHS[name].replace("1001", item_id)) for name in PATHS)
        assert lookup == query
        assert lookup.status == (200 if item_id.startswith("100") else 404)
        assert lookup.headers["Content-Type"] == "application/json"
        assert int(lookup.headers["Content-Length"]) == len(lookup.body)


def test_the_front_end_asks_for_each_lookup_and_relays_any_status_type_and_body_and_follows_no_redirect(start):
    body = b"\n " + bytes(range(256)) + b" \n"
    with Upstream() as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for status in (200, 302, 404, 405, 500, 503):
            head = f"HTTP/1.1 {status} Any\r\ncontent-type: a/b; c=d\r\nLocation: http://{upstream.address}/x\r\n\r\n"
            upstream.behave = says(head.encode() + body)
            reply = ask(front_end.port, "/lookup/1001")
            assert (reply.status, reply.headers["Content-Type"], reply.body) == (status, "a/b; c=d", body)
        upstream.behave = says(b"HTTP/1.0 200 OK\r\n\r\n")
        assert ask(front_end.port, "/lookup/1001").headers["Content-Type"] == "application/octet-stream"
        assert len(upstream.asked) == 7


def test_head_is_answered_with_the_same_head_and_no_body(service):
    for path in (service.path, "/no/such/path"):
        get, head = (ask(service.port, path, method) for method in ("GET", "HEAD"))
        assert head == (get.status, get.headers, b"")


def test_an_unknown_item_is_404_and_the_items_there_are_are_named(service):
    for item_id, shown in {"9": "9", "": "", "..": "..", "a%20b%2Fc%3F": "a b/c?", "1001/more": "1001/more"}.items():
        message = error(ask(service.port, service.path.replace("1001", item_id)), 404)
        assert message == f"no such item: {shown}; try one of 1001, 1002"


def test_any_other_path_is_404_and_the_path_that_works_is_named(service):
    base = service.path.rpartition("/")[0]
    for path in ("/", base, f"{base.upper()}/1001", f"/x{base}/1001", "1001", "*", f"http://x{base}/1001"):
        assert error(ask(service.port, path), 404) == f"no such path: {path}; try GET {service.path}"


def test_a_request_that_is_malformed_or_of_another_method_gets_its_status_and_a_reason_in_full(service):
    requests = [
        (400, b"garbage\r\n\r\n", "Bad request syntax ('garbage'); try GET {}"),
        (400, b"GET / HTTP/x\r\n\r\n", "Bad request version ('HTTP/x'); try GET {}"),
        (400, b"GET /a b HTTP/1.0\r\n\r\n", "Bad request syntax ('GET /a b HTTP/1.0'); try GET {}"),
        (400, b'"<script>\xff\x00 \r\n\r\n', "try GET {}"),
        (414, b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n", "Too Long; try GET {}"),
        (431, b"GET / HTTP/1.0\r\n" + b"Name: value\r\n" * 300 + b"\r\n", "Too many headers; "),
        (431, b"GET / HTTP/1.0\r\nName: " + b"a" * 70_000 + b"\r\n\r\n", "Line too long; got more than 65536 bytes"),
        (501, b"POST / HTTP/1.0\r\n\r\n", "Unsupported method ('POST'); try GET {}"),
        (501, b'B"REW / HTTP/1.0\r\n\r\n', "Unsupported method ('B\"REW'); try GET {}"),
        (505, b"GET / HTTP/2.0\r\n\r\n", "try GET {}"),
    ]
    for status, request, words in requests:
        assert words.format(service.path) in error(send(service.port, request), status)
    for byte in range(256):
        reply = send(service.port, b"GET /%c HTTP/1.0\r\n\r\n" % byte)
        assert reply.status in (400, 404) and error(reply, reply.status)


@both
def test_a_method_that_a_student_adds_is_called_and_a_bug_in_it_shows_its_traceback(start, tmp_path, script):
    text, line = read(script), "    # ---- A first reading"
    assert line in text
    methods = "    def do_TEST(self):\n        self.reply(200, int(self.rfile.read(int(self.headers['Length']))))\n"
    methods += "    def do_BUG(self):\n        open('/no/such/file')\n\n"
    (tmp_path / script).write_text(text.replace(line, methods + line, 1), encoding="utf-8")
    edited = start(tmp_path / script)
    assert send(edited.port, b"TEST / HTTP/1.0\r\nLength: 2\r\n\r\n42").body == b"42\n"
    with connect(edited.port) as client:
        client.sendall(b"BUG / HTTP/1.0\r\n\r\n")
        assert read_all(client) == b""
    assert "Traceback" in edited.logged("FileNotFoundError")
    assert ask(edited.port, "/").status == 404


# ---- When the catalog fails the front end ----


def test_a_catalog_that_cannot_be_reached_is_502_in_the_systems_words_until_it_is_there(start):
    with socket.socket() as taken:  # bound, but not listening: nobody else gets the port, and connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for address in ("255.255.255.255:80", "no-such.invalid", "a..b", "x" * 64, "a b", "a:b", f"127.0.0.1:{port}"):
            front_end = start("front_end.py", CATALOG_ADDRESS=address)
            reason = no_answer(ask(front_end.port, "/lookup/1001"), 502, address)
            assert reason and "Traceback" not in front_end.log
    assert os.name != "posix" or os.strerror(errno.ECONNREFUSED) in reason
    start("catalog.py", PORT=str(port)).logged(", try /")
    assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]


def test_a_catalog_that_hangs_up_or_speaks_garbage_or_cuts_its_body_short_is_502(start):
    head = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n"
    answers = {
        b"": "closed connection without response",
        b"SSH-2.0-OpenSSH_9.2\r\n": "SSH-2.0",
        b"\x00\xff\r\n\r\n\r\n": "\x00",
        b"HTTP/1.0 200 OK\r\n" + b"Name: value\r\n" * 300 + b"\r\n": "100 headers",
        head % 65 + BOOKS["1001"][:60]: "60 bytes read, 5 more expected",
        head % 10**15 + b"x": "",
        head % 10**20 + b"x": "",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n": "",
    }
    with Upstream() as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for answer, words in answers.items():
            upstream.behave = says(answer)
            reason = no_answer(ask(front_end.port, "/lookup/1001"), 502, upstream.address)
            assert words in reason
    assert "Traceback" not in front_end.logged('" 502 ', times=len(answers))


def test_a_catalog_that_is_silent_or_never_ends_is_504_after_5_seconds_even_during_a_stop(start):
    head, chunked = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
    behaviours = [
        says(b"", then=b""),
        says(head + b"Content-Length: 65\r\n\r\n{", then=b""),
        says(head, then=b"N"),
        says(head, then=b"Name: value\r\n"),
        says(head + b"\r\n", then=b"x"),
        says(head + chunked, then=b"1\r\nx\r\n"),
        says(b"", then=b"HTTP/1.1 100 Continue\r\n\r\n"),
        says(head + chunked, then=b"1\r\nx\r\n" * 10_000, pause=0),  # never makes the front end wait
    ]
    numbers = range(len(behaviours))
    with Upstream(lambda connection, item_id: behaviours[int(item_id)](connection)) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)

        def lookup(number):
            begun = time.monotonic()
            reply = ask(front_end.port, f"/lookup/{number}")
            return reply, time.monotonic() - begun

        with ThreadPoolExecutor(len(numbers)) as clients:
            lookups = [clients.submit(lookup, number) for number in numbers]
            wait_until(lambda: len(upstream.asked) == len(numbers), lambda: front_end.log)
            front_end.interrupt()
            for reply, seconds in (lookup.result(WAIT) for lookup in lookups):
                assert no_answer(reply, 504, upstream.address) == "timed out" and seconds > 4.9
        assert front_end.end() == 0 and "Traceback" not in front_end.log


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops what a full queue of connections does not take")
def test_a_catalog_whose_packets_get_lost_is_504(start):
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        address = f"127.0.0.1:{full.getsockname()[1]}"
        front_end = start("front_end.py", CATALOG_ADDRESS=address)
        assert no_answer(ask(front_end.port, "/lookup/1001"), 504, address) == "timed out"


def test_proxy_variables_play_no_part(start, pair):
    with Upstream(says(b"HTTP/1.0 200 OK\r\n\r\nthe proxy")) as proxy:
        settings = dict.fromkeys(["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"], f"http://{proxy.address}")
        front_end = start("front_end.py", CATALOG_ADDRESS=pair["catalog"].address, **settings)
        assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"] and not proxy.asked


def test_whatever_the_client_sends_the_catalog_is_asked_for_one_item_or_not_at_all(start):
    items = "..|.|%2e%2e|%2f..|..%2f..|%0d%0aX:%20y|@host|@host:1/x|%|%zz|%00|%ff|\xe9|\x01|\x7f|#x|a:b|\\|//x|[::1]|&|"
    paths = [f"/lookup/{item}" for item in items.split("|")]
    elsewhere = ["http://127.0.0.1:1/lookup/1001", "@host/lookup/1001", "lookup/1001", "/query/1001"]
    with Upstream(says(b"HTTP/1.0 200 OK\r\n\r\n")) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        assert {ask(front_end.port, path).status for path in elsewhere} == {404} and not upstream.asked
        assert {ask(front_end.port, path).status for path in paths} == {200} and len(upstream.asked) == len(paths)
        for request in upstream.asked:
            assert re.match(r"GET /query/[!-.0-~]* HTTP/1\.1\r\n", request), request
            assert f"\r\nHost: {upstream.address}\r\n" in request
        assert "Traceback" not in front_end.log


# ---- As a process: start, settings, log ----


@posix
def test_the_readmes_first_command_runs_both_on_their_own_ports_and_ctrl_c_ends_both(start):
    for port in (8080, 8000):
        try:
            socket.create_server(("", port)).close()
        except OSError as reason:
            pytest.skip(f"port {port}: {reason.strerror}")
    command = re.search(r"^python3 .* \| python3 .*$", read("README.md"), re.MULTILINE)[0]
    command = command.replace("python3", shlex.quote(sys.executable))
    services = start(None, command=["sh", "-c", f"trap : INT; {command}"], PORT=None)
    services.logged(", try /", times=2)
    assert ask(8000, "/lookup/1001").body == ask(8080, "/query/1001").body == BOOKS["1001"]
    services.interrupt()
    assert services.end() == 0


@both
def test_an_argument_prints_the_docstring_and_ends(start, script):
    for argument in ("-h", "--help", "9000"):
        service = start(script, arguments=[argument])
        assert service.end() == 1 and "from the environment, as in `PORT=" in service.log


@both
def test_a_port_that_is_bad_or_in_use_ends_it_with_one_line(start, pair, script):
    ports = ["eighty", "", "-1", "65536", "9" * 20, "80.5", str(pair["catalog"].port)]
    for port, service in [(port, start(script, PORT=port)) for port in ports]:
        assert service.end() == 1
        assert re.fullmatch(rf"{script[:-3]}: can't listen on PORT={port}: .+\n", service.log)
    assert os.name != "posix" or os.strerror(errno.EADDRINUSE) in service.log


def test_the_front_end_says_at_the_start_where_it_expects_the_catalog_or_ends_with_one_line_if_that_is_a_url(start):
    for address in ("http://catalog", "catalog:80/"):
        service = start("front_end.py", CATALOG_ADDRESS=address)
        assert service.end() == 1
        assert service.log == f"front_end: bad CATALOG_ADDRESS {address}; set it to host:port, without http://\n"
    service = start("front_end.py", CATALOG_ADDRESS="[::1]:80")
    assert f"listening on port {service.port}, try /lookup/1001 (catalog at [::1]:80)\n" in service.log


def test_it_listens_on_every_address_and_logs_one_line_for_a_request_with_the_clients(start):
    catalog = start("catalog.py")
    host = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"  # the others have 127.0.0.1 alone
    assert [ask(catalog.port, path, host=host).status for path in ("/query/1001", "/query/9")] == [200, 404]
    assert [re.sub(r"\[.*?\]", "[]", line) for line in catalog.logged("404").splitlines()[1:]] == [
        '127.0.0.1 - - [] "GET /query/1001 HTTP/1.1" 200 -',
        '127.0.0.1 - - [] "GET /query/9 HTTP/1.1" 404 -',
    ]


@pytest.mark.parametrize("redirect", ["", *(pytest.param(r, marks=posix) for r in ("2>&-", ">&- 2>&-", "2>>log"))])
@both
def test_a_log_that_nobody_takes_costs_no_reply_and_no_status(start, pair, tmp_path, script, redirect):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {"PORT": str(port), "CATALOG_ADDRESS": pair["catalog"].address}
    if redirect:
        (tmp_path / "log").write_bytes(b"x" * 1024)  # all that ulimit allows
        shell = f'cd {shlex.quote(str(tmp_path))}; ulimit -f 1; exec "$0" "$@" {redirect}'
        service = start(None, command=["sh", "-c", shell, sys.executable, str(HERE / script)], **settings)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        service = start(script, stderr=writer, **settings)
        os.close(writer)
    wait_until(lambda: listens(port), lambda: "it never listened")
    assert [ask(port, PATHS[script[:-3]]).status for _ in range(20)] == [200] * 20
    service.interrupt()
    assert service.end() == 0


# ---- Load, abuse, stop ----


def test_a_client_that_hangs_up_costs_at_most_one_line(start):
    behave = says(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 10_000_000)
    gone = threading.Event()
    with Upstream(lambda connection, _: (gone.wait(WAIT), behave(connection))) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for request in (b"", b"GET", b"GET /lookup/1001 HTTP/1.0\r\nName", b"GET /lookup/1001 HTTP/1.0\r\n\r\n"):
            client = connect(front_end.port)
            client.sendall(request)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if request.endswith(b"\r\n\r\n"):
                wait_until(lambda: upstream.asked, lambda: front_end.log)
            client.close()  # with a reset
        gone.set()
        front_end.logged('"GET /lookup/1001 HTTP/1.0" 200')
        front_end.interrupt()
        assert front_end.end() == 0 and len(front_end.lines) <= 5 and "Traceback" not in front_end.log


def test_a_client_that_sends_more_than_is_read_gets_the_whole_reply_and_its_end(service):
    with connect(service.port) as client:
        client.sendall(b"GET %s HTTP/1.0\r\n\r\n" % service.path.encode() + b"x" * 100_000)
        assert parse(read_all(client)).body == BOOKS["1001"]


def test_500_clients_at_the_same_instant_are_all_answered(pair):
    gate = threading.Barrier(500)

    def lookup(_):
        gate.wait(WAIT)
        return ask(pair["front_end"].port, "/lookup/1001").body

    with ThreadPoolExecutor(500) as clients:
        assert set(clients.map(lookup, range(500))) == {BOOKS["1001"]}


def test_400_clients_that_never_finish_keep_nobody_out_and_are_let_go_after_5_seconds_even_during_a_stop(start, pair):
    front_end = start("front_end.py", CATALOG_ADDRESS=pair["catalog"].address)
    begun = time.monotonic()
    clients = [connect(front_end.port) for _ in range(400)]
    for client in clients[:200]:
        client.sendall(b"GET /lookup/1001 HTTP/1.0\r\nName: ")
    assert {ask(front_end.port, "/lookup/1001").body for _ in range(10)} == {BOOKS["1001"]}
    assert time.monotonic() - begun < 15  # many times what it needs; where threads are too few, it takes 20
    front_end.interrupt()
    assert [read_all(client) for client in clients] == [b""] * 400 and time.monotonic() - begun > 4.9
    assert front_end.end() == 0 and front_end.log.count("Request timed out") == 400
    for client in clients:
        client.close()


def test_a_client_that_sends_a_byte_now_and_then_is_let_go_after_5_seconds(pair):
    def drip(service):
        begun = time.monotonic()
        with connect(service.port) as client, contextlib.suppress(ConnectionError):
            client.settimeout(0.5)
            received = None
            while received is None and time.monotonic() < begun + WAIT:
                client.sendall(b"G")
                with contextlib.suppress(socket.timeout):
                    received = client.recv(1)
            assert received == b""
        return time.monotonic() - begun

    with ThreadPoolExecutor() as clients:
        assert min(clients.map(drip, pair.values())) > 4.9


@posix
def test_where_the_system_is_out_of_files_or_threads_the_service_goes_on_when_some_are_free_again(start):
    few_files = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))\n"
    few_threads = "import threading\nstart = threading.Thread.start\ndef limited(thread):\n    "
    few_threads += "if threading.active_count() > 9: raise RuntimeError\n    start(thread)\nthreading.Thread.start = limited\n"
    program = f"import runpy; runpy.run_path({str(HERE / 'catalog.py')!r}, run_name='__main__')"
    catalogs = [start(None, command=[sys.executable, "-c", few + program]) for few in (few_files, few_threads)]
    clients = [connect(catalog.port) for catalog in catalogs for _ in range(40)]
    for catalog in catalogs:
        catalog.logged("Request timed out")  # the first are let go, and the others were too many all the time
    for client in clients:
        client.close()
    assert [ask(catalog.port, "/query/1001").status for catalog in catalogs] == [200, 200]


@both
@pytest.mark.parametrize("how", ["interrupt", pytest.param("terminate", marks=posix)])
def test_an_idle_service_stops_with_status_0_and_without_a_word(start, script, how):
    service = start(script)
    service.logged(", try /")
    getattr(service, how)()
    assert service.end() == 0 and len(service.lines) == 1


@pytest.mark.parametrize("how", ["interrupt", pytest.param("terminate", marks=posix)])
def test_a_stop_finishes_what_is_in_flight_and_takes_nothing_new(start, how):
    release = threading.Event()
    answer = says(b"HTTP/1.0 200 OK\r\n\r\n" + BOOKS["1001"])
    behave = lambda connection, _: (release.wait(WAIT), answer(connection))
    with Upstream(behave) as upstream, ThreadPoolExecutor(20) as clients:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        port = front_end.port
        lookups = [clients.submit(ask, port, "/lookup/1001") for _ in range(20)]
        wait_until(lambda: len(upstream.asked) == 20, lambda: front_end.log)
        getattr(front_end, how)()
        wait_until(lambda: not listens(port), lambda: "still takes connections")
        getattr(front_end, how)()  # the impatient second Ctrl-C
        release.set()
        assert {lookup.result(WAIT).body for lookup in lookups} == {BOOKS["1001"]}
        assert front_end.end() == 0 and "Traceback" not in front_end.log


def test_a_stop_still_serves_the_connections_that_wait_to_be_accepted(start):
    catalog = start("catalog.py")
    clients = [connect(catalog.port) for _ in range(300)]
    for client in clients:
        client.sendall(b"GET /query/1001 HTTP/1.0\r\n\r\n")
    catalog.interrupt()
    assert {parse(read_all(client)).body for client in clients} == {BOOKS["1001"]}
    for client in clients:
        client.close()
    assert catalog.end() == 0


# ---- In containers: the steps of the README, on a real engine ----


@pytest.mark.parametrize("name", PATHS)
def test_an_image_is_small_not_root_and_holds_only_its_script_and_docker_stop_ends_it_with_status_0(images, run, name):
    sizes = [int(docker("image", "inspect", "-f", "{{.Size}}", image)) for image in (images[name], BASE)]
    assert sizes[0] - sizes[1] < 4_000_000
    container = run(name)
    assert docker("exec", container.id, "id", "-u") not in ("", "0")
    assert docker("exec", container.id, "ls", "-A", "/app") == f"{name}.py"
    shown = ("ps", "--filter", f"id={container.id}", "--format", "{{.Command}} {{.Ports}}")
    assert docker(*shown) == f'"python {name}.py" 80/tcp'
    docker("stop", container.id)
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container.id) == "0"


def test_first_and_second_step_the_host_asks_either_at_its_address_and_the_catalogs_log_shows_the_front_ends(run):
    if sys.platform != "linux" or "Desktop" in docker("info", "-f", "{{.OperatingSystem}}"):
        pytest.skip("Docker Desktop: containers are in a virtual machine, out of the host's reach")
    catalog = run("catalog")
    assert ask(80, "/query/1001", host=catalog.ip).body == BOOKS["1001"]
    front_end = run("front_end", "-e", f"CATALOG_ADDRESS={catalog.ip}:80")
    assert ask(80, "/lookup/1001", host=front_end.ip).body == BOOKS["1001"]
    catalog.logged(f"{front_end.ip} - - ")


def test_by_name_the_front_end_finds_the_catalog_and_its_successor(run):
    docker("network", "create", "--label", MARK, MARK)
    named = ("--network", MARK, "--network-alias", "catalog")
    catalog, front_end = run("catalog", *named), run("front_end", "--network", MARK, "-p", "80")
    assert ask(front_end.host_port, "/lookup/1001").body == BOOKS["1001"]
    successor = run("catalog", *named)  # while the first still has its address, so it gets another
    docker("stop", catalog.id)
    assert ask(front_end.host_port, "/lookup/1001").body == BOOKS["1001"]
    successor.logged(f"{front_end.ip} - - ")


def test_final_step_published_ports_reach_across_hosts(run):
    address = f"host.docker.internal:{run('catalog', '-p', '80').host_port}"
    hosts = ("--add-host", "host.docker.internal:host-gateway")
    front_end = run("front_end", "-p", "80", *hosts, "-e", f"CATALOG_ADDRESS={address}")
    assert ask(front_end.host_port, "/lookup/1002").body == BOOKS["1002"]


# ---- The texts: the two files, the README ----


def test_what_both_scripts_need_is_the_same_text_in_both():
    catalog, front_end = (read(f"{name}.py").partition("    # ---- A first reading")[2] for name in PATHS)
    shared = front_end.partition("# ---- The rest is in front_end.py alone")[0]
    assert shared != front_end and catalog.startswith(shared)


def shape(line):
    """Return a line with what differs from run to run taken out: addresses, ports, dates, the system's reasons."""
    line = re.sub(r"(catalog at )[\w.]+:\d+(: [^;]*;)?", r"\1ADDRESS", line)
    line = re.sub(r"(PORT=\d+: ).*", r"\1REASON", line)
    line = re.sub(r"(PORT=|listening on port )\d+", r"\1N", line)
    return re.sub(r"^[\d.]+ - - \[.*?\]", "CLIENT - - [DATE]", line)


def test_the_readme_and_the_docstrings_show_what_the_services_say(start):
    catalog = start("catalog.py")
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    replies = [ask(catalog.port, f"/query/{item_id}") for item_id in BOOKS]
    replies += [ask(front_end.port, path) for path in ("/lookup/1001", "/lookup/1002", "/query/1001")]
    second = start("catalog.py", PORT=str(catalog.port))
    misled = start("front_end.py", CATALOG_ADDRESS="http://172.17.0.2:80")
    assert second.end() == misled.end() == 1
    catalog.stop()
    replies += [ask(front_end.port, "/lookup/1001")]
    front_end.stop()
    said = [line for service in (catalog, front_end, second, misled) for line in service.log.splitlines()]
    said += [reply.body.decode().strip() for reply in replies]
    said += [json.loads(reply.body)["error"]["message"] for reply in replies if reply.status >= 400]
    known = {shape(line) for line in said}

    texts = [read("README.md")] + [read(f"{name}.py").split('"""')[1] for name in PATHS]
    shown = [line.strip() for text in texts for line in text.splitlines()] + re.findall("`([^`\n]+)`", texts[0])
    for begin in ('{"data":{"name":"', '{"error":{"code":5', "catalog: ", "front_end: ", "no such path", r"[\d.]+ - -"):
        lines = [line for line in shown if re.match(begin, line)]
        assert lines and [line for line in lines if shape(line) not in known] == []


def test_the_readme_names_the_defaults_the_limits_and_the_files_that_there_are(start):
    readme = read("README.md")
    program = "import catalog as c, front_end as f; print(c.PORT, f.PORT, f.CATALOG_ADDRESS, c.TIMEOUT, f.TIMEOUT)"
    run = start(None, command=[sys.executable, "-B", "-c", program], PORT=None)
    assert run.end() == 0
    *ports, address, seconds, seconds_too = run.process.stdout.read().split()
    images = [dict(re.findall(r"(\w+)=(\S+)", read(f"Dockerfile.{name}"))) for name in PATHS]
    assert f"| `PORT` | catalog | `{ports[0]}` | `{images[0]['PORT']}` |" in readme
    assert f"| `PORT` | front end | `{ports[1]}` | `{images[1]['PORT']}` |" in readme
    assert f"| `CATALOG_ADDRESS` | front end | `{address}` | `{images[1]['CATALOG_ADDRESS']}` |" in readme
    assert seconds == seconds_too == re.search(r"whole request after (\d+) seconds is let go", readme)[1]
    assert seconds == re.search(r"not complete after (\d+) seconds", readme)[1]
    for name in re.findall(r"\b(?:\w+\.py|Dockerfile\.\w+)\b", readme):
        assert (HERE / name).is_file(), name


# ---- Tools: processes ----


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def wait_until(true, problem):
    """Wait until true() holds; fail with problem() after WAIT seconds."""
    end = time.monotonic() + WAIT
    while not true():
        if time.monotonic() > end:
            pytest.fail(problem())
        time.sleep(0.01)


class Service:
    """A script (or a command) as a process. Settings are its environment: PORT is 0 if not given, None is not set."""

    def __init__(self, script, arguments=(), command=None, stderr=subprocess.PIPE, **settings):
        env = {**os.environ, "PORT": "0", "CATALOG_ADDRESS": None, **settings}
        self.process = subprocess.Popen(
            command or [sys.executable, str(HERE / script), *arguments],
            env={name: value for name, value in env.items() if value is not None},
            cwd=HERE, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            start_new_session=os.name == "posix",
            creationflags=0 if os.name == "posix" else subprocess.CREATE_NO_WINDOW,  # a console of its own
        )  # fmt: skip
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or []))
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

    def interrupt(self):
        """Press Ctrl-C in the terminal of the process."""
        if os.name == "posix":
            return os.killpg(self.process.pid, signal.SIGINT)
        program = "import ctypes, sys; dll = ctypes.windll.kernel32; dll.FreeConsole(); "
        program += f"dll.AttachConsole({self.process.pid}); dll.SetConsoleCtrlHandler(None, True); "
        program += "sys.exit(not dll.GenerateConsoleCtrlEvent(0, 0))"
        subprocess.run([sys.executable, "-c", program], check=True)

    def terminate(self):
        self.process.terminate()

    def end(self):
        """Wait until the process has ended by itself; return its status."""
        wait_until(lambda: self.process.poll() is not None, lambda: f"still running; its log:\n{self.log}")
        self.reader.join(WAIT)
        return self.process.returncode

    def stop(self):
        """Make sure that the process, and what it may have started, has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the second of a process that ended
            self.process.kill() if os.name != "posix" else os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(WAIT)
        with self.process:  # closes its pipes
            pass


def starter():
    """A function that starts a Service. All that it has started are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(*args, **settings):
            service = Service(*args, **settings)
            stack.callback(service.stop)
            return service

        yield start


start = pytest.fixture(starter)
start_once = pytest.fixture(starter, scope="module")


@pytest.fixture(scope="module")
def pair(start_once):
    """A catalog and a front end that asks it, for tests that change neither; by name."""
    catalog = start_once("catalog.py")
    return {"catalog": catalog, "front_end": start_once("front_end.py", CATALOG_ADDRESS=catalog.address)}


@pytest.fixture(params=["catalog", "front_end"])
def service(request, pair):
    """Each of the two in turn, with .path set to the path of an item."""
    service = pair[request.param]
    service.path = PATHS[request.param]
    return service


@pytest.fixture(scope="module", autouse=True)
def open_files():
    """Let the tests, and what they start, open as many files as a crowd of clients needs."""
    with contextlib.suppress(ImportError):  # Windows has neither this module nor this limit
        import resource
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 4096), most))


# ---- Tools: HTTP ----


Reply = collections.namedtuple("Reply", "status headers body")  # the headers without the date


def connect(port, host="127.0.0.1"):
    return socket.create_connection((host, port), timeout=WAIT)


def listens(port):
    with contextlib.suppress(ConnectionError), connect(port):
        return True


def read_all(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


def parse(data):
    """Return a complete HTTP answer as a Reply."""
    head, blank, body = data.partition(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").split("\r\n")
    assert blank and re.fullmatch(r"HTTP/1\.0 \d{3} [ -~]*", status), f"not a complete answer: {data[:300]}"
    headers = dict(line.split(": ", 1) for line in headers)
    assert headers.pop("Date")
    return Reply(int(status.split()[1]), headers, body)


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


def no_answer(reply, status, address):
    """Check that a reply is the front end's error for a catalog that does not answer; return the reason it gives."""
    begin, end = f"no answer from the catalog at {address}: ", "; start it there, or set CATALOG_ADDRESS to host:port"
    message = error(reply, status)
    assert message.startswith(begin) and message.endswith(end)
    return message[len(begin) : -len(end)]


class Upstream(socketserver.ThreadingTCPServer):
    """A stand-in for the catalog: it reads a request, and does what behave(connection, item_id) does."""

    daemon_threads, request_queue_size = True, 100

    def __init__(self, behave=None):
        super().__init__(("127.0.0.1", 0), None)
        self.behave, self.asked = behave, []
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=[0.01]).start()

    def finish_request(self, connection, _):
        with contextlib.suppress(OSError):
            request = connection.recv(65536).decode("latin-1")
            self.asked.append(request)
            self.behave(connection, request.split()[1].rpartition("/")[2])

    def server_close(self):
        self.shutdown()
        super().server_close()


def says(answer, then=None, pause=1):
    """A behaviour for Upstream: send these bytes, then hang up, or send the next ones every second (b"": silence)."""

    def behave(connection, item_id=None):
        connection.sendall(answer)
        end = time.monotonic() + WAIT
        while then is not None and time.monotonic() < end:
            time.sleep(pause)
            connection.sendall(then)

    return behave


# ---- Tools: containers ----

BASE = "python:3.14-alpine"
MARK = f"test-{os.getpid()}"  # in the name or label of all that these tests make


def docker(*arguments):
    """Run a docker command; return what it printed."""
    done = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True, cwd=HERE, timeout=300)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: status {done.returncode}\n{done.stderr}"
    return (done.stdout or done.stderr).strip()


class Container:
    """A container in the background, started by `docker run` with these arguments."""

    def __init__(self, *arguments):
        self.id = docker("run", "--detach", "--label", MARK, *arguments)
        self.logged(", try /")

    def logged(self, text):
        """Wait until text stands in the log."""
        log = lambda: docker("logs", self.id)
        wait_until(lambda: text in log(), lambda: f"no {text!r} in the log:\n{log()}")

    @property
    def ip(self):
        return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", self.id)

    @property
    def host_port(self):
        return int(docker("port", self.id, "80").split()[0].rpartition(":")[2])


@pytest.fixture(scope="module")
def images():
    """The two images, built as the README does, but under tags of the test's own; by name."""
    try:
        docker("version")
        if not docker("images", "--quiet", BASE):
            docker("pull", BASE)
    except (OSError, AssertionError) as reason:
        missing = pytest.fail if os.environ.get("NEED_DOCKER") else pytest.skip
        missing(f"no Docker engine, or no base image: {reason}")
    tags = {name: f"{name}-{MARK}" for name in PATHS}
    try:
        for name, tag in tags.items():
            docker("build", ".", "-f", f"Dockerfile.{name}", "-t", tag)
        yield tags
    finally:
        subprocess.run(["docker", "rmi", "--force", *tags.values()], check=False, capture_output=True)


@pytest.fixture
def run(images):
    """A function that starts a container of image "catalog" or "front_end" and waits until it listens."""
    yield lambda name, *arguments: Container(*arguments, images[name])
    if left := docker("ps", "--all", "--quiet", "--filter", f"label={MARK}").split():
        docker("rm", "--force", *left)
    if left := docker("network", "ls", "--quiet", "--filter", f"label={MARK}").split():
        docker("network", "rm", *left)
