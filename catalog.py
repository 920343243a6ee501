"""The catalog: answers GET /query/<item_id> with one book as JSON.

    $ python catalog.py
    catalog: listening on port 8080, try /query/1001

    $ curl localhost:8080/query/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Setting, from the environment:
    PORT    TCP port to listen on (default 8080; 0 means any free port)

Anything else gets its HTTP status and {"error":{"code":404,"message":"..."}}.
Ctrl-C or SIGTERM stops it as soon as the requests in flight are answered.
Left out: HTTPS, log-in, keep-alive, a database (edit ITEMS and start again).
"""
import io, json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import unquote

NAME, EXAMPLE = "catalog", "/query/1001"
START = f"try {EXAMPLE}"  # ends the start line
PORT = os.environ.get("PORT", "8080")
TIMEOUT = 5  # seconds that a client has to send its request
ITEMS = {
    "1001": {"name": "RPCs for Dummies", "price": 14.99, "quantity": 10},
    "1002": {"name": "Xen and the Art of Surviving Graduate School", "price": 9.99, "quantity": 5},
}


class Handler(BaseHTTPRequestHandler):
    """One request: http.server parses it and calls do_GET for a GET, do_POST for a POST, and so on."""

    def do_GET(self):
        """Answer with the item, or with 404."""
        path, _, item_id = self.path.partition("?")[0].rpartition("/")
        item_id = unquote(item_id)
        if path != "/query":
            self.send_error(404, f"no such path: {self.path}")
        elif item_id not in ITEMS:
            self.send_error(404, f"no such item: {item_id}")
        else:
            self.reply(200, {"data": ITEMS[item_id]})

    # ---- From here on, catalog.py and front_end.py are the same text (but for check_address) ----

    # HTTP/1.0, one request a connection, is a decision: busy clients don't keep newcomers waiting,
    # a stop can finish what is in flight, and nothing of one request leaks into the next.
    protocol_version = default_request_version = "HTTP/1.0"
    wbufsize = -1  # send a reply in one piece
    do_HEAD = do_GET
    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = lambda self: self.send_error(405)

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Incoming(self.connection))

    def reply(self, status, body, headers={"Content-Type": "application/json"}):
        """Send status, headers and body: bytes as they are, any other value as JSON, nothing for HEAD."""
        if not isinstance(body, bytes):
            body = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=f"try GET {EXAMPLE}"):
        """Reply with what is wrong and what to do. For a malformed request, http.server calls this."""
        message = f"{message or self.responses[code][0]}; {explain}"
        self.reply(code, {"error": {"code": code, "message": message}})


class Incoming(io.RawIOBase):
    """What a client sends, with one deadline for all of it: else one byte now and then holds a thread for ever."""

    def __init__(self, connection):
        self.connection, self.end = connection, time.monotonic() + TIMEOUT

    def readable(self):
        return True

    def readinto(self, buffer):
        self.connection.settimeout(max(0.001, self.end - time.monotonic()))
        return self.connection.recv_into(buffer)


class Server(ThreadingHTTPServer):
    """Accepts connections, and hands each to a thread of a pool."""

    pool = ThreadPoolExecutor(1000)  # threads, started as needed; the program ends when they are done
    allow_reuse_address = os.name == "posix"  # on Windows this would let two servers share a port
    request_queue_size = 1024  # connections that may wait in line; http.server's 5 keeps a crowd out
    timeout = 0.05  # seconds that handle_request() waits for a connection; 0 from stop() on

    def server_bind(self):
        super(HTTPServer, self).server_bind()  # not HTTPServer's: its DNS lookup can take seconds

    def process_request(self, request, client_address):
        self.pool.submit(self.process_request_thread, request, client_address)

    def handle_error(self, request, client_address):
        """Show the traceback of a bug, but not that a client has gone away."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def stop(self, *_):
        """Handle a signal: let main() know that it is time to stop."""
        self.timeout = 0


def main():
    """Serve until Ctrl-C (SIGINT) or SIGTERM."""
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        server = Server(("", int(PORT)), Handler)
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        sys.exit(f"{NAME}: can't listen on PORT={PORT}: {reason}; set PORT to another number")
    signal.signal(signal.SIGINT, server.stop)
    signal.signal(signal.SIGTERM, server.stop)
    print(f"{NAME}: listening on port {server.server_address[1]}, {START}", file=sys.stderr)
    while server.timeout:
        server.handle_request()
    for _ in range(server.request_queue_size):  # who waits in line already is still served
        server.handle_request()
    server.server_close()


if __name__ == "__main__":
    main()
