"""Writing a model as ONNX, by whichever of torch's exporters can."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from tools.common import command

INPUT, OUTPUT = "images", "logits"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def to_onnx(model: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write ``model`` (CPU, evaluation mode) with the metadata as ``metadata_props``.

    The exporter that is built on ``torch.export`` comes first. Where it fails, the older one
    traces the model: with any number of images, else with one at a time. What was needed is said.

    Args:
        example: (B, 3, H, W), B of at least 2: one image would be taken for a fixed number.

    Raises:
        UserError: no exporter can; the message has the reasons of both.
    """
    onnx = command.require("onnx")
    command.require("onnxscript")
    try:
        proto = _exported(model, example)
    except Exception as error:  # of many kinds
        reason = reason_of(error)
        proto, free = _traced_or_refused(onnx, model, example, reason)
        note = "" if free else ", which fixes the number of images at 1"
        print(f"note: onnx is written by torch's older exporter{note}; the newer one: {reason}")
    save_onnx(proto, path, metadata)


def save_onnx(proto: Any, path: Path, metadata: Mapping[str, str]) -> None:
    """Check the model ``proto`` (a ``ModelProto``) and write it with the metadata."""
    onnx = command.require("onnx")
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def reason_of(error: BaseException) -> str:
    """The first line of what began it: exporters wrap an error in advice about themselves."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    text = _COLOUR.sub("", str(error)).strip() or type(error).__name__
    return text.splitlines()[0]


def _exported(model: nn.Module, example: Tensor) -> Any:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    return program.model_proto


def _traced_or_refused(
    onnx: Any, model: nn.Module, example: Tensor, reason: str
) -> tuple[Any, bool]:
    """The traced model, and whether it takes any number of images. UserError where it can't be
    traced either; ``reason`` is why it was tried."""
    try:
        proto = _traced(onnx, model, example, free=True)
        if _takes(proto, example[:1].expand(3, -1, -1, -1)):
            return proto, True
        return _traced(onnx, model, example[:1], free=False), False
    except Exception as error:  # of many kinds
        raise UserError(
            f"this model can't be exported as onnx: {reason}; by torch's older exporter: "
            f"{reason_of(error)}"
        ) from error


def _traced(onnx: Any, model: nn.Module, example: Tensor, *, free: bool) -> Any:
    """The model as the older exporter sees it run; ``free``: its number of images may vary."""
    names = (INPUT, OUTPUT)
    file = io.BytesIO()
    torch.onnx.export(
        model,
        (example,),
        file,
        dynamo=False,
        dynamic_axes={name: {0: "batch"} for name in names} if free else None,
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    return onnx.load_from_string(file.getvalue())


def _takes(proto: Any, images: Tensor) -> bool:
    """Whether the model answers ``images``: tracing may have kept the example's number of them."""
    onnxruntime = command.require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: a refusal is an answer here
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    try:
        [answers] = session.run(None, {INPUT: images.numpy()})
    except Exception:  # onnxruntime raises types of its own
        return False
    return len(answers) == len(images)
