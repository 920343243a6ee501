"""The front end: answers GET /lookup/<item_id> by asking the catalog, and relays its answer.

    $ python3 front_end.py
    front_end: listening on port 8000, try /lookup/1001 (catalog at 127.0.0.1:8080)

    $ curl localhost:8000/lookup/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Settings, from the environment, as in `PORT=9000 CATALOG_ADDRESS=10.0.2.15:8080 python3 front_end.py`:
    PORT             TCP port to listen on (default 8000; 0 means any free port)
    CATALOG_ADDRESS  where the catalog is: host, host:port or [IPv6]:port (default 127.0.0.1:8080)

An error of the catalog is relayed too. Without an answer from the catalog, the status is 502, or 504 after 5 seconds.
Ctrl-C or SIGTERM (the signal that `docker stop` sends) ends it, after an answer to each client that has connected.
Left out: HTTPS, log-in, more than one request a connection, a cache, a limit for the size of an answer.
"""
import json
import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from urllib.parse import quote
from urllib.request import HTTPHandler, OpenerDirector

NAME, EXAMPLE = "front_end", "/lookup/1001"
PORT = os.environ.get("PORT", "8000")
CATALOG_ADDRESS = os.environ.get("CATALOG_ADDRESS", "127.0.0.1:8080")
TIMEOUT = 5  # seconds in which a client must send its whole request, and the catalog its whole answer


class Handler(BaseHTTPRequestHandler):
    """One request. handle(), below, makes a Handler for it; the base class reads it and calls do_GET for a GET."""

    def do_GET(self):
        """Reply with what the catalog says of the item that the path names, or with an error."""
        path = self.path.partition("?")[0]  # "/lookup/1001?x=1" -> "/lookup/1001"
        if path.startswith("/lookup/"):
            item_id = quote(path.removeprefix("/lookup/"), safe="%")  # "a/b" -> "a%2Fb", and "a%2Fb" stays as it is
            self.relay(f"/query/{item_id}")
        else:
            self.send_error(404, f"no such path: {path}")

    def relay(self, path):
        """Ask the catalog for a path, and reply with its answer; without an answer, with 502 or 504."""
        try:
            with CATALOG.open(f"http://{CATALOG_ADDRESS}{path}", timeout=TIMEOUT) as answer:  # CATALOG: see the end
                body = answer.read()
        except (OSError, HTTPException, ValueError, OverflowError, MemoryError) as error:  # by a bad address or answer
            cause = getattr(error, "reason", error)  # urllib wraps the system's error in one of its own
            status = 504 if isinstance(cause, socket.timeout) else 502
            message = f"no answer from the catalog at {CATALOG_ADDRESS}: {cause}"
            self.send_error(status, message, "start it there, or set CATALOG_ADDRESS to host:port")
        else:
            self.reply(answer.status, body, answer.headers.get("Content-Type", "application/octet-stream"))

    # ---- A first reading may stop here. The text from here to the end of main() is the same in both scripts. ----

    do_HEAD = do_GET  # HEAD asks for the same as GET, without the body
    default_request_version = "HTTP/1.0"  # else a request that can't be read would get a reply without a status
    wbufsize = -1  # collect what is written to wfile, to send a reply in one piece

    def reply(self, status, body, content_type="application/json"):
        """Send the whole reply. body: bytes, or a value to send as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def send_error(self, code, message=None, hint=f"try GET {EXAMPLE}"):
        """Reply with what is wrong (by default the name of the status) and what to do. http.server calls this too."""
        self.reply(code, {"error": {"code": code, "message": f"{message or self.responses[code][0]}; {hint}"}})

    def log_message(self, *args):
        """Write a line to the log. If stderr is closed (None) or can't take it, the reply must be sent all the same."""
        with suppress(AttributeError, OSError):
            super().log_message(*args)


class Connection(socket.socket):
    """A connection that may be read for TIMEOUT seconds in all. A plain socket's timeout starts again at each byte."""

    end = None  # the first read sets it

    def recv_into(self, *args):
        """Read bytes, or raise socket.timeout. http.server and http.client read by this method only."""
        self.end = self.end or time.monotonic() + TIMEOUT
        left = self.end - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")  # noqa: UP041 (TimeoutError is the same from Python 3.10 on)
        self.settimeout(left)
        return super().recv_into(*args)


def handle(accepted, address):
    """Answer one client. accepted: the socket that listener.accept() made for it; address: the client's."""
    with Connection(fileno=accepted.detach()) as connection:  # the same socket, as a Connection
        try:
            Handler(connection, address, None)  # reads the request, calls do_GET; None: it needs no server
        except Exception as error:  # log a bug, which the pool would hide
            if not isinstance(error, ConnectionError):  # that the client has gone is no bug
                logging.getLogger(NAME).exception("a bug in this script")
        connection.shutdown(socket.SHUT_WR)  # the client gets the whole reply, even if it still sends


def main(note=""):
    """Serve until a signal comes. note: what the first line of the log says after the port."""
    try:  # "" is every address of this machine; backlog: how many connections may wait to be accepted
        listener = socket.create_server(("", int(PORT)), backlog=1024)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"{NAME}: can't listen on PORT={PORT}: {error}")
    stop = []  # not empty once a signal has come
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT is Ctrl-C
        signal.signal(number, lambda *args: stop.append(args))
    # unlike print(), logging never fails; without settings it writes warnings, as they are, to stderr
    logging.getLogger(NAME).warning(f"{NAME}: listening on port {listener.getsockname()[1]}, try {EXAMPLE}{note}")
    with ThreadPoolExecutor(1000) as pool, listener:  # at the end, close the listener, then wait for the threads
        turns = 1024  # after a signal: one for each connection that may be waiting
        while turns:
            listener.settimeout(0 if stop else 0.05)  # seconds to wait for a connection
            with suppress(OSError, RuntimeError):  # none came, or the system is out of files or threads
                pool.submit(handle, *listener.accept())
            if stop:
                turns -= 1


# ---- The rest is in front_end.py alone: how it asks the catalog. ----
class CatalogConnection(HTTPConnection):
    """A connection to the catalog: TIMEOUT seconds to connect, and again for the whole answer."""

    def connect(self):
        super().connect()
        self.sock = Connection(fileno=self.sock.detach())
        self.sock.settimeout(TIMEOUT)  # for sending the request


class CatalogHandler(HTTPHandler):
    """Makes urllib.request use a CatalogConnection."""

    def http_open(self, request):
        return self.do_open(CatalogConnection, request)


# Unlike urlopen(), this uses no proxy, follows no redirect, and takes a 404 or 503 for an answer like any other.
CATALOG = OpenerDirector()
CATALOG.add_handler(CatalogHandler())


if __name__ == "__main__":
    if "/" in CATALOG_ADDRESS:
        sys.exit(f"{NAME}: bad CATALOG_ADDRESS {CATALOG_ADDRESS}; set it to host:port, without http://")
    sys.exit(__doc__ if sys.argv[1:] else main(f" (catalog at {CATALOG_ADDRESS})"))
