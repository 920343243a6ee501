"""The catalog: answers GET /query/<item_id> with one book as JSON.

    $ python3 catalog.py
    catalog: listening on port 8080, try /query/1001

    $ curl localhost:8080/query/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Setting, from the environment, as in `PORT=9000 python3 catalog.py`:
    PORT    TCP port to listen on (default 8080; 0 means any free port)

An error is a status such as 404 with {"error":{"code":404,"message":"..."}}.
Ctrl-C or SIGTERM (the signal that `docker stop` sends) ends it, after a reply to every request accepted before.
Left out: HTTPS, log-in, IPv6, more than one request a connection, decoding of item ids, a database (edit ITEMS and
start again), protection against thousands of slow clients (only 5 seconds of silence end a connection).
"""
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = os.environ.get("PORT", "8080")
ITEMS = {
    "1001": {"name": "RPCs for Dummies", "price": 14.99, "quantity": 10},
    "1002": {"name": "Xen and the Art of Surviving Graduate School", "price": 9.99, "quantity": 5},
}


def to_json(value):
    """Return a value as JSON: bytes, without spaces, with a newline at the end."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class Handler(BaseHTTPRequestHandler):
    """Replies to one request. The base class reads the request, sets self.path, and calls do_GET for a GET."""

    def do_GET(self):
        """Reply with the item that the path names, or with an error."""
        path = self.path.partition("?")[0]  # "/query/1001?x=1" -> "/query/1001"
        route, _, item_id = path.rpartition("/")  # "/query/1001" -> "/query", "/", "1001"
        if route != "/query":
            self.send_error(404, f"no such path: {path}; try /query/1001")
        elif item_id not in ITEMS:
            self.send_error(404, f"no such item: {item_id}; try one of {', '.join(ITEMS)}")
        else:
            self.reply(200, to_json({"data": ITEMS[item_id]}))

    do_HEAD = do_GET  # reply() leaves out the body

    def reply(self, code, body, content_type="application/json"):
        """Send a whole reply: a status code, the headers, and a body of bytes. Every reply is sent by this method."""
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        """Log an error and reply with it as JSON. The base class calls this too, for a request that it can't read."""
        message = message or self.responses[code][0]  # by default the name of the status
        self.log_error("%s", message)
        self.reply(code, to_json({"error": {"code": code, "message": message}}))

    # ---- A first reading may stop here. Above: the answers. Below: how it runs (slow clients, many clients, stopping).

    timeout = 5  # seconds of silence after which a client is disconnected
    wbufsize = -1  # a buffer of the default size for wfile, so that headers and body are sent in one piece

    def log_message(self, *args):
        """Write a line to the log, stderr. If it can't be written (the terminal was closed), still reply."""
        with suppress(OSError):
            super().log_message(*args)


class Server(ThreadingHTTPServer):
    """Accepts connections. A Handler serves each, in one of at most 1000 threads, each reused."""

    allow_reuse_address = os.name != "nt"  # restart at once; on Windows it would share the port
    request_queue_size = 1024  # connections that may wait to be accepted
    timeout = 0.5  # seconds that handle_request waits for a connection
    pool = ThreadPoolExecutor(1000)
    running = True

    def process_request(self, request, client_address):
        """Let a thread of the pool serve a connection (request is its socket) and close it."""
        self.pool.submit(self.process_request_thread, request, client_address)

    def handle_error(self, request, client_address):
        """Log the traceback of a bug in Handler. A client that has closed the connection is not a bug."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def stop(self, number, frame):
        """End the loop in main(). Called on a signal, with its number and the code that it interrupted."""
        self.running = False


def main():
    """Serve until Ctrl-C or SIGTERM."""
    try:
        server = Server(("", int(PORT)), Handler)  # "" means every address of this machine
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"catalog: can't listen on PORT={PORT}: {error}")
    signal.signal(signal.SIGINT, server.stop)  # SIGINT is Ctrl-C
    signal.signal(signal.SIGTERM, server.stop)
    print(f"catalog: listening on port {server.server_port}, try /query/1001", file=sys.stderr)
    while server.running:
        server.handle_request()
    server.server_close()  # accepts no more
    server.pool.shutdown()  # waits for the replies under way


if __name__ == "__main__":
    sys.exit(__doc__ if sys.argv[1:] else main())
