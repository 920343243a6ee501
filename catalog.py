"""The catalog: answers GET /query/<item_id> with one book as JSON.

    $ python3 catalog.py
    catalog: listening on port 8080, try /query/1001

    $ curl localhost:8080/query/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Setting, from the environment, as in `PORT=9000 python3 catalog.py`:
    PORT    TCP port to listen on (default 8080; 0 means any free port)

Any other request gets an error status and {"error":{"code":404,"message":"..."}}.
Ctrl-C or SIGTERM (the signal that `docker stop` sends) ends it, after an answer to each client that has connected.
Left out: HTTPS, log-in, more than one request a connection, a database (edit ITEMS and start again).
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
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

NAME, EXAMPLE = "catalog", "/query/1001"
PORT = os.environ.get("PORT", "8080")
TIMEOUT = 5  # seconds in which a client must send its whole request
ITEMS = {
    "1001": {"name": "RPCs for Dummies", "price": 14.99, "quantity": 10},
    "1002": {"name": "Xen and the Art of Surviving Graduate School", "price": 9.99, "quantity": 5},
}


class Handler(BaseHTTPRequestHandler):
    """One request. handle(), below, makes a Handler for it; the base class reads it and calls do_GET for a GET."""

    def do_GET(self):
        """Reply with the item that the path names, or with an error."""
        path = self.path.partition("?")[0]  # "/query/1001?x=1" -> "/query/1001"
        item_id = unquote(path.removeprefix("/query/"))  # "/query/a%20b" -> "a b"
        if path.startswith("/query/") and item_id in ITEMS:
            self.reply(200, {"data": ITEMS[item_id]})
        elif path.startswith("/query/"):
            self.send_error(404, f"no such item: {item_id}", f"try one of {', '.join(ITEMS)}")
        else:
            self.send_error(404, f"no such path: {path}")

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


if __name__ == "__main__":
    sys.exit(__doc__ if sys.argv[1:] else main())
