"""Tests of the two services from outside: real processes, real sockets, ports that the system gives.

    python -m pytest

Every wait is bounded, and whatever was started is stopped. The tools that the tests share stand at the end.
"""
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
from typing import NamedTuple

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


def test_status_headers_and_body_through_the_front_end_are_the_catalogs(pair):
    for item_id in (*BOOKS, "9", "", "..", "%zz", "a%2Fb%20%C3%A9"):
        query, lookup = (ask(pair[name].port, PATHS[name].replace("1001", item_id)) for name in PATHS)
        query.headers.pop("Date"), lookup.headers.pop("Date")
        assert lookup == query
        assert lookup.status == (200 if item_id in BOOKS else 404)
        assert lookup.headers.keys() == {"Server", "Content-Type", "Content-Length"}
        assert lookup.headers["Content-Type"] == "application/json"
        assert lookup.headers["Content-Length"] == {"1001": "65", "1002": "91"}.get(item_id, str(len(query.body)))


def test_the_front_end_relays_any_status_type_and_body_and_follows_no_redirect(start):
    body = b"\n " + bytes(range(256)) + b" \n"
    with Upstream() as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        for status in (200, 302, 404, 405, 500, 503):
            head = f"HTTP/1.1 {status} Any\r\ncontent-type: a/b; c=d\r\nLocation: http://{upstream.address}/x\r\n\r\n"
            upstream.behave = says(head.encode() + body)
            reply = ask(front_end.port, "/lookup/1001")
            assert (reply.status, reply.headers["Content-Type"], reply.body) == (status, "a/b; c=d", body)
            assert reply.headers["Location"] == f"http://{upstream.address}/x" and "Allow" not in reply.headers
        assert len(upstream.asked) == 6


def test_the_front_end_asks_anew_for_each_lookup(start):
    with Upstream() as upstream:
        upstream.behave = lambda connection, _: says(b"HTTP/1.0 200 OK\r\n\r\n%d" % len(upstream.asked))(connection)
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        assert [ask(front_end.port, "/lookup/1001").body for _ in range(3)] == [b"1", b"2", b"3"]


def test_head_is_answered_with_the_same_head_and_no_body(service):
    for path in (service.path, "/no/such/path"):
        get, head = (ask(service.port, path, method) for method in ("GET", "HEAD"))
        get.headers.pop("Date"), head.headers.pop("Date")
        assert head == (get.status, get.headers, b"")


def test_a_query_string_is_ignored(service):
    assert ask(service.port, f"{service.path}?x=1&/y?z").body == BOOKS["1001"]


def test_an_unknown_item_is_404_and_the_items_there_are_are_named(service):
    for item_id, shown in {"9": "9", "": "", "..": "..", "a%20b%2Fc%3F": "a b/c?"}.items():
        message = error(ask(service.port, service.path.replace("1001", item_id)), 404)
        assert message == f"no such item: {shown}; try one of 1001, 1002"


def test_any_other_path_is_404_and_the_path_that_works_is_named(service):
    base = service.path.rpartition("/")[0]
    for path in ("/", base, f"{base}/1001/more", f"{base.upper()}/1001", f"{base}//1001", "*", f"http://x{base}/1001"):
        assert error(ask(service.port, path), 404) == f"no such path: {path}; try GET {service.path}"


def test_a_method_other_than_get_and_head_is_405_and_those_are_named(service):
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW", 'B"REW'):
        reply = ask(service.port, service.path, method)
        assert error(reply, 405) == f"Unsupported method ({method!r}); try GET {service.path}"
        assert reply.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("name", PATHS)
def test_a_method_that_a_student_adds_is_called(start, tmp_path, name):
    method = '    def do_PUT(self):\n        self.reply(200, {"put": self.path}, [("X-New", "1")])\n\n'
    edit(tmp_path, f"{name}.py", "    # ---- A first reading", method + "    # ---- A first reading")
    edited = start(tmp_path / f"{name}.py")
    reply = ask(edited.port, PATHS[name], "PUT")
    assert (reply.status, json.loads(reply.body), reply.headers["X-New"]) == (200, {"put": PATHS[name]}, "1")
    assert ask(edited.port, PATHS[name], "POST").headers["Allow"] == "GET, HEAD, PUT"


def test_a_malformed_request_gets_its_status_and_a_reason_in_full(service):
    requests = [
        (400, b"garbage\r\n\r\n", "Bad request syntax ('garbage'); try GET {}"),
        (400, b"GET / HTTP/x\r\n\r\n", "Bad request version ('HTTP/x'); try GET {}"),
        (400, b"GET /a b HTTP/1.0\r\n\r\n", "Bad request syntax ('GET /a b HTTP/1.0'); try GET {}"),
        (400, b'"<script>\xff\x00 \r\n\r\n', "try GET {}"),
        (414, b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n", "Too Long; try GET {}"),
        (431, b"GET / HTTP/1.0\r\n" + b"Name: value\r\n" * 300 + b"\r\n", "Too many headers; "),
        (431, b"GET / HTTP/1.0\r\nName: " + b"a" * 70_000 + b"\r\n\r\n", "Line too long; got more than 65536 bytes"),
        (505, b"GET / HTTP/2.0\r\n\r\n", "try GET {}"),
    ]
    for status, request, words in requests:
        assert words.format(service.path) in error(send(service.port, request), status)


def test_an_error_is_json_whatever_byte_the_client_sent(service):
    for byte in range(256):
        reply = send(service.port, b"GET /%c HTTP/1.0\r\n\r\n" % byte)
        assert reply.status in (400, 404) and error(reply, reply.status)


# ---- When the catalog fails the front end ----


def test_a_catalog_that_cannot_be_reached_is_502_in_the_systems_words(start):
    with socket.socket() as taken:  # bound, but not listening: nobody else gets the port, and connections are refused
        taken.bind(("127.0.0.1", 0))
        refusing = f"127.0.0.1:{taken.getsockname()[1]}"
        for address in (refusing, "255.255.255.255:80", "no-such-host.invalid:8080", "a..b", "x" * 64 + ":80"):
            front_end = start("front_end.py", CATALOG_ADDRESS=address)
            reason = no_answer(ask(front_end.port, "/lookup/1001"), 502, address)
            if address == refusing and os.name == "posix":
                assert reason == os.strerror(errno.ECONNREFUSED)
            assert reason in front_end.logged(f"no answer from the catalog at {address}: ")


def test_a_catalog_that_hangs_up_or_speaks_garbage_or_cuts_its_body_short_is_502(start):
    head = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n"
    answers = {
        b"": "RemoteDisconnected",
        b"SSH-2.0-OpenSSH_9.2\r\n": "SSH-2.0",
        b"x" * 1000 + b"\r\n\r\n": "BadStatusLine",
        b"\x00\xff\r\n\r\n\r\n": "BadStatusLine",
        b"HTTP/2 200\r\n\r\n": "HTTP/2",
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
            assert words in reason and len(reason) <= 200
    assert "Traceback" not in front_end.logged("no answer from the catalog", times=len(answers))


def test_a_catalog_that_is_silent_or_never_ends_is_504_after_5_seconds_even_during_a_stop(start):
    head, chunked = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
    behaviours = [
        says(b"", then=b""),
        says(head[:9], then=b""),
        says(head + b"Content-Length: 65\r\n\r\n", then=b""),
        says(head + b"Content-Length: 65\r\n\r\n{", then=b""),
        says(head[:9], then=b"9"),
        says(head, then=b"N"),
        says(head, then=b"Name: value\r\n"),
        says(head + b"\r\n", then=b"x"),
        says(head + b"Content-Length: 65000\r\n\r\n", then=b"x"),
        says(head + chunked + b"ffff\r\n", then=b"x"),
        says(head + chunked, then=b"1\r\nx\r\n"),
        says(b"", then=b"HTTP/1.1 100 Continue\r\n\r\n"),
        says(head + chunked, then=b"1\r\nx\r\n" * 10_000, pause=0),  # never makes the front end wait
    ]
    numbers = range(len(behaviours))
    with Upstream(lambda connection, item_id: behaviours[int(item_id)](connection)) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        port = front_end.port

        def lookup(number):
            begun = time.monotonic()
            reply = ask(port, f"/lookup/{number}")
            return reply, time.monotonic() - begun

        with ThreadPoolExecutor(len(numbers)) as clients:
            lookups = [clients.submit(lookup, number) for number in numbers]
            wait_until(lambda: len(upstream.asked) == len(numbers), lambda: front_end.log)
            front_end.interrupt()
            for reply, seconds in (lookup.result(WAIT) for lookup in lookups):
                assert no_answer(reply, 504, upstream.address) == "timed out after 5 seconds" and seconds > 4.9
        assert front_end.end() == 0
        assert front_end.log.count("timed out after 5 seconds") == len(numbers) and "Traceback" not in front_end.log


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
        assert no_answer(ask(front_end.port, "/lookup/1001"), 504, address) == "timed out after 5 seconds"


def test_the_front_end_serves_again_once_the_catalog_is_back(start):
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


def test_whatever_the_client_sends_the_catalog_is_asked_for_one_item_or_not_at_all(start):
    odd = ["..", ".", "", "%2e%2e", "%2f..", "..%2f..", "%0d%0aX:%20y", "a%20b", "@host", "@host:1/x", "%", "%zz",
           "%00", "%ff", "\xe9", "\x01", "\x7f", "#x", ";x", "a:b", "\\", "%5c..", "1001%3fx", "//x", "[::1]", "&",
           "+", "../x"]
    paths = [f"/lookup/{item}" for item in odd]
    paths += ["http://127.0.0.1:1/lookup/1001", "//127.0.0.1:1/lookup/1001", "@host/lookup/1001", "lookup/1001"]
    with Upstream(says(b"HTTP/1.0 200 OK\r\n\r\n")) as upstream:
        front_end = start("front_end.py", CATALOG_ADDRESS=upstream.address)
        answers = [ask(front_end.port, path).status for path in paths]
        assert set(answers) == {200, 404} and answers.count(200) == len(upstream.asked) == 25
        for request in upstream.asked:
            assert re.match(r"GET /query/[!-.0-~]* HTTP/1\.1\r\n", request), request
            assert f"\r\nHost: {upstream.address}\r\n" in request
        assert "Traceback" not in front_end.log


def test_an_item_id_reaches_the_catalog_as_the_client_wrote_it(start, tmp_path):
    name = "C\N{LATIN SMALL LETTER E WITH ACUTE}line & co / 100%?"
    catalog = start(edit(tmp_path, "catalog.py", '"1001":', f"{name!r}:"))
    front_end = start("front_end.py", CATALOG_ADDRESS=catalog.address)
    assert ask(front_end.port, "/lookup/C%C3%A9line%20%26%20co%20%2F%20100%25%3F").body == BOOKS["1001"]


# ---- As a process: start, settings, log ----


def test_the_readmes_first_command_runs_both_on_their_own_ports_and_ctrl_c_ends_both(start):
    for port in (8080, 8000):
        try:
            socket.create_server(("", port)).close()
        except OSError as reason:
            pytest.skip(f"port {port}: {reason.strerror}")
    if os.name == "posix":
        command = re.search(r"^python3 .* \| python3 .*$", read("README.md"), re.MULTILINE)[0]
        command = command.replace("python3", shlex.quote(sys.executable))
        services = [start(None, command=["sh", "-c", f"trap : INT; {command}"], PORT=None)]
    else:  # cmd's pipe is not at hand everywhere
        services = [start("catalog.py", PORT=None), start("front_end.py", PORT=None)]
    for service in services:
        service.logged(", try /", times=2 // len(services))
    assert ask(8000, "/lookup/1001").body == ask(8080, "/query/1001").body == BOOKS["1001"]
    for service in services:
        service.interrupt()
    assert [service.end() for service in services] == [0] * len(services)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 without being asked")
def test_they_listen_on_every_address(service):
    assert ask(service.port, service.path, host="127.0.0.2").body == BOOKS["1001"]


@both
def test_an_argument_prints_the_docstring_and_ends(start, script):
    expected = {("-h",): 0, ("--help",): 0, ("9000",): 2, ("-h", "9000"): 2}
    bad = {"PORT": "not a port", "CATALOG_ADDRESS": "not an address"}  # help comes first
    services = {arguments: start(script, arguments=arguments, **bad) for arguments in expected}
    assert {arguments: service.end() for arguments, service in services.items()} == expected
    for service in services.values():
        assert "from the environment:\n    PORT " in service.process.stdout.read() and service.log == ""


@both
def test_a_bad_port_ends_it_with_one_line(start, script):
    for service in [start(script, PORT=port) for port in ("eighty", "", "-1", "65536", "9" * 20, "80.5")]:
        assert service.end() == 1
        assert re.fullmatch(r"\w+: can't listen on PORT=.*: .*; set PORT to another number\n", service.log)


def test_a_port_in_use_ends_it_with_one_line_in_the_systems_words(start, service):
    second = start("catalog.py", PORT=str(service.port))
    assert second.end() == 1
    expected = rf"catalog: can't listen on PORT={service.port}: (.*); set PORT to another number\n"
    reason = re.fullmatch(expected, second.log)[1]
    assert os.name != "posix" or reason == os.strerror(errno.EADDRINUSE)


def test_a_port_that_is_not_permitted_ends_it_with_one_line(start):
    bind = [sys.executable, "-c", "import socket; socket.create_server(('', 81))"]
    for wrapper in ([], ["setpriv", "--bounding-set=-net_bind_service"]):  # the second takes the right from root
        with contextlib.suppress(FileNotFoundError):
            done = subprocess.run([*wrapper, *bind], capture_output=True, text=True, check=False)
            if "PermissionError" in done.stderr:
                break
    else:
        pytest.skip("everybody may listen on port 81 here")
    service = start("catalog.py", command=[*wrapper, sys.executable, str(HERE / "catalog.py")], PORT="81")
    assert service.end() == 1
    assert service.log.startswith("catalog: can't listen on PORT=81: ") and service.log.count("\n") == 1


def test_a_catalog_address_is_taken_if_it_is_good_and_ends_the_front_end_with_one_line_if_it_is_bad(start):
    good = ["catalog", "my_catalog-1.example:80", "10.0.2.15:65535", "[::1]", "[fe80::1]:8080"]
    bad = ["http://catalog", "catalog/x", "a b", " catalog", "user@catalog", "", ":80", "catalog:", "catalog:0",
           "catalog:65536", "catalog:http", "::1", "fe80::1:80", "[::1", "[catalog]:80", "catalog?x", "catalog\n"]
    for address, service in [(address, start("front_end.py", CATALOG_ADDRESS=address)) for address in good + bad]:
        if address in good:
            expected = f"front_end: listening on port {service.port}, try /lookup/1001 (catalog at {address})\n"
        else:
            expected = f"front_end: bad CATALOG_ADDRESS {address!r}; set it to host, host:port or [IPv6]:port\n"
            assert service.end() == 1
        assert service.log == expected


def test_the_catalog_may_have_an_ipv6_address(start):
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as reason:
        pytest.skip(f"no IPv6 here: {reason}")
    with listener:
        listener.settimeout(WAIT)
        front_end = start("front_end.py", CATALOG_ADDRESS=f"[::1]:{listener.getsockname()[1]}")
        with connect(front_end.port) as client:
            client.sendall(b"GET /lookup/1001 HTTP/1.0\r\n\r\n")
            with listener.accept()[0] as connection:
                assert connection.recv(65536).startswith(b"GET /query/1001 ")


def test_the_log_has_one_line_for_a_request_with_the_clients_address(start):
    catalog = start("catalog.py")
    for path in ("/query/1001", "/query/9"):
        ask(catalog.port, path)
    lines = catalog.logged("404").splitlines()[1:]
    assert [re.sub(r"\[.*?\]", "[]", line) for line in lines] == [
        '127.0.0.1 - - [] "GET /query/1001 HTTP/1.1" 200 -',
        '127.0.0.1 - - [] "GET /query/9 HTTP/1.1" 404 -',
    ]


def test_a_bug_in_an_edit_shows_its_traceback_and_the_service_goes_on(start, tmp_path):
    catalog = start(edit(tmp_path, "catalog.py", "if item_id in ITEMS:", "if item_id in TIEMS:"))
    with connect(catalog.port) as client:
        client.sendall(b"GET /query/1001 HTTP/1.0\r\n\r\n")
        assert read_all(client) == b""
    assert "Traceback" in catalog.logged("NameError: name 'TIEMS'")
    assert ask(catalog.port, "/").status == 404


@pytest.mark.parametrize("redirect", [None, "2>&-", ">&- 2>&-", "2>>log"], ids=["no-reader", "closed", "both", "full"])
@both
def test_a_log_that_nobody_takes_costs_no_reply_and_no_status(start, pair, tmp_path, script, redirect):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {"PORT": str(port), "CATALOG_ADDRESS": pair["catalog"].address}
    if redirect:
        if os.name != "posix":
            pytest.skip("there is no POSIX shell")
        (tmp_path / "log").write_bytes(b"x" * 1024)  # all that ulimit allows
        shell = f'cd {shlex.quote(str(tmp_path))}; ulimit -f 1; exec "$0" "$@" {redirect}'
        service = start(None, command=["sh", "-c", shell, sys.executable, str(HERE / script)], **settings)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        service = start(script, stderr=writer, **settings)
        os.close(writer)

    def listens():
        with contextlib.suppress(ConnectionError):
            return ask(port, "/").status

    wait_until(listens, lambda: "it never listened")
    assert [ask(port, PATHS[script[:-3]]).status for _ in range(20)] == [200] * 20
    service.interrupt()
    assert service.end() == 0


# ---- Load and abuse ----


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


def test_500_clients_at_the_same_instant_are_all_answered(pair, crowd):
    gate = threading.Barrier(500)

    def lookup(_):
        gate.wait(WAIT)
        return ask(pair["front_end"].port, "/lookup/1001").body

    with ThreadPoolExecutor(500) as clients:
        assert set(clients.map(lookup, range(500))) == {BOOKS["1001"]}


def test_400_clients_that_never_finish_keep_nobody_out_and_are_let_go_after_5_seconds(start, pair, crowd):
    front_end = start("front_end.py", CATALOG_ADDRESS=pair["catalog"].address)
    begun = time.monotonic()
    clients = [connect(front_end.port) for _ in range(400)]
    for client in clients[200:300]:
        client.sendall(b"GET /lookup/1001 HTTP/1.0\r\nName: ")
    while time.monotonic() < begun + 4:  # one byte now and then keeps no connection
        for client in clients[:200]:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"G")
        assert ask(front_end.port, "/lookup/1001").body == BOOKS["1001"]
        time.sleep(0.5)
    assert read_all(clients[-1]) == b"" and time.monotonic() - begun > 4.9
    for client in clients:
        with contextlib.suppress(ConnectionError):
            assert read_all(client) == b""
        client.close()
    front_end.logged("Request timed out", times=400)
    front_end.interrupt()
    assert front_end.end() == 0 and "Traceback" not in front_end.log


# ---- Stop ----


@both
@pytest.mark.parametrize("how", ["interrupt", pytest.param("terminate", marks=posix)])
def test_an_idle_service_stops_with_status_0_and_without_a_word(start, script, how):
    service = start(script)
    service.logged(", try /")
    getattr(service, how)()
    assert service.end() == 0 and len(service.lines) == 1


@both
def test_a_stop_does_not_wait_for_the_coarse_clock_of_windows(start, script):
    program = "import runpy, socketserver, sys, time; socketserver.time = lambda: int(time.monotonic() * 64) / 64; "
    program += f"sys.argv = sys.argv[:1]; runpy.run_path({str(HERE / script)!r}, run_name='__main__')"
    service = start(None, command=[sys.executable, "-c", program])
    service.logged(", try /")
    begun = time.monotonic()
    service.interrupt()
    assert service.end() == 0 and time.monotonic() - begun < 10  # 1024 ticks of 1/64 s would take 16


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

        def refuses():
            try:
                connect(port).close()
            except ConnectionError:
                return True

        wait_until(refuses, lambda: "still takes connections")
        getattr(front_end, how)()  # the impatient second Ctrl-C
        release.set()
        assert {lookup.result(WAIT).body for lookup in lookups} == {BOOKS["1001"]}
        assert front_end.end() == 0 and "Traceback" not in front_end.log


def test_a_stop_still_serves_the_connections_that_wait_to_be_accepted(start, crowd):
    catalog = start("catalog.py")
    clients = [connect(catalog.port) for _ in range(300)]
    for client in clients:
        client.sendall(b"GET /query/1001 HTTP/1.0\r\n\r\n")
    catalog.interrupt()
    assert {parse(read_all(client)).body for client in clients} == {BOOKS["1001"]}
    for client in clients:
        client.close()
    assert catalog.end() == 0


def test_a_stop_does_not_wait_longer_than_5_seconds_for_silent_clients(start):
    catalog = start("catalog.py")
    with connect(catalog.port), connect(catalog.port) as client:
        client.sendall(b"GET /query/1001 HTTP")
        ask(catalog.port, "/query/1001")  # the two before have been accepted by now
        catalog.interrupt()
        assert catalog.end() == 0 and catalog.log.count("Request timed out") == 2


# ---- In containers: the steps of the README, on a real engine ----


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
def test_docker_stop_ends_it_with_status_0_and_not_by_a_kill(run, name):
    container = run(name)
    docker("stop", container.id)
    assert docker("inspect", "-f", "{{.State.ExitCode}}", container.id) == "0"


def test_hardened_containers_serve_as_any_other(network, run):
    hardened = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", network)
    run("catalog", *hardened, "--network-alias", "catalog")
    front_end = run("front_end", *hardened)
    assert ask_inside(front_end) == BOOKS["1001"]


# ---- The texts: the two files, the README ----


def test_what_both_scripts_need_is_the_same_text_in_both():
    texts = [read(script) for script in ("catalog.py", "front_end.py")]
    catalog, front_end = (text.partition("    # ---- A first reading")[2] for text in texts)
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

    texts = [read(name) for name in ("README.md", "catalog.py", "front_end.py")]
    texts[1:] = [text.split('"""')[1] for text in texts[1:]]
    shown = [line.strip() for text in texts for line in text.splitlines()] + re.findall("`([^`\n]+)`", texts[0])
    begins = ('{"data":{"name":"', '{"error":{"code":5', "catalog: ", "front_end: ", "no such path: ")
    shown = [line for line in shown if line.startswith(begins) or re.match(r"[\d.]+ - - \[", line)]

    known = {shape(line) for line in said}
    assert [line for line in shown if shape(line) not in known] == []
    assert [begin for begin in begins if not any(line.startswith(begin) for line in shown)] == []


def test_the_readme_names_the_defaults_the_limits_and_the_files_that_there_are(start):
    readme = read("README.md")
    program = "import catalog as c, front_end as f; "
    program += "print(c.PORT, f.PORT, f.CATALOG_ADDRESS, c.CLIENT_TIMEOUT, f.CLIENT_TIMEOUT, f.CATALOG_TIMEOUT)"
    run = start(None, command=[sys.executable, "-B", "-c", program], PORT=None)
    assert run.end() == 0
    *ports, address, client, client_too, catalog = run.process.stdout.read().split()
    dockerfiles = [read(f"Dockerfile.{name}") for name in PATHS]
    images = [dict(re.findall(r"(\w+)=(\S+)", text)) for text in dockerfiles]
    assert f"| `PORT` | catalog | `{ports[0]}` | `{images[0]['PORT']}` |" in readme
    assert f"| `PORT` | front end | `{ports[1]}` | `{images[1]['PORT']}` |" in readme
    assert f"| `CATALOG_ADDRESS` | front end | `{address}` | `{images[1]['CATALOG_ADDRESS']}` |" in readme
    assert client == client_too == re.search(r"whole request after (\d+) seconds is let go", readme)[1]
    assert catalog == re.search(r"timed out after (\d+) seconds", readme)[1]
    for name in re.findall(r"\b(?:\w+\.py|Dockerfile\.\w+)\b", readme):
        assert (HERE / name).is_file(), name


# ---- Tools: processes ----


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def edit(folder, script, old, new):
    """Write a script with an edit into a folder; return its path."""
    assert read(script).count(old) == 1
    (folder / script).write_text(read(script).replace(old, new), encoding="utf-8")
    return folder / script


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


@contextlib.contextmanager
def stopping():
    """Give a function that starts a service; stop all that it started at the end."""
    with contextlib.ExitStack() as stack:

        def start(*args, **settings):
            service = Service(*args, **settings)
            stack.callback(service.stop)
            return service

        yield start


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


@pytest.fixture(scope="module", autouse=True)
def open_files():
    """How many files the tests and what they start may open: as many as a crowd needs, if the system lets them."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are not limited in this way
        return 4096
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < 4096:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.fixture
def crowd(open_files):
    if open_files < 4096:
        pytest.skip("a process may not open 4096 files here")


# ---- Tools: HTTP ----


class Reply(NamedTuple):
    status: int
    headers: dict
    body: bytes


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
    assert reply.headers["Content-Type"] == "application/json" and ("Allow" in reply.headers) == (status == 405)
    assert int(reply.headers["Content-Length"]) == len(reply.body) and reply.body.endswith(b"}\n")
    content = json.loads(reply.body)
    assert content == {"error": {"code": status, "message": content["error"]["message"]}}
    return content["error"]["message"]


def no_answer(reply, status, address):
    """Check that a reply is the front end's error for a catalog that does not answer; return the reason it gives."""
    begin, end = f"no answer from the catalog at {address}: ", "; start it there, or set CATALOG_ADDRESS to where it is"
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

    def finish_request(self, connection, _):
        with contextlib.suppress(OSError):
            request = connection.recv(65536).decode("latin-1")
            self.asked.append(request)
            self.behave(connection, request.split()[1].rpartition("/")[2])

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


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
    return done.stdout.strip()


class Container:
    """A container in the background, started by `docker run` with these arguments."""

    def __init__(self, *arguments):
        self.id = docker("run", "--detach", "--label", MARK, *arguments)
        self.logged(", try /")

    def logged(self, text):
        """Wait until text stands in the log; return the log."""
        log = ["docker", "logs", self.id]
        read_log = lambda: subprocess.run(log, check=False, stderr=subprocess.PIPE, text=True).stderr
        wait_until(lambda: text in read_log(), lambda: f"no {text!r} in the log:\n{read_log()}")
        return read_log()

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
            done = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True, timeout=300)
            return done.returncode and done.stderr.strip()
        except OSError as error:
            return error

    missing = pytest.fail if os.environ.get("NEED_DOCKER") else pytest.skip
    if reason := problem("version"):
        missing(f"no Docker engine answers: {reason}")
    if problem("image", "inspect", BASE) and (reason := problem("pull", BASE)):
        missing(f"no base image: {reason}")
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
