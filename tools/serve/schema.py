"""The service's API as OpenAPI describes it."""

from typing import Any

TOPK = 5  # classes of an answer, unless a request says otherwise
MOST_CLASSES = 1000  # in one answer

BINARY = {"schema": {"type": "string", "format": "binary"}}
TEXT = {"text/plain": {"schema": {"type": "string"}}}
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
        "images": {
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
ERRORS = {
    400: "Broken multipart, no image, or more images than a request may hold",
    408: "The body did not come in time, or came too slowly",
    413: "The body has too many bytes, or the image too many pixels",
    415: "The body's type is neither multipart/form-data nor an image",
    422: "Not an image, a damaged one, or a parameter out of its range",
    500: "The model failed; the service's log says why",
    503: "Too much is waiting or coming; Retry-After says when to come again",
    504: "The answer did not come in time",
}
PARAMETERS = (
    (
        "topk",
        "integer",
        "classes per answer",
        {"default": TOPK, "minimum": 1, "maximum": MOST_CLASSES},
    ),
    ("explain", "boolean", "with a heat map; of one image", {"default": False}),
    ("about", "string", "the class to explain, else the likeliest", {}),
)


def openapi(name: str, classes: int) -> dict[str, Any]:
    """The description of the service that answers with the model ``name``."""
    unwell = {503: "What is stuck, or that it ends"}
    health = "Whether images are answered, and by which model."
    live = "Whether the service need not be restarted: nothing is stuck, though it may be ending."
    metrics = "Requests, times, confidences and drift, in Prometheus' text format."
    well = _json({"type": "object"}, "It is well")
    text = {"description": "All of them", "content": TEXT}
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Image classifier",
            "description": f"Answers of {name}, {classes} classes.",
            "version": "1",
        },
        "paths": {
            f"/{path}": {method: {"operationId": path, **operation}}
            for path, method, operation in (
                ("predict", "post", _predict()),
                ("health", "get", _operation(health, well, unwell)),
                ("live", "get", _operation(live, well, unwell)),
                ("metrics", "get", _operation(metrics, text, {})),
            )
        },
        "components": {"schemas": {"Error": error}},
    }


def _predict() -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "description": text, "schema": {"type": kind, **more}}
        for name, kind, text, more in PARAMETERS
    ]
    answers = _json(ANSWERS, "One entry per image, in order")
    operation = _operation("Classify an image, or several.", answers, ERRORS)
    return {**operation, "parameters": parameters, "requestBody": BODY}


def _operation(text: str, answer: dict[str, Any], errors: dict[int, str]) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    failures = {str(code): _json(error, why) for code, why in errors.items()}
    return {"description": text, "responses": {"200": answer, **failures}}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
