"""The report of a study while it runs, served to this machine only."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import webbrowser
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from headwater.report.directory import read
from headwater.report.page import html, policy

NAMES = ("127.0.0.1", "localhost")


def watch(run_directory: Path, port: int = 0, *, browser: bool = True) -> None:
    """Serve the page of a run directory on 127.0.0.1 until interrupted; port 0 takes a free one.

    Raises ValueError when the directory holds no run, or the port is taken.
    """
    with contextlib.suppress(KeyboardInterrupt), serving(run_directory, port) as url:
        print(f"watching {run_directory} at {url} (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(url)
        threading.Event().wait()


@contextlib.contextmanager
def serving(run_directory: Path, port: int = 0) -> Iterator[str]:
    """The address of the page while the block runs. Raises ValueError as `watch` does."""
    read(run_directory)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(_Page(run_directory)))
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {port} cannot be used ({error}): choose another --port, or 0 for a free one") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class _Page:
    """The page and its tag; made again only when a file of the run has changed."""

    def __init__(self, run_directory: Path) -> None:
        self.root = run_directory
        self.lock = threading.Lock()
        self.tag = ""
        self.body = b""

    def current(self) -> tuple[str, bytes]:
        """ETag and page."""
        with self.lock:
            # The minute too: silence is news that no file tells.
            tag = f'"{stamp(self.root)}-{int(time.time() // 60)}"'
            if tag != self.tag:
                self.tag, self.body = tag, html(read(self.root), live=True).encode("utf-8", "replace")
            return self.tag, self.body


def stamp(root: Path) -> str:
    """Changes when a file of the run directory does: names, sizes and times of change."""
    seen = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # replaced while we look
            if path.is_file() and not path.name.startswith("report.html"):
                state = path.stat()
                seen.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return seen.hexdigest()[:20]


def _handler(page: _Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site may resolve its own name to 127.0.0.1 (DNS rebinding); its Host gives it away.
            host, _, port = (self.headers.get("Host") or "").rpartition(":")
            if host not in NAMES or port != str(self.connection.getsockname()[1]):
                self.send_error(403, "This page is for its own machine: use http://127.0.0.1")
            elif self.path.partition("?")[0] != "/":
                self.send_error(404)
            else:
                self._answer()

        do_HEAD = do_GET

        def _answer(self) -> None:
            try:
                tag, body = page.current()
            except ValueError as error:
                self.send_error(503, "The run directory cannot be read", str(error))
                return
            known = self.headers.get("If-None-Match") == tag
            self.send_response(304 if known else 200)
            self.send_header("ETag", tag)
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Content-Security-Policy", f"{policy(live=True)}; frame-ancestors 'none'")
            self.send_header("X-Content-Type-Options", "nosniff")
            if not known:
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not known and self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A line a second would bury what the terminal is for."""

    return Handler
