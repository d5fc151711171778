"""The service's API as OpenAPI describes it."""

import copy
from typing import Any

from augmentation.protocol import RGB, Form

TOPK = 5  # classes of an answer, unless a request says otherwise
TAKEN = "JPEG, PNG, WebP, GIF, BMP, TIFF, NPY or NPZ"
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
# What there is besides of a multi-label model.
LABELS = {
    "type": "array",
    "items": {"type": "string"},
    "description": "whose probability reaches its threshold, the likeliest first; may be empty",
}
THRESHOLD = {"type": "number", "description": "from which the label is there"}
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


def openapi(name: str, classes: int, *, several: bool = False, form: Form = RGB) -> dict[str, Any]:
    """The description of the service that answers with the model ``name``.

    ``several``: an image may have any number of the classes. ``form``: of the images that it takes.
    """
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
            "description": f"Answers of {name}, {classes} classes"
            + (", any number of them on an image." if several else ".")
            + _images(form),
            "version": "1",
        },
        "paths": {
            f"/{path}": {method: {"operationId": path, **operation}}
            for path, method, operation in (
                ("predict", "post", _predict(several)),
                ("health", "get", _operation(health, well, unwell)),
                ("live", "get", _operation(live, well, unwell)),
                ("metrics", "get", _operation(metrics, text, {})),
            )
        },
        "components": {"schemas": {"Error": error}},
    }


def _images(form: Form) -> str:
    """Which images are to be sent, where they aren't three colours of 8 bits; a sentence."""
    if form == RGB:
        return ""
    kind = "grey images" if form.channels == 1 else f"images of {form.channels} channels"
    # Other files hold four channels at most.
    files = TAKEN if form.channels <= 4 else "TIFF, NPY or NPZ"
    return f" It takes {kind}, at {form.bit_depth} bits: {files}."


def _predict(several: bool) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "query", "description": text, "schema": {"type": kind, **more}}
        for name, kind, text, more in PARAMETERS
    ]
    shown, text = ANSWERS, "Classify an image, or several."
    if several:
        shown = copy.deepcopy(ANSWERS)
        entry = shown["properties"]["images"]["items"]["properties"]
        entry["labels"] = LABELS
        entry["predictions"]["items"]["properties"]["threshold"] = THRESHOLD
        parameters[0]["description"] += ", else all labels that are there and at least these"
        text = "Find the labels of an image, or of several."
    answers = _json(shown, "One entry per image, in order")
    operation = _operation(text, answers, ERRORS)
    return {**operation, "parameters": parameters, "requestBody": BODY}


def _operation(text: str, answer: dict[str, Any], errors: dict[int, str]) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    failures = {str(code): _json(error, why) for code, why in errors.items()}
    return {"description": text, "responses": {"200": answer, **failures}}


def _json(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
