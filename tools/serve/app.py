"""The HTTP side: paths, parameters, status codes, answers as JSON."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive

from errors import printable
from tools.serve.batcher import Answer
from tools.serve.decoders import Content
from tools.serve.forms import files_of
from tools.serve.images import RefusedError
from tools.serve.middleware import RequestMiddleware
from tools.serve.pages import add_pages
from tools.serve.schema import BODY, RESPONSES, ErrorResponse
from tools.serve.service import Limits, Service

log = logging.getLogger(__name__)
FAILED = "the service failed on this request; its log says why"
MOST_CLASSES = 1000  # in one answer


class Answers(JSONResponse):
    """JSON in ASCII: names of classes may hold what UTF-8 can't say."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def build_app(service: Service) -> ASGIApp:
    """The service as an ASGI application."""
    app = FastAPI(
        title="Image classifier",
        description=f"Answers of {service.name}, {len(service.classifier.class_names)} classes.",
        docs_url=None,  # FastAPI's page fetches its scripts from another host
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=Answers,
    )
    _add_errors(app)
    add_pages(app)

    @app.post("/predict", responses=RESPONSES, openapi_extra={"requestBody": BODY})
    async def predict(
        request: Request,
        topk: Annotated[int, Query(ge=1, le=MOST_CLASSES, description="classes per answer")] = 5,
        explain: Annotated[bool, Query(description="with a heat map; of one image")] = False,
        about: Annotated[
            str | None, Query(description="the class to explain, else the likeliest")
        ] = None,
    ) -> JSONResponse:
        """Classify an image, or several."""
        return await _predict(service, request, topk, explain, about)

    _add_health(app, service)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Requests, times, confidences and drift, in Prometheus' text format."""
        content = generate_latest(service.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return RequestMiddleware(app, service)


def _add_health(app: FastAPI, service: Service) -> None:
    unwell = {503: {"model": ErrorResponse, "description": "What is stuck, or that it ends"}}

    @app.get("/health", responses=unwell)
    async def health() -> dict[str, Any]:
        """Whether images are answered, and by which model."""
        reason = service.stuck() or ("the service is ending" if service.ending else None)
        if reason:
            raise RefusedError(503, reason)
        names = service.classifier.class_names
        return {"status": "ok", "model": service.name, "classes": len(names)}

    @app.get("/live", responses=unwell)
    async def live() -> dict[str, str]:
        """Whether the service need not be restarted: nothing is stuck, though it may be ending."""
        if reason := service.stuck():
            raise RefusedError(503, reason)
        return {"status": "ok"}


async def _predict(
    service: Service, request: Request, topk: int, explains: bool, about: str | None
) -> JSONResponse:
    names, limits = service.classifier.class_names, service.limits
    if about is not None and about not in names:
        raise RefusedError(422, "about: the model knows no such class")
    until = time.monotonic() + limits.seconds
    service.check_room()
    async with _deadline(until, 408, "the body did not come in time"):
        files = await _files(request, limits)
    if explains and len(files) > 1:
        raise RefusedError(422, "explain: send one image at a time")
    with service.reserve(len(files)):
        answer_due = _deadline(until, 504, "the answer did not come in time", request.receive)
        async with answer_due:
            answers = await asyncio.gather(
                *(service.answer(content, until) for _, content in files), return_exceptions=True
            )
            failed = [a for a in answers if isinstance(a, BaseException)]
            if len(failed) == len(answers) and not isinstance(failed[0], RefusedError):
                raise failed[0]
            entries = [
                _entry(name, answer, names, topk)
                for (name, _), answer in zip(files, answers, strict=True)
            ]
            if explains and isinstance(answers[0], Answer):
                index = None if about is None else names.index(about)
                entries[0]["explanation"] = await service.explain(answers[0], index)
    if all("error" in entry for entry in entries):
        content = {"error": entries[0]["error"], "images": entries}
        return Answers(content, entries[0]["status"])
    return Answers({"images": entries})


async def _files(request: Request, limits: Limits) -> list[tuple[str | None, Content]]:
    """(name, content) of each image in the body. Raises RefusedError."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    is_image = kind in ("", "application/octet-stream") or kind.startswith("image/")
    if not is_form and not is_image:
        raise RefusedError(
            415,
            f"{printable(kind[:100])} is none of multipart/form-data, image/* and "
            "application/octet-stream",
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    found: list[tuple[str | None, Content]] = [(None, body)] if body else []
    if is_form:
        found = [*files_of(body, given, limits.images)]
    if not found:
        raise RefusedError(400, "the body holds no image")
    return found


def _entry(
    file: str | None, answer: Answer | BaseException, names: list[str], topk: int
) -> dict[str, Any]:
    """An image's part of the JSON."""
    if isinstance(answer, RefusedError):
        return {"file": file, "error": answer.message, "status": answer.status}
    if isinstance(answer, BaseException):
        log.error("no answer to an image", exc_info=answer)
        return {"file": file, "error": FAILED, "status": 500}
    order = (-answer.probabilities).argsort(kind="stable")[:topk]
    likely = [{"class": names[i], "confidence": float(answer.probabilities[i])} for i in order]
    return {"file": file, "predictions": likely}


@asynccontextmanager
async def _deadline(
    until: float, status: int, message: str, receive: Receive | None = None
) -> AsyncIterator[None]:
    """Raise RefusedError at ``until``, by ``time.monotonic``; with ``receive``, that of a request
    whose body has come, ClientDisconnect once the client has gone."""
    watcher: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(until - time.monotonic()) as due:
            if receive is not None:
                watcher = asyncio.create_task(_end_with_client(receive, due))
            yield
    except TimeoutError:
        if watcher is not None and watcher.done():
            raise ClientDisconnect from None
        raise RefusedError(status, message) from None
    finally:
        if watcher is not None:
            watcher.cancel()


async def _end_with_client(receive: Receive, due: asyncio.Timeout) -> None:
    await receive()  # after the body nothing comes, but that the client has gone
    due.reschedule(0)


def _error(status: int, message: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return Answers({"error": message}, status, headers)


def _add_errors(app: FastAPI) -> None:
    """Every error is ``{"error": one line}``; what went wrong inside stays in the log."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return _error(error.status, error.message)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:
        return _error(400, "the body ended early")

    @app.exception_handler(RequestValidationError)
    async def parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _error(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return _error(500, FAILED)
