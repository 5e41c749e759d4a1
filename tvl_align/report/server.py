"""The page of a run that is too large for one file, served on this machine only."""

import errno
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tvl_align.report.parts import Parts
from tvl_align.system.console import UserError

HOST = "127.0.0.1"
TAKEN = (errno.EADDRINUSE, errno.EACCES)


class PageServer(ThreadingHTTPServer):
    """Serves a page at / and its parts at /parts/<name>, on 127.0.0.1 only. port 0: any that is free; see `address`.

    Raises UserError for a port that cannot be used.
    """

    daemon_threads = True

    def __init__(self, page: str, parts: Parts, port: int) -> None:
        self.page, self.parts = page.encode(), parts
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
            raise UserError(f"port {port} is taken, or needs rights that you lack; give another --port.") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away while it is answered is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            self._send(self.server.page, "text/html; charset=utf-8")
            return
        try:
            self._send(*self.server.parts.read(path.removeprefix("/parts/")))
        except KeyError:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""
