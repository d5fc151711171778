"""The HTTP side: limits, status codes, answers as JSON, the pages."""

import asyncio
import base64
import hashlib
import io
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import UserError
from tools import explain, trained
from tools.serve import pictures
from tools.serve.batcher import Answer, Batcher
from tools.serve.drift import Watch
from tools.serve.measures import Measures
from tools.serve.pictures import RefusedError

HERE = Path(__file__).resolve().parent
PATHS = ("/", "/predict", "/health", "/metrics", "/docs", "/openapi.json")
LINGER = 1.0  # seconds in which the rest of a refused body is read and dropped
SHOWN_SIDE = 224  # pixels that an explanation has at least
MOST_CLASSES = 1000  # in one answer
MOST_FIELDS = 16  # of a form, beside its files; they are ignored


@dataclass(frozen=True)
class Limits:
    """What one client, and all of them together, may ask for."""

    body: int = 16 * 2**20
    """Bytes of a request's body."""
    pixels: int = 50_000_000
    """Of a picture, as its header tells."""
    pictures: int = 32
    """In a request."""
    pending: int = 256
    """Pictures in hand, of all requests together."""
    seconds: float = 10.0
    """From a request's first byte to its answer."""


@dataclass(frozen=True)
class Batching:
    """How pictures are brought together; see ``Batcher``."""

    max_batch: int = 16
    max_wait: float = 0.005
    decoders: int = 1


class Service:
    """A model that answers requests: threads, limits, measures."""

    def __init__(
        self,
        model: trained.Trained,
        name: str,
        *,
        limits: Limits,
        batching: Batching,
        watch: Watch | None = None,
    ) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.classifier = model.classifier
        self.measures = Measures(self.classifier.class_names, watch)
        self.pending = 0
        self.batcher = Batcher(
            lambda content: pictures.decoded(content, self.classifier.transform, limits.pixels),
            self._predict,
            max_batch=batching.max_batch,
            max_wait=batching.max_wait,
            decoders=batching.decoders,
            on_batch=self.measures.batched,
        )
        # An explanation costs several answers: one at a time.
        self.explainer = ThreadPoolExecutor(1, "explain")
        self.explaining = asyncio.Semaphore(1)

    def close(self) -> None:
        """Answer what is in hand, then end the threads."""
        self.batcher.close()
        self.explainer.shutdown()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Room for ``count`` pictures. Raises RefusedError (503) where there is none."""
        if self.pending + count > self.limits.pending:
            raise RefusedError(503, "too many requests are waiting: try again in a second")
        self._pend(count)
        try:
            yield
        finally:
            self._pend(-count)

    async def answer(self, content: bytes) -> Answer:
        """The model's answer to a picture file. Raises RefusedError."""
        try:
            answer = await asyncio.wrap_future(self.batcher.ask(content))
        except RefusedError as error:
            self.measures.refused.labels(error.status).inc()
            raise
        self.measures.answered(answer)
        return answer

    async def explained(self, answer: Answer, class_index: int | None) -> str:
        """The picture as the model sees it under its heat map, a PNG as a data URL.

        Raises RefusedError (422) where the model can't be explained.
        """
        await self.explaining.acquire()
        task = asyncio.get_running_loop().run_in_executor(
            self.explainer, self._explain, answer.tensor, class_index
        )
        # A client whose time is up leaves the thread at work.
        task.add_done_callback(self._explained)
        try:
            return await asyncio.shield(task)
        except UserError as error:
            raise RefusedError(422, str(error)) from None

    def _explained(self, task: asyncio.Future[str]) -> None:
        self.explaining.release()
        task.exception()  # or it would be told as never heard of, where the client is gone

    def _pend(self, count: int) -> None:
        self.pending += count
        self.measures.pending.set(self.pending)

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        return trained.probabilities(self.classifier.model, images.to(self.model.device)).cpu()

    def _explain(self, tensor: torch.Tensor, class_index: int | None) -> str:
        heat = explain.heatmap(self.classifier, tensor, class_index)
        preprocessing = self.model.content["preprocessing"]
        seen = explain.seen(tensor, preprocessing["mean"], preprocessing["std"])
        size = [max(SHOWN_SIDE, side) for side in seen.size]
        drawn = explain.overlay(seen.resize(size, Image.Resampling.NEAREST), heat)
        buffer = io.BytesIO()
        drawn.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- the request's way in -------------------------------------------------------------------------


class Door:
    """ASGI around the application: bodies are counted as they come, requests are measured."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        body = _Body(scope, receive, self.service.limits.body)
        status, start = 500, time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await body.drop_rest()
            await send(message)

        try:
            await self.app(scope, body.receive, watched_send)
        finally:
            measures = self.service.measures
            measures.requests.labels(path, status).inc()
            measures.seconds.labels(path).observe(time.perf_counter() - start)


class _Body:
    """A request's body, counted as it comes."""

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        headers = dict(scope["headers"])
        self.limit, self.received = limit, 0
        self.announced = int(headers.get(b"content-length", 0))
        self.ended = not self.announced and b"transfer-encoding" not in headers
        self._receive = receive

    async def receive(self) -> Message:
        """As ASGI's. Raises HTTPException (413) for a body that is too large."""
        message = await self._next()
        # What is announced is refused at once; what isn't, when it has come.
        if max(self.announced, self.received) > self.limit:
            raise HTTPException(413, f"the body is larger than {self.limit:,} bytes")
        return message

    async def drop_rest(self) -> None:
        """Read what is left, for a moment: a client that is still sending hears no answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while not self.ended:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message


async def _files(request: Request, limits: Limits) -> list[tuple[str | None, bytes]]:
    """(name, content) of each picture in the body. Raises RefusedError and HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=limits.pictures, max_fields=MOST_FIELDS) as form:
            parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            found = [(part.filename, await part.read()) for part in parts]
    elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
        found = [(None, await request.body())]
    else:
        raise RefusedError(
            415, f"{kind} is none of multipart/form-data, image/* and application/octet-stream"
        )
    if not found or found == [(None, b"")]:
        raise RefusedError(400, "the body holds no picture")
    return found


# --- the application ------------------------------------------------------------------------------


class Problem(BaseModel):
    """Why there is no answer."""

    error: str


BINARY = {"schema": {"type": "string", "format": "binary"}}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "array", "items": BINARY["schema"]}},
            }
        },
        "image/*": BINARY,
        "application/octet-stream": BINARY,
    },
}
ANSWERS = {
    "type": "object",
    "properties": {
        "pictures": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "file": {"type": ["string", "null"]},
                    "predictions": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "class": {"type": "string"},
                                "confidence": {"type": "number"},
                            },
                        },
                    },
                    "explanation": {"type": "string", "description": "a PNG as a data URL"},
                    "error": {"type": "string", "description": "in place of predictions"},
                    "status": {"type": "integer", "description": "beside error"},
                },
            },
        }
    },
}
PROBLEMS = {
    400: "Broken multipart, no picture, or more pictures than a request may hold",
    408: "The body did not come in time",
    413: "The body has too many bytes, or the picture too many pixels",
    415: "The body's type is neither multipart/form-data nor a picture",
    422: "Not a picture, a damaged one, or a parameter out of its range",
    500: "The model failed; the service's log says why",
    503: "Too much is waiting; Retry-After says when to come again",
    504: "The answer did not come in time",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One entry a picture, in order",
          "content": {"application/json": {"schema": ANSWERS}}},
    **{code: {"model": Problem, "description": text} for code, text in PROBLEMS.items()},
}  # fmt: skip


def build_app(service: Service) -> ASGIApp:
    """The service as an ASGI application. It closes the service when the server ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="Image classifier",
        description=f"Answers of {service.name}, {len(service.classifier.class_names)} classes.",
        docs_url=None,  # FastAPI's page fetches its scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_errors(app)
    _add_pages(app)

    @app.post("/predict", responses=RESPONSES, openapi_extra={"requestBody": BODY})
    async def predict(
        request: Request,
        topk: Annotated[int, Query(ge=1, le=MOST_CLASSES, description="classes an answer")] = 5,
        explain: Annotated[bool, Query(description="with a heat map; of one picture")] = False,
        about: Annotated[
            str | None, Query(description="the class to explain, else the likeliest")
        ] = None,
    ) -> JSONResponse:
        """Name what is on a picture, or on several."""
        return await _predict(service, request, topk, explain, about)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the service runs, and which model it asks."""
        names = service.classifier.class_names
        return {"status": "ok", "model": service.name, "classes": len(names)}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Requests, times, confidences and drift, in Prometheus' text format."""
        content = generate_latest(service.measures.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    return Door(app, service)


async def _predict(
    service: Service, request: Request, topk: int, explains: bool, about: str | None
) -> JSONResponse:
    names, limits = service.classifier.class_names, service.limits
    if about is not None and about not in names:
        raise RefusedError(422, "about: the model knows no such class")
    until = asyncio.get_running_loop().time() + limits.seconds
    with service.places(1):
        async with _deadline(until, 408, "the body did not come in time"):
            files = await _files(request, limits)
        if explains and len(files) > 1:
            raise RefusedError(422, "explain: send one picture at a time")
        with service.places(len(files) - 1):
            async with _deadline(until, 504, "the answer did not come in time"):
                answers = await asyncio.gather(
                    *(service.answer(content) for _, content in files), return_exceptions=True
                )
                entries = [
                    _entry(name, answer, names, topk)
                    for (name, _), answer in zip(files, answers, strict=True)
                ]
                if explains and isinstance(answers[0], Answer):
                    index = None if about is None else names.index(about)
                    entries[0]["explanation"] = await service.explained(answers[0], index)
    refused = [answer for answer in answers if isinstance(answer, RefusedError)]
    if len(refused) == len(answers):
        content = {"error": refused[0].message, "pictures": entries}
        return JSONResponse(content, refused[0].status)
    return JSONResponse({"pictures": entries})


def _entry(
    file: str | None, answer: Answer | BaseException, names: list[str], topk: int
) -> dict[str, Any]:
    """A picture's part of the JSON."""
    if isinstance(answer, RefusedError):
        return {"file": file, "error": answer.message, "status": answer.status}
    if isinstance(answer, BaseException):
        raise answer
    order = (-answer.probabilities).argsort(kind="stable")[:topk]
    likely = [{"class": names[i], "confidence": float(answer.probabilities[i])} for i in order]
    return {"file": file, "predictions": likely}


@asynccontextmanager
async def _deadline(until: float, status: int, message: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(until):
            yield
    except TimeoutError:
        raise RefusedError(status, message) from None


def _problem(status: int, message: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error": message}, status, headers)


def _add_errors(app: FastAPI) -> None:
    """Every error is ``{"error": one line}``; what went wrong inside stays in the log."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return _problem(error.status, error.message)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, error.detail)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:
        return _problem(400, "the body ended early")

    @app.exception_handler(RequestValidationError)
    async def parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _problem(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, "the service failed on this request; its log says why")


def _add_pages(app: FastAPI) -> None:
    for path, file in (("/", "page.html"), ("/docs", "docs.html")):
        text = (HERE / file).read_text(encoding="utf-8")
        headers = {
            "Content-Security-Policy": _policy(text),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        page = HTMLResponse(text, headers=headers)
        app.add_api_route(path, _always(page), include_in_schema=False)


def _always(page: HTMLResponse) -> Callable[[], Awaitable[HTMLResponse]]:
    async def answer() -> HTMLResponse:
        return page

    return answer


def _policy(page: str) -> str:
    """A page may run its own scripts and ask its own host, nothing else."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
