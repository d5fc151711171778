"""The service's API as OpenAPI describes it."""

from typing import Any

from pydantic import BaseModel


class ErrorResponse(BaseModel):
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
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One entry per image, in order",
        "content": {"application/json": {"schema": ANSWERS}},
    },
    **{code: {"model": ErrorResponse, "description": text} for code, text in ERRORS.items()},
}
