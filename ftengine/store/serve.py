"""Serve a local store to viewers in a browser: read-only, on this machine alone, with Range and CORS.

=======  ==========================================================================================
input    a local store; requests of neuroglancer, vizarr, NiiVue or any Zarr client
does     answers GET, HEAD and OPTIONS for the Zarr keys of committed volumes, and a page that lists them
output   whole files (200), one byte range (206), or an error that no Zarr client takes for data
=======  ==========================================================================================

Why not ``python -m http.server``: it ignores Range and answers 200 with the whole file; zarrita (under vizarr and NiiVue) then decodes
wrong voxels in silence. Here a Range that cannot be served exactly is refused with 416, malformed ones and several ranges at once too.

Viewers written in JavaScript do not verify the crc32c of a chunk: a flipped bit shows as wrong voxels. Only ``ftengine store verify``
protects a viewer. A shard that is gone or empty is answered with DAMAGED, because every Zarr client shows a 404 as air.

What keeps strangers out: the socket is bound to 127.0.0.1; a Host header of another name is refused (DNS rebinding); only pages of known
viewers and of this machine may read through CORS; only keys of volumes that the index commits are served, after symlinks are followed.
Other users who are logged in on this machine can read what is served.
"""

import base64
import hashlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftengine.errors import ConfigError
from ftengine.store.layout import volume_path
from ftengine.store.location import LocalLocation, Location
from ftengine.store.reader import Store, open_store
from ftengine.store.viewer import STORE_ROUTE, case_links

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "[::1]")
METHODS = ("GET", "HEAD", "OPTIONS")
VIEWER_ORIGINS = (  # public viewers whose code runs in the browser alone
    "https://neuroglancer-demo.appspot.com",
    "https://hms-dbmi.github.io",  # vizarr
    "https://niivue.com",
    "https://niivue.github.io",
)
PAGE_CASES = 500  # cases on one page of the list
# no 404, which Zarr clients read as air; no 5xx, after which tensorstore asks again for minutes
DAMAGED = 422
_LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-[0-9]{1,18})")
_ENCODED_SEPARATOR = re.compile(rb"%(2f|5c|00)", re.IGNORECASE)
_SHARDS = ("0/c/0/0/0", "labels/seg/0/c/0/0/0")  # image, label

_STYLE = "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:60em}td{padding-right:2em}code{font-size:13px}"
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_COMMON_HEADERS = {
    "Cache-Control": "no-store",  # no CT in a browser's disk cache, and no old bytes after a volume was converted again
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",  # pages of others may read through CORS only
}


def make_app(place: str | Path | Location | Store, *, allow_origins: Sequence[str] = ()) -> Starlette:
    """The ASGI application that serves a store: the list of cases at ``/``, the Zarr hierarchy below ``/store/``.

    allow_origins: pages, as ``https://host[:port]``, that may read besides VIEWER_ORIGINS and this machine's. The index is read once; an open
    store is served as it was opened. Of a subset only its own cases are served. Raises StoreError for a store that cannot be opened;
    ConfigError for one in a bucket and for an origin that is none.
    """
    for origin in allow_origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(f"--allow-origin {origin}: want https://HOST or http://HOST:PORT, without a path.")
    store = place if isinstance(place, Store) else open_store(place)
    if not isinstance(store.volumes, LocalLocation):
        raise ConfigError(
            f"{store.volumes}: lies in a bucket; want a local store. Viewers read buckets by their own addresses."
        )
    root = store.volumes.path.resolve()  # of a subset: the store that holds its volumes
    groups = {""}  # folders on the way to cases: their metadata are served, nothing else of them
    for case in store.cases:
        folder = volume_path(case).rpartition("/")[0]
        while folder not in groups:
            groups.add(folder)
            folder = folder.rpartition("/")[0]
    cases = frozenset(store.cases)

    def page(request: Request) -> Response:
        if request.method == "OPTIONS":
            return _options()
        return _list_cases(store, request)

    def file(request: Request) -> Response:
        if request.method == "OPTIONS":
            return _options()
        return _serve_key(root, groups, cases, store, request)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=[*VIEWER_ORIGINS, *allow_origins],
        allow_origin_regex=_LOCAL_ORIGIN,
        allow_methods=METHODS,
        allow_headers=["range", "if-range", "cache-control", "pragma"],
        expose_headers=["accept-ranges", "content-length", "content-range", "etag", "last-modified"],
        allow_private_network=True,  # browsers ask before a public page may reach a server of this machine
    )
    return Starlette(
        routes=[
            Route("/", page, methods=METHODS),
            Mount(STORE_ROUTE, routes=[Route("/{key:path}", file, methods=METHODS)], middleware=[cors]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
            Middleware(WithHeaders, headers=_COMMON_HEADERS),
            Middleware(_ReadOnly),
        ],
    )


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1 and the port (0: any free one); who connects now waits for ``run_server``.

    Raises ConfigError where the port cannot be had.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((ADDRESS, port))
        sock.listen()
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"--port {port}: {ADDRESS}:{port} cannot be had ({error.strerror}). Choose another port, or 0 for any free one."
        ) from error
    return sock


def run_server(app: ASGIApp, sock: socket.socket) -> None:
    """Serve until Ctrl-C; requests that are under way get two seconds to end. The socket is closed."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn has ended in order and hands the signal on
        pass
    finally:
        sock.close()


class WithHeaders:
    """Adds ``headers`` to every answer."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self._app, self._added = app, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._added.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


class _ReadOnly:
    """Refuse methods that could write, and encoded separators."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in METHODS:
            refusal = PlainTextResponse("read-only", 405, {"Allow": ", ".join(METHODS)})
            await refusal(scope, receive, send)
        elif scope["type"] == "http" and _ENCODED_SEPARATOR.search(scope.get("raw_path") or b""):
            await _not_found()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _options() -> Response:
    return Response(status_code=204, headers={"Allow": ", ".join(METHODS)})


def _not_found() -> Response:
    return PlainTextResponse("not found", 404)


def _serve_key(root: Path, groups: set[str], cases: frozenset[str], store: Store, request: Request) -> Response:
    key = request.path_params["key"]
    parts = key.split("/")
    if any(not part or part.startswith(".") or "\0" in part for part in parts):
        return _not_found()
    case = _case_of(parts, cases)
    if case is None and not (parts[-1] == "zarr.json" and key.rpartition("/")[0] in groups):
        return _not_found()
    path = _readable_file(root, key)
    if path is None or path.stat().st_size == 0:
        if case is None or key not in _wanted_shards(store, case):
            return _not_found()
        text = f"damaged store: a shard of {case!r} is missing, empty or unreadable. 'ftengine store verify' lists what is lost."
        return PlainTextResponse(text, DAMAGED)
    if not _is_one_range(request.headers.get("range")):
        return PlainTextResponse("want one range of bytes", 416, {"Content-Range": f"bytes */{path.stat().st_size}"})
    media_type = "application/json" if path.name == "zarr.json" else "application/octet-stream"
    return FileResponse(path, media_type=media_type)


def _readable_file(root: Path, key: str) -> Path | None:
    """The file of a key, symlinks followed; None where there is none, it cannot be read, or it lies outside the store."""
    try:
        path = (root / key).resolve()
        inside = path.is_relative_to(root) and path.is_file() and os.access(path, os.R_OK)
    except (OSError, RuntimeError):  # a name too long, a loop of symlinks
        return None
    return path if inside else None


def _case_of(parts: list[str], cases: frozenset[str]) -> str | None:
    """The committed case in whose folder a key lies; cases never lie inside one another."""
    if parts[0] != "volumes":
        return None
    names = ("/".join(parts[1:end]) for end in range(3, len(parts)))
    return next((name for name in names if name in cases), None)


def _wanted_shards(store: Store, case: str) -> list[str]:
    return [f"{volume_path(case)}/{shard}" for shard in _SHARDS[: 1 + store.has_label(case)]]


def _is_one_range(header: str | None) -> bool:
    """Whether a Range header is absent or one well-formed range, which FileResponse serves exactly or refuses."""
    if header is None:
        return True
    match = _RANGE.fullmatch(header.strip())
    if match is None:
        return False
    first, last = match[1], match[2]
    return not (first and last) or int(first) <= int(last)


def _list_cases(store: Store, request: Request) -> Response:
    text = request.query_params.get("page", "1")
    num_pages = max(1, -(-len(store) // PAGE_CASES))
    if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= num_pages:
        return _not_found()
    number = int(text)
    rows = []
    for case in store.cases[(number - 1) * PAGE_CASES : number * PAGE_CASES]:
        links = case_links(store, case, str(request.base_url))
        rows.append(
            f"<tr><td>{escape(case)}</td><td>{'label' if links['label_url'] else ''}</td>"
            f'<td><a rel="noreferrer" href="{escape(links["neuroglancer_url"])}">neuroglancer</a></td>'
            f"<td><code>{escape(links['image_url'])}</code></td></tr>"
        )
    title = escape(str(store.location).rstrip("/").rpartition("/")[2])
    labels = ", ".join(f"{value} {escape(name)}" for name, value in store.labels.items())
    pages = " ".join(f'<a href="?page={n}">{n}</a>' for n in range(1, num_pages + 1)) if num_pages > 1 else ""
    body = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1><p>{len(store)} volumes, region {escape(store.region)}; labels: {labels}. "
        "A link opens a public viewer, which reads from this machine; the CT does not leave it. Not a medical device.</p>"
        f"<p>{pages}</p><table>{''.join(rows)}</table></body></html>"
    )
    return HTMLResponse(body, headers=_PAGE_HEADERS)
