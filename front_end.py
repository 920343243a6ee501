"""The front end: answers GET /lookup/<item_id> by asking the catalog, and relays its answer.

    $ python front_end.py
    front_end: listening on port 8000, try /lookup/1001 (catalog at 127.0.0.1:8080)

    $ curl localhost:8000/lookup/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Settings, from the environment:
    PORT             TCP port to listen on (default 8000; 0 means any free port)
    CATALOG_ADDRESS  where the catalog is: host, host:port or [IPv6]:port (default 127.0.0.1:8080)

An error of the catalog is relayed too. Without an answer from the catalog, the status is 502, or 504 after 5 seconds.
Ctrl-C or SIGTERM stops the front end as soon as the requests in flight are answered.
Left out: HTTPS, log-in, keep-alive, a cache, a limit for the size of an answer (one without end fills the memory
until the 5 seconds are over), a limit for the time of a DNS lookup.
"""
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import quote, unquote
from urllib.request import HTTPHandler, OpenerDirector, URLError

CATALOG_ADDRESS = os.environ.get("CATALOG_ADDRESS", "127.0.0.1:8080")
CATALOG_TIMEOUT = 5  # seconds to connect to the catalog, and again for its whole answer
NAME, EXAMPLE = "front_end", "/lookup/1001"
START_MESSAGE = f"try {EXAMPLE} (catalog at {CATALOG_ADDRESS})"
PORT = os.environ.get("PORT", "8000")
CLIENT_TIMEOUT = 5  # seconds in which a client must send its whole request


def check_address():
    """Exit with one line unless CATALOG_ADDRESS reads like catalog, catalog:80, 10.0.2.15:8080 or [::1]:8080."""
    match = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:([0-9]+))?", CATALOG_ADDRESS)
    if not match or not 0 < int(match[3] or 80) < 65536:  # without a port, http means 80
        sys.exit(f"{NAME}: bad CATALOG_ADDRESS {CATALOG_ADDRESS!r}; set it to host, host:port or [IPv6]:port")


class Connection(HTTPConnection):
    """A connection to the catalog, with one deadline for the whole answer."""

    def response_class(self, connection, **options):
        """Return the HTTPResponse that HTTPConnection reads the answer with."""
        answer = HTTPResponse(connection, **options)
        set_deadline(answer.fp, connection, CATALOG_TIMEOUT)
        return answer


class CatalogHandler(HTTPHandler):
    """Opens http:// URLs by a Connection."""

    def http_open(self, request):
        """Send a urllib.request.Request; return the answer."""
        return self.do_open(Connection, request)


# An opener that only asks, and returns what comes: urlopen() would also use the proxies of the environment, follow
# redirects, and turn an answer of 4xx or 5xx into an exception.
CATALOG = OpenerDirector()
CATALOG.add_handler(CatalogHandler())


class Handler(BaseHTTPRequestHandler):
    """One request. http.server reads it and calls do_GET for a GET, do_PUT for a PUT, and so on."""

    def do_GET(self):
        """Reply with what the path names, or with 404."""
        # "/lookup/1001?x=1" -> ["", "lookup", "1001"]
        match [unquote(part) for part in self.path.partition("?")[0].split("/")]:
            case ["", "lookup", item_id]:
                self.relay(f"/query/{quote(item_id, safe='')}")
            case _:
                self.send_error(404, f"no such path: {self.path}")

    def relay(self, path):
        """Ask the catalog for a path and reply with its answer; without one, with 502 or 504."""
        try:
            with CATALOG.open(f"http://{CATALOG_ADDRESS}{path}", timeout=CATALOG_TIMEOUT) as answer:
                status, body = answer.status, answer.read()
                headers = [(n, answer.headers[n]) for n in ("Content-Type", "Location") if n in answer.headers]
        except (OSError, HTTPException, ValueError, OverflowError, MemoryError) as error:
            cause = error.reason if isinstance(error, URLError) else error  # a URLError wraps the system's own error
            if isinstance(cause, TimeoutError):
                status, reason = 504, f"timed out after {CATALOG_TIMEOUT} seconds"
            else:
                status, reason = 502, getattr(cause, "strerror", None) or repr(cause)[:200]
            message = f"no answer from the catalog at {CATALOG_ADDRESS}: {reason}"
            self.log_error("%s", message)
            self.send_error(status, message, "start it there, or set CATALOG_ADDRESS to where it is")
        else:
            self.reply(status, body, headers)

    # ---- A first reading may stop here. The rest is the same text in catalog.py and front_end.py. ----
    # http.server calls these methods. A name that this file does not define is inherited from http.server.

    do_HEAD = do_GET  # reply() leaves out the body
    # Replies are HTTP/1.0, one request a connection: new clients do not wait behind busy ones, and a stop ends in time.
    default_request_version = "HTTP/1.0"  # a malformed request gets a status line too
    wbufsize = -1  # buffer a reply, to send it in one piece

    def setup(self):
        """Prepare to read a request."""
        super().setup()
        set_deadline(self.rfile, self.connection, CLIENT_TIMEOUT)

    def reply(self, status, body, headers=()):
        """Send a whole reply. body: bytes, or a value to send as JSON; headers: (name, value) pairs to send as well."""
        if not isinstance(body, bytes):
            body = json.dumps(body, separators=(",", ":")).encode() + b"\n"
            headers = [("Content-Type", "application/json"), *headers]
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=f"try GET {EXAMPLE}"):
        """Reply with an error: what is wrong; what to do. http.server calls this for a request that it cannot parse."""
        headers = []
        if code == 501:  # http.server found no do_... method for the request; the HTTP status for that is 405
            code, headers = 405, [("Allow", ", ".join(name[3:] for name in dir(self) if name.startswith("do_")))]
        message = f"{message or self.responses[code][0]}; {explain}"
        self.reply(code, {"error": {"code": code, "message": message}}, headers)

    def log_message(self, *args):
        """Write a line to the log. If stderr is closed (None) or cannot take it, the reply is sent all the same."""
        with suppress(AttributeError, OSError):
            super().log_message(*args)


def set_deadline(stream, connection, seconds):
    """Let the reads of a stream raise TimeoutError from so many seconds on. A socket's own timeout would start again
    with each byte. The stream calls stream.raw.readinto to get bytes from its connection."""
    end = time.monotonic() + seconds
    receive = stream.raw.readinto

    def readinto(buffer):
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        connection.settimeout(left)
        return receive(buffer)

    stream.raw.readinto = readinto


class Server(ThreadingHTTPServer):
    """Accepts connections. For each, a thread of the pool makes a Handler."""

    pool = ThreadPoolExecutor(1000)  # starts a thread when none is free; 1000 are more than a laptop keeps busy
    request_queue_size = 1024  # connections that may wait to be accepted; http.server's 5 is too few for a crowd
    allow_reuse_address = os.name == "posix"  # start again at once; on Windows, two servers could share a port
    timeout = 0.05  # seconds that handle_request() waits for a connection
    running = True

    def server_bind(self):
        """Bind the socket as HTTPServer does, without its DNS lookup, which can take seconds."""
        super(HTTPServer, self).server_bind()

    def process_request(self, request, client_address):
        """Handle a connection in the pool: ThreadingHTTPServer would start a thread for each."""
        self.pool.submit(self.process_request_thread, request, client_address)

    def handle_error(self, request, client_address):
        """Log the traceback of a bug, but not that a client has gone away."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def stop(self, *_):
        """Handle a signal: end the loop in main()."""
        self.running = False


def main():
    """Serve until Ctrl-C (SIGINT) or SIGTERM. Exit with one line if a setting is bad."""
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
    with suppress(AttributeError, OSError):  # as in log_message
        sys.stderr.write(f"{NAME}: listening on port {server.server_address[1]}, {START_MESSAGE}\n")
    while server.running:
        server.handle_request()
    server.timeout = -1  # now handle_request() accepts a connection that is waiting, or returns at once
    for _ in range(server.request_queue_size):
        server.handle_request()
    server.server_close()
    server.pool.shutdown()  # waits for the requests in flight


if __name__ == "__main__":
    main()
