"""Serves the pages of one folder to this machine alone.

A page that somebody else has open in the browser must not read what stands in the folder: requests are answered only if
they name this machine as their host (a name of the attacker's own could point here: DNS rebinding), and no other
origin may read an answer. Only whole pages, tables and pictures inside the folder are served, no links that lead out.
"""

from __future__ import annotations

import html
import os
import posixpath
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from loraplus.errors import InputError
from loraplus.files.paths import is_folder, user_path

ADDRESS = "127.0.0.1"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".csv": "text/csv; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    **dict.fromkeys((".yaml", ".txt", ".log", ".md", ".jsonl"), "text/plain; charset=utf-8"),
}
_PAGES = ("report.html", "index.html")
_MOST_PAGES = 500
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def server(folder: str | Path, port: int) -> ThreadingHTTPServer:
    """A server of a folder's reports; `serve_forever` runs it.

    Args:
        folder: whose pages it serves, and those of the folders in it.
        port: to listen on; 0 takes a free one.

    Raises:
        InputError: there is no such folder, or the port is not to be had.
    """
    root = user_path(str(folder))
    if not is_folder(root):
        raise InputError(f"there is no folder {folder}")
    if not 0 <= port <= 65535:
        raise InputError(f"--port must lie between 0 and 65535, got {port}")
    try:
        return _Server((ADDRESS, port), partial(_Handler, root.resolve()))
    except OSError as error:
        raise InputError(f"--port {port} cannot be used: {error.strerror}; give another, or 0 for any") from None


def pages(root: Path) -> list[Path]:
    """The reports in a folder and below, as paths within it, newest first; links are not followed."""
    found: list[tuple[float, Path]] = []
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-"))]
        for name in files:
            path = Path(place, name)
            if name in _PAGES and not path.is_symlink():
                found.append((-path.stat().st_mtime, path.relative_to(root)))
        if len(found) >= _MOST_PAGES:
            break
    return [path for _, path in sorted(found)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that went away."""


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "loraplus", ""
    timeout = 30  # a connection that says nothing does not stay

    def __init__(self, root: Path, *request: Any) -> None:
        self._root = root
        super().__init__(*request)  # which answers

    def do_GET(self) -> None:
        """Answers with a page, or says why not."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """As GET, without the page."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        status, kind, body = self._found()
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _found(self) -> tuple[int, str, bytes]:
        port = self.connection.getsockname()[1]
        hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
        if self.headers.get_all("Host", []) not in [[host] for host in hosts]:
            return _said(403, f"Only http://{ADDRESS}:{port}/ is served here.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return _said(403, "Another site asked for this.")
        asked = unquote(urlsplit(self.path).path) if self.path.startswith("/") else ""
        if asked == "/":
            reports = pages(self._root)
            if len(reports) != 1:
                return 200, _TYPES[".html"], _listed(reports).encode()
            asked = f"/{reports[0].as_posix()}"
        path = _inside(self._root, asked)
        if path is None:
            return _said(404, "There is no such page.")
        try:
            return 200, _TYPES[path.suffix.lower()], path.read_bytes()
        except OSError:  # it is just being replaced
            return _said(404, "There is no such page.")

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is the user's."""


def _inside(root: Path, asked: str) -> Path | None:
    """The file that is asked for, if it is one that is served and stands in the folder itself."""
    parts = asked.removeprefix("/").split("/")
    if not asked.startswith("/") or any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        return None
    if posixpath.splitext(asked)[1].lower() not in _TYPES or any(char in asked for char in "\\\0:"):
        return None
    path = root.joinpath(*parts)
    try:
        is_own = path.resolve(strict=True) == path and path.is_file()
    except (OSError, RuntimeError, ValueError):
        return None
    return path if is_own else None


def _said(status: int, text: str) -> tuple[int, str, bytes]:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


def _listed(reports: list[Path]) -> str:
    """A page of links to several reports; it asks again while there is none."""
    rows = "".join(
        f'<li><a href="/{quote(path.as_posix())}">{html.escape(path.as_posix())}</a></li>' for path in reports
    )
    text = f"<ul>{rows}</ul>" if reports else "<p>No report yet; this page asks again by itself.</p>"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Reports</title>'
        f"<style>:root{{color-scheme:light dark}}body{{font:16px/1.6 system-ui,sans-serif;margin:2rem}}</style>"
        f"<h1>Reports</h1>{text}</html>"
    )
