"""The front end: answers GET /lookup/<item_id> by asking the catalog, and relays its answer.

    $ python front_end.py
    front_end: listening on port 8000, try /lookup/1001 (catalog at localhost:8080)

    $ curl localhost:8000/lookup/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Settings, from the environment:
    PORT             TCP port to listen on (default 8000; 0 means any free port)
    CATALOG_ADDRESS  where the catalog is: host, host:port or [IPv6]:port (default localhost:8080)

The catalog's errors are relayed too. If it can't be asked, the answer is 502; if it is silent, 504.
Ctrl-C or SIGTERM stops it as soon as the requests in flight are answered.
Left out: HTTPS, log-in, keep-alive, a cache, a limit for an answer of the catalog that goes on and on.
"""
import io, json, os, re, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import quote, unquote_to_bytes
from urllib.request import HTTPHandler, OpenerDirector

CATALOG_ADDRESS = os.environ.get("CATALOG_ADDRESS", "localhost:8080")
NAME, EXAMPLE = "front_end", "/lookup/1001"
START = f"try {EXAMPLE} (catalog at {CATALOG_ADDRESS})"  # ends the start line
PORT = os.environ.get("PORT", "8000")
TIMEOUT = 5  # seconds that a client has to send its request, and the catalog to answer
FAILURES = (OSError, HTTPException, ValueError, OverflowError, MemoryError)  # the last three come of garbage
RELAYED = ("Content-Type", "Location")  # headers of the catalog's answer
CATALOG = OpenerDirector()  # urlopen would use proxies, follow redirects, and raise errors for 4xx and 5xx
CATALOG.add_handler(HTTPHandler())


def check_address():
    """Exit with one line unless CATALOG_ADDRESS is a name, an IPv4 or a bracketed IPv6 address, and maybe a port."""
    match = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:([0-9]{1,5}))?", CATALOG_ADDRESS, re.ASCII)
    if not match or not 0 < int(match[3] or 80) < 65536:
        sys.exit(f"{NAME}: bad CATALOG_ADDRESS {CATALOG_ADDRESS!r}; set it to host, host:port or [IPv6]:port")


class Handler(BaseHTTPRequestHandler):
    """One request: http.server parses it and calls do_GET for a GET, do_POST for a POST, and so on."""

    def do_GET(self):
        """Ask the catalog for the item and relay its answer, or say why there is none."""
        path, _, item_id = self.path.partition("?")[0].rpartition("/")
        item_id = unquote_to_bytes(item_id.encode("latin-1"))
        if path != "/lookup" or item_id in (b"", b".", b".."):  # .. in the catalog's URL would lead elsewhere
            return self.send_error(404, f"no such path: {self.path}")
        url = f"http://{CATALOG_ADDRESS}/query/{quote(item_id, safe='')}"
        try:
            with CATALOG.open(url, timeout=TIMEOUT) as answer:
                body = answer.read()
        except FAILURES as error:
            error = getattr(error, "reason", error)  # a URLError wraps the system's own error
            if isinstance(error, TimeoutError):
                status, reason = 504, f"silent for {TIMEOUT} seconds"
            else:
                status, reason = 502, getattr(error, "strerror", None) or repr(error)[:200]
            message = f"no answer from the catalog at {CATALOG_ADDRESS}: {reason}"
            self.log_error("%s", message)
            self.send_error(status, message, "start it there, or set CATALOG_ADDRESS to where it is")
        else:
            headers = {name: answer.headers[name] for name in RELAYED if name in answer.headers}
            self.reply(answer.status, body, headers)

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
    check_address()
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
