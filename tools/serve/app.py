"""The HTTP side: paths, parameters, status codes, answers as JSON."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from checkpointing.files import MULTILABEL
from errors import printable
from tools.common import labels
from tools.serve import schema
from tools.serve.asgi import (
    App,
    ClientGoneError,
    Receive,
    Response,
    Scope,
    Send,
    as_json,
    whole_body,
)
from tools.serve.batcher import Answer
from tools.serve.decoders import Content
from tools.serve.forms import files_of
from tools.serve.images import RefusedError
from tools.serve.middleware import RequestMiddleware
from tools.serve.pages import PAGES
from tools.serve.schema import MOST_CLASSES, TOPK
from tools.serve.service import Service

log = logging.getLogger(__name__)
FAILED = "the service failed on this request; its log says why"
YES, NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")

Handler = Callable[[Scope, Receive], Awaitable[Response]]


class Parameters(NamedTuple):
    """What a request for answers asks besides."""

    topk: int | None
    """Classes per answer; None: not asked."""
    explains: bool
    about: str | None
    """The class to explain; None: the likeliest."""

    @classmethod
    def of(cls, query: bytes) -> "Parameters":
        """From a URL's query; of a parameter that is given twice the last one counts.

        Raises RefusedError (422).
        """
        given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        topk, explain = given.get("topk"), given.get("explain", NO[0]).lower()
        if explain not in YES + NO:
            raise RefusedError(422, "explain: true or false is expected")
        return cls(None if topk is None else _whole(topk), explain in YES, given.get("about"))


def _whole(topk: str) -> int:
    """The number of classes that a request asks for. Raises RefusedError (422)."""
    number = re.fullmatch(r" *\+?0*([0-9]{1,9})(\.0*)? *", topk)  # some clients count in floats
    if number is None or not 1 <= int(number[1]) <= MOST_CLASSES:
        raise RefusedError(422, f"topk: a whole number from 1 to {MOST_CLASSES} is expected")
    return int(number[1])


class Paths:
    """An ASGI application: a handler for each method of each path.

    Every error is ``{"error": one line}``; what went wrong inside stays in the log.
    """

    def __init__(self, handlers: dict[str, dict[str, Handler]]) -> None:
        self.handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(scope, receive)
        await response.give(send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        methods = self.handlers.get(scope["path"])
        if methods is None:
            return _error(404, "no such path: /docs lists them")
        handler = methods.get(scope["method"])
        if handler is None:
            allowed = ", ".join(methods)
            headers = ((b"allow", allowed.encode()),)
            return as_json({"error": f"the path takes {allowed}"}, 405, headers)
        try:
            return await handler(scope, receive)
        except RefusedError as error:
            return _error(error.status, error.message)
        except ClientGoneError:
            return _error(400, "the body ended early")
        except Exception:
            log.exception("a request failed")
            return _error(500, FAILED)


def _error(status: int, message: str) -> Response:
    return as_json({"error": message}, status, ((b"retry-after", b"1"),) if status == 503 else ())


def build_app(service: Service) -> App:
    """The service as an ASGI application."""
    names, several = service.classifier.class_names, service.thresholds is not None
    form = service.classifier.transform.form
    description = schema.openapi(service.name, len(names), several=several, form=form)

    async def predict(scope: Scope, receive: Receive) -> Response:
        return await _predict(service, scope, receive)

    async def health(scope: Scope, receive: Receive) -> Response:
        reason = service.stuck() or ("the service is ending" if service.ending else None)
        if reason:
            raise RefusedError(503, reason)
        about = {"status": "ok", "model": service.name, "classes": len(names)}
        return as_json(about | ({"task": MULTILABEL} if several else {}))

    async def live(scope: Scope, receive: Receive) -> Response:
        if reason := service.stuck():
            raise RefusedError(503, reason)
        return as_json({"status": "ok"})

    async def metrics(scope: Scope, receive: Receive) -> Response:
        content = generate_latest(service.metrics.registry)
        return Response(content, CONTENT_TYPE_LATEST.encode())

    handlers: dict[str, dict[str, Handler]] = {"/predict": {"POST": predict}}
    handlers |= {"/health": {"GET": health}, "/live": {"GET": live}, "/metrics": {"GET": metrics}}
    fixed = {**PAGES, "/openapi.json": as_json(description)}
    handlers |= {path: {"GET": _always(response)} for path, response in fixed.items()}
    return RequestMiddleware(Paths(handlers), service, handlers)


def _always(response: Response) -> Handler:
    async def answer(scope: Scope, receive: Receive) -> Response:
        return response

    return answer


async def _predict(service: Service, scope: Scope, receive: Receive) -> Response:
    """Classify an image, or several."""
    names = service.classifier.class_names
    parameters = Parameters.of(scope["query_string"])
    if parameters.about is not None and parameters.about not in names:
        raise RefusedError(422, "about: the model knows no such class")
    until = time.monotonic() + service.limits.seconds
    service.check_room()
    files = await _files(scope, receive, service.limits.images)
    if parameters.explains and len(files) > 1:
        raise RefusedError(422, "explain: send one image at a time")
    with service.reserve(len(files)):
        async with _deadline(until, receive):
            answers = await _answers(service, files, until)
            failed = [a for a in answers if isinstance(a, BaseException)]
            if len(failed) == len(answers) and not isinstance(failed[0], RefusedError):
                raise failed[0]
            entries = [
                _entry(service, name, answer, parameters.topk)
                for (name, _), answer in zip(files, answers, strict=True)
            ]
            if parameters.explains and isinstance(answers[0], Answer):
                index = None if parameters.about is None else names.index(parameters.about)
                entries[0]["explanation"] = await service.explain(answers[0], index)
    if all("error" in entry for entry in entries):
        content = {"error": entries[0]["error"], "images": entries}
        return as_json(content, entries[0]["status"])
    return as_json({"images": entries})


async def _answers(
    service: Service, files: list[tuple[str | None, Content]], until: float
) -> list[Answer | BaseException]:
    """To each image an answer, or why there is none."""
    if len(files) > 1:
        asked = (service.answer(content, until) for _, content in files)
        return await asyncio.gather(*asked, return_exceptions=True)
    try:
        return [await service.answer(files[0][1], until)]
    except Exception as error:
        return [error]


async def _files(scope: Scope, receive: Receive, most: int) -> list[tuple[str | None, Content]]:
    """(name, content) of each image in the body. Raises RefusedError."""
    given = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
    kind = given.partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    is_image = kind in ("", "application/octet-stream") or kind.startswith("image/")
    if not is_form and not is_image:
        raise RefusedError(
            415,
            f"{printable(kind[:100])} is none of multipart/form-data, image/* and "
            "application/octet-stream",
        )
    body = await whole_body(receive)
    found: list[tuple[str | None, Content]] = [(None, body)] if body else []
    if is_form:
        found = [*files_of(body, given, most)]
    if not found:
        raise RefusedError(400, "the body holds no image")
    return found


def _entry(
    service: Service, file: str | None, answer: Answer | BaseException, topk: int | None
) -> dict[str, Any]:
    """An image's part of the JSON."""
    if isinstance(answer, RefusedError):
        return {"file": file, "error": answer.message, "status": answer.status}
    if isinstance(answer, BaseException):
        log.error("no answer to an image", exc_info=answer)
        return {"file": file, "error": FAILED, "status": 500}
    names, shares, thresholds = (
        service.classifier.class_names,
        answer.probabilities,
        service.thresholds,
    )
    if thresholds is None:
        order = labels.likeliest_first(shares, topk or TOPK)
        likely = [{"class": names[i], "confidence": float(shares[i])} for i in order]
        return {"file": file, "predictions": likely}
    found = labels.found(shares, thresholds)[:MOST_CLASSES].tolist()
    count = topk or max(TOPK, len(found))
    shown = labels.likeliest_first(shares, count).tolist()
    if not topk:
        # Also where a label with a lower threshold is less likely than one that isn't there.
        known = set(found)
        shown = [*found, *(i for i in shown if i not in known)][:count]
    likely = [
        {"class": names[i], "confidence": float(shares[i]), "threshold": float(thresholds[i])}
        for i in shown
    ]
    return {"file": file, "labels": [names[i] for i in found], "predictions": likely}


@asynccontextmanager
async def _deadline(until: float, receive: Receive) -> AsyncIterator[None]:
    """Raise RefusedError (504) at ``until``, by ``time.monotonic``, and ClientGoneError once the
    client has gone. ``receive`` is that of a request whose body has come."""
    watcher: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(until - time.monotonic()) as due:
            watcher = asyncio.create_task(_end_with_client(receive, due))
            yield
    except TimeoutError:
        if watcher is not None and watcher.done():
            raise ClientGoneError from None
        raise RefusedError(504, "the answer did not come in time") from None
    finally:
        if watcher is not None:
            watcher.cancel()


async def _end_with_client(receive: Receive, due: asyncio.Timeout) -> None:
    await receive()  # after the body nothing comes, but that the client has gone
    due.reschedule(0)
