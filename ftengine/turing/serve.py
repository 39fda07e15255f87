"""Show a study to its readers in a browser, and keep what they answer.

=======  ==========================================================================================
input    a study folder; requests of the page in ``page/``
does     admits readers by their links, sends the case that comes next, appends answers
output   the page, int16 HU as they lie in the study, answers in ``STUDY/answers``
raises   ConfigError where another server runs on the study, StoreError where it was changed
=======  ==========================================================================================

The key is never opened, so no response can hold the truth, nor take a time that depends on it; that of the training cases is in the study and
is sent after their answer. All cases have one size and go out uncompressed through one line of code.

What keeps strangers out: the socket is bound to 127.0.0.1; a Host header of another name is refused (DNS rebinding); every request but the
page itself wants a cookie (HttpOnly, SameSite=Strict), which a reader's link is exchanged for, compared in constant time; requests that
change something must be JSON of the page's own origin. A reader gets the case that is due and the one behind it, no other.
"""

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ftengine.errors import ConfigError, FtengineError, SaveError
from ftengine.store.serve import HOSTS, WithHeaders
from ftengine.turing.answers import GivenAnswer, GivenTime, Journals, Refused
from ftengine.turing.study import Reader, Showing, StudyFolder, presets

MAX_BODY_BYTES = 16_384
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/app.css": ("app.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Cache-Control": "no-store",  # no CT in a browser's disk cache
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*")
Given = TypeVar("Given", bound=BaseModel)
_Endpoint = Callable[[Request, Reader], Awaitable[Response]]


def make_app(
    folder: StudyFolder, journals: Journals, *, allow_hosts: Sequence[str] = (), warn: Callable[[str], None]
) -> Starlette:
    """The ASGI application of a study.

    allow_hosts: further names under which a proxy of the operator's reaches it. warn: told what goes wrong, which readers are not told
    in full.
    """

    def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        return _guarded(endpoint, warn)

    server = _Server(folder, journals)
    routes = [Route(path, _file(name, kind), methods=["GET"]) for path, (name, kind) in _FILES.items()]
    routes += [
        Route("/api/session", guarded(server.open_session), methods=["POST"]),
        Route("/api/leave", guarded(server.leave), methods=["POST"]),
        Route("/api/state", guarded(server.for_reader(server.state)), methods=["GET"]),
        Route("/api/case/{item}", guarded(server.for_reader(server.case)), methods=["GET"]),
        Route("/api/answer", guarded(server.for_reader(server.answer)), methods=["POST"]),
        Route("/api/time", guarded(server.for_reader(server.time)), methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(WithHeaders, headers=_HEADERS),
            Middleware(TrustedHostMiddleware, allowed_hosts=[*HOSTS, *allow_hosts], www_redirect=False),
        ],
    )


def checked_hosts(names: Sequence[str]) -> list[str]:
    """Names of hosts, without scheme and port. Raises ConfigError for anything else, and for a pattern that lets every name in."""
    for name in names:
        if not _HOST.fullmatch(name):
            raise ConfigError(
                f"--allow-host {name}: want the plain name of a host, such as study.hospital.example, without scheme and port."
            )
    return list(names)


class _Server:
    """The endpoints of one study."""

    def __init__(self, folder: StudyFolder, journals: Journals) -> None:
        self._folder, self._journals = folder, journals
        self._cookie = (
            f"ftengine_turing_{folder.study.id}"  # cookies know no port: two studies on one machine must not share one
        )

    async def open_session(self, request: Request) -> Response:
        """Exchange the token of a link for a cookie."""
        document = await _json(request)
        token = document.get("token") if isinstance(document, dict) else None
        reader = self._folder.reader_of(token) if isinstance(token, str) else None
        if reader is None:
            raise Refused(403, "this link is not good for this study; ask whoever runs it for yours")
        response = Response(status_code=204)
        response.set_cookie(
            self._cookie, str(token), httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/"
        )
        return response

    async def leave(self, request: Request) -> Response:
        """Forget the cookie."""
        await _json(request)
        response = Response(status_code=204)
        response.delete_cookie(self._cookie, path="/", httponly=True, samesite="strict")
        return response

    def for_reader(self, endpoint: _Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for whoever has a reader's cookie."""

        async def admitted(request: Request) -> Response:
            token = request.cookies.get(self._cookie)
            reader = None if token is None else self._folder.reader_of(token)
            if reader is None:
                raise Refused(401, "open the link that you were given")
            return await endpoint(request, reader)

        return admitted

    async def state(self, _request: Request, reader: Reader) -> Response:
        """What the page shows."""
        return JSONResponse(self._state(reader))

    async def case(self, request: Request, reader: Reader) -> Response:
        """The voxels of the case that is due, or of the one behind it."""
        answers = self._journals[reader.id].answers
        for showing in (answers.current, answers.following):
            if showing is not None and showing.item == request.path_params["item"]:
                content = await run_in_threadpool(self._folder.read_case, showing.case)
                return Response(content, media_type="application/octet-stream")
        raise Refused(404, "there is no such case, or it is not its turn")

    async def answer(self, request: Request, reader: Reader) -> Response:
        """Store an answer; the truth of a training case comes back."""
        given = _parsed(GivenAnswer, await _json(request))
        line, is_new = await run_in_threadpool(self._journals[reader.id].submit, given)
        synthetic = self._folder.study.training[line.case] if line.training else None
        return JSONResponse(
            {"new": is_new, "truth_of_training_case": synthetic, "state": self._state(reader)},
            status_code=201 if is_new else 200,
        )

    async def time(self, request: Request, reader: Reader) -> Response:
        """Store for how long a case was shown."""
        given = _parsed(GivenTime, await _json(request))
        await run_in_threadpool(self._journals[reader.id].note_time, given)
        return Response(status_code=204)

    def _state(self, reader: Reader) -> dict[str, Any]:
        study, answers = self._folder.study, self._journals[reader.id].answers
        training = [s for s in reader.showings if s.training]
        current, following = answers.current, answers.following
        return {
            "reader": {"id": reader.id, "name": reader.name},
            "shape_zyx": study.shape_zyx,
            "spacing_mm_zyx": study.spacing_mm_zyx,
            "window_hu": study.window_hu,
            "presets": presets(study.window_hu),
            "num_training": len(training),
            "num_cases": len(reader.showings) - len(training),
            "num_answered": len(answers.by_item),
            "current": None if current is None else self._shown(current, answers.reading_s(current.item)),
            "next_item": None if following is None else following.item,
        }

    def _shown(self, showing: Showing, reading_s: float) -> dict[str, Any]:
        case = self._folder.study.by_id[showing.case]
        return {
            "item": showing.item,
            "type": case.type,
            "training": showing.training,
            "mark": None if case.mark is None else case.mark.model_dump(mode="json"),
            "reading_s": reading_s,
        }


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_PAGE / name).read_bytes()

    async def send(_request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]], warn: Callable[[str], None]
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint whose refusals become JSON with their reason; errors of the study go to whoever runs it."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refused as refusal:
            return JSONResponse({"error": refusal.reason}, refusal.status)
        except SaveError as error:
            warn(str(error))
            return JSONResponse(
                {"error": "the server's disk did not take it; save again, and tell whoever runs the study"}, 507
            )
        except FtengineError as error:
            warn(str(error))
            return JSONResponse({"error": "this case cannot be shown; tell whoever runs the study"}, 500)

    return answered


async def _json(request: Request) -> Any:
    """The body of a request that changes something. Refuses what a form or another site could send."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "want application/json")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Refused(403, "the request comes from another site")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise Refused(413, f"want at most {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Refused(422, "is not JSON") from None


def _parsed(model: type[Given], document: Any) -> Given:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(422, f"{'.'.join(map(str, first['loc'])) or 'answer'}: {first['msg']}") from None
