"""The catalog: answers GET /query/<item_id> with one book as JSON.

    $ python3 catalog.py
    catalog: listening on port 8080, try /query/1001

    $ curl 127.0.0.1:8080/query/1001
    {"data":{"name":"RPCs for Dummies","price":14.99,"quantity":10}}

Setting, from the environment, as in `PORT=9000 python3 catalog.py`:
    PORT    TCP port to listen on (default 8080; 0 means any free port)

An error is a status such as 404 with {"error":{"code":404,"message":"..."}}.
Ctrl-C, or SIGTERM (which `docker stop` sends), stops it; replies under way are finished first.
Left out: HTTPS, log-in, IPv6, keep-alive, a database (edit ITEMS and start again), protection against slow clients
(5 seconds of silence end a connection, but a byte now and then keeps it, and delays a stop).
"""
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from urllib.parse import unquote

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
            return
        item = ITEMS.get(unquote(item_id))  # "a%20b" stands for "a b"
        if item is None:
            self.send_error(404, f"no such item: {item_id}; try one of {', '.join(ITEMS)}")
        else:
            self.reply(200, to_json({"data": item}))

    do_HEAD = do_GET  # HEAD asks for the headers alone; reply() leaves out the body

    def reply(self, code, body, content_type="application/json"):
        """Send a whole reply: a status code, the headers, and a body of bytes. Every reply is sent by this method."""
        self.send_response(code)  # also logs the request
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):  # explain is not used
        """Log an error and reply with it as JSON. The base class also calls this, for a request that it can't serve."""
        message = message or self.responses[code][0]  # by default the name of the status
        self.log_error("%s", message)  # the first argument is a format, and the message may hold a %
        self.reply(code, to_json({"error": {"code": code, "message": message}}))

    # ---- A first reading may stop here. Above: the answers. Below: how it runs (slow clients, many clients, stopping).

    timeout = 5  # seconds of silence after which the base class disconnects a client
    wbufsize = -1  # buffer what is written, so that headers and a small body are sent together
    default_request_version = "HTTP/1.0"  # for a request line without a valid version; by default 0.9: a body alone

    def log_message(self, *args):
        """Write a line to the log, stderr. Where it is closed (OSError) or missing (AttributeError), still reply."""
        with suppress(OSError, AttributeError):
            super().log_message(*args)


class Server(ThreadingTCPServer):  # ThreadingHTTPServer also looks up this machine's name, which may take seconds
    """Accepts connections and lets a pool of threads serve them. Below is only what differs from the base class.

    handle_request() accepts a connection and calls process_request(), which gives it to the pool. One of its threads
    runs the base class's process_request_thread(): it makes a Handler, which calls do_GET(), and closes the connection.
    """

    allow_reuse_address = os.name != "nt"  # start right after a stop; on Windows two programs would share the port
    request_queue_size = 1024  # connections that may wait to be accepted
    timeout = 0.5  # handle_request() returns after so many seconds without a connection; main() then looks at running
    running = True  # until stop()
    pool = ThreadPoolExecutor(1000)  # starts a thread where none is idle, up to 1000; the system may allow fewer

    def process_request(self, request, client_address):
        """Give a connection to the pool; request is its socket."""
        with suppress(RuntimeError):  # no new thread can start; submit() has queued it, and a running thread takes it
            self.pool.submit(self.process_request_thread, request, client_address)

    def handle_error(self, request, client_address):
        """Log the traceback of a bug in Handler. A client that hangs up or reads nothing is not a bug."""
        error = sys.exc_info()[1]  # the exception being handled
        if not isinstance(error, (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def stop(self, number, frame):
        """End the loop in main(). Called on a signal, with its number and the code that it interrupted."""
        self.running = False
        signal.signal(number, signal.SIG_DFL)  # the same signal again ends the process at once


def main():
    """Serve until Ctrl-C or SIGTERM."""
    if len(sys.argv) > 1:
        sys.exit(__doc__)  # it takes no arguments: print the docstring, end with status 1
    try:
        server = Server(("", int(PORT)), Handler)  # "": every IPv4 address of this machine
    except (OSError, OverflowError, ValueError) as error:  # in use, out of range, not a number
        sys.exit(f"catalog: can't listen on PORT={PORT}: {error}")
    signal.signal(signal.SIGINT, server.stop)  # from now on Ctrl-C, which is SIGINT, calls stop()
    signal.signal(signal.SIGTERM, server.stop)
    print(f"catalog: listening on port {server.server_address[1]}, try /query/1001", file=sys.stderr)
    while server.running:
        server.handle_request()
    server.server_close()  # accepts no more
    server.pool.shutdown()  # waits for the replies under way


if __name__ == "__main__":
    main()
