"""Write a trained model for use elsewhere: ONNX, TorchScript, torch.export, safetensors, int8 ONNX,
timm's hub form.

Class names and preprocessing travel in each file. Each file is opened again and compared with the
model on the run's validation images.
"""

import argparse
import copy
import io
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

import inference
from augmentation.preprocessing import Preprocessing
from checkpointing.digest import save_safetensors
from errors import OptionError, UserError
from loggers import CURVES_FILE
from outputs.console import say
from outputs.files import as_os_error
from tools.common import command, trained
from tools.common.labels import is_multilabel
from tools.common.onnx_files import INPUT, reason_of, save_onnx, to_onnx
from tools.hub import card, folder, push

TOLERANCE = 1e-4  # largest difference of a logit, for formats that keep every digit
QUANTISED = ("Conv", "Gemm", "MatMul")
_TIMED = 32  # images at a time when speed is measured
_RUNS = 5


class Images(NamedTuple):
    """What exports are compared on."""

    images: Tensor
    """(N, 3, H, W) as the model takes them."""
    targets: Tensor | None
    """(N,), or (N, C) of 0 and 1 of a multi-label set; None for noise."""


class Row(NamedTuple):
    """How a file does beside the model it was made of."""

    format: str
    file: str
    size: int
    """Bytes."""
    milliseconds: float
    """An image, in batches."""
    difference: float
    """Largest difference of a logit from the model's."""
    accuracy: float | None
    """Top-1, or mean average precision of a multi-label set, share of 1; None without labels."""


# --- formats --------------------------------------------------------------------------------------
# Each writes the CPU model (in evaluation mode) of square images, whose number may vary: that of
# ONNX is in tools.common.onnx_files.

Metadata = Mapping[str, str]
Writer = Callable[[nn.Module, Tensor, Path, Metadata], None]


def to_torchscript(model: nn.Module, example: Tensor, path: Path, metadata: Metadata) -> None:
    """TorchScript with the metadata as ``_extra_files``."""
    traced = torch.jit.trace(model, example, check_trace=False)
    # torch's own writing to a file ends the process where the disk is full.
    content = io.BytesIO()
    torch.jit.save(traced, content, _extra_files=dict(metadata))
    path.write_bytes(content.getbuffer())


def to_program(model: nn.Module, example: Tensor, path: Path, metadata: Metadata) -> None:
    """A program of ``torch.export`` with the metadata as ``extra_files``."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=dict(metadata))
    path.write_bytes(content.getbuffer())


def to_safetensors(model: nn.Module, example: Tensor, path: Path, metadata: Metadata) -> None:
    """The weights as safetensors, with the metadata and a checksum in its header."""
    weights = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    command.require("safetensors.torch")
    save_safetensors(path, weights, metadata)


def to_int8_dynamic(source: Path, path: Path, metadata: Metadata, images: Images) -> None:
    """ONNX with int8 weights of linear layers; activations are quantised as they come."""
    quantization = command.require("onnxruntime.quantization", "onnxruntime")
    quantization.quantize_dynamic(
        source,
        path,
        op_types_to_quantize=["Gemm", "MatMul"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
    )
    save_onnx(command.require("onnx").load(path), path, metadata)


def to_int8_static(source: Path, path: Path, metadata: Metadata, images: Images) -> None:
    """ONNX with int8 weights and activations, whose ranges are those on the images."""
    if images.targets is None:
        raise UserError("int8-static needs images to find its ranges: add --data-path")
    quantization = command.require("onnxruntime.quantization", "onnxruntime")

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.images.split(_TIMED))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    quantization.quantize_static(
        source,
        path,
        Calibration(),
        op_types_to_quantize=list(QUANTISED),
        per_channel=True,
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    save_onnx(command.require("onnx").load(path), path, metadata)


HUB = "hub"  # a folder; what it is made of, beside the model: tools.hub
WRITERS: Mapping[str, Writer] = {
    "onnx": to_onnx,
    "torchscript": to_torchscript,
    "program": to_program,
    "safetensors": to_safetensors,
}
INT8 = {"int8-dynamic": to_int8_dynamic, "int8-static": to_int8_static}
SUFFIXES = {
    "onnx": ".onnx",
    "torchscript": ".torchscript",
    "program": ".pt2",
    "safetensors": ".safetensors",
    "int8-dynamic": ".int8-dynamic.onnx",
    "int8-static": ".int8-static.onnx",
    HUB: ".hub",
}


# --- opening and comparing ------------------------------------------------------------------------


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The model in an exported file or folder, on the CPU."""
    if path.is_dir():
        return folder.opened(path)
    if path.suffix == ".torchscript":
        return torch.jit.load(str(path), map_location="cpu")
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    return inference.load_for_inference(path).model


@torch.no_grad()
def compare(
    format: str, path: Path, model: Callable[[Tensor], Tensor], images: Images, wanted: Tensor
) -> Row:
    """``model``, from the file ``path``, beside the ``wanted`` (N, C) logits."""
    logits = answers(model, images.images)
    accuracy = None if images.targets is None else _accuracy(logits, images.targets)
    difference = float((logits - wanted).abs().max())
    return Row(
        format,
        str(path),
        _size(path, model),
        _milliseconds(model, images.images[:_TIMED]),
        difference,
        accuracy,
    )


def _accuracy(logits: Tensor, targets: Tensor) -> float | None:
    """Top-1, or mean average precision where an image has any number of labels; None where none has
    one."""
    if targets.ndim == 1:
        return float((logits.argmax(1) == targets).float().mean())
    there = (targets > 0).any(0)
    if not there.any():
        return None
    return float(average_precision_score(targets[:, there], logits[:, there]))


def _size(path: Path, model: Callable[[Tensor], Tensor]) -> int:
    """Bytes of a file or folder; of a published model by name, those of its tensors."""
    if path.exists():
        return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
    return sum(x.nbytes for x in model.state_dict().values())


def _milliseconds(model: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """An image, in the fastest of several runs; the model has run before."""
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        model(images)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds) / len(images)


# --- export ---------------------------------------------------------------------------------------


def export(
    model: nn.Module,
    metadata: Metadata,
    stem: Path,
    formats: Sequence[str],
    images: Images,
    wanted: Tensor,
    writers: Mapping[str, Writer] = WRITERS,
) -> Iterator[Row]:
    """Write ``stem`` with each format's suffix, one after the other, each compared.

    Args:
        model: on the CPU, in evaluation mode.
        metadata: as of ``inference.metadata_of``.
        stem: path without suffix.
        formats: keys of SUFFIXES.
        images: to compare on, and to find the int8 ranges.
        wanted: (N, C), the model's logits for them.
        writers: of the formats that keep every digit.

    Raises:
        UserError: the model can't be written so, or what was written answers differently.
    """
    # Exporters change flags of the model.
    model = copy.deepcopy(model).requires_grad_(False)
    # One image would be taken for a fixed number of them.
    example = images.images[:1].expand(2, -1, -1, -1).contiguous()
    with tempfile.TemporaryDirectory() as scratch:
        floating = Path(scratch) / "float.onnx"
        for format in formats:
            path = stem.with_name(stem.name + SUFFIXES[format])
            with _explained(format, path), _quiet():
                if format in writers:
                    writers[format](model, example, path, metadata)
                    floating = path if format == "onnx" else floating
                else:
                    if not floating.exists():
                        to_onnx(model, example, floating, metadata)
                    INT8[format](floating, path, metadata, images)
                row = compare(format, path, opened(path), images, wanted)
            scale = max(1.0, float(wanted.abs().max()))
            if format in writers and not row.difference <= TOLERANCE * scale:
                folder.remove(path) if path.is_dir() else path.unlink()
                raise UserError(f"{path} would answer otherwise, by {row.difference:.1e}: removed")
            yield row


@torch.no_grad()
def answers(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(N, C) logits, in batches."""
    return torch.cat([model(chunk) for chunk in images.split(_TIMED)])


@contextmanager
def _explained(format: str, path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the exporters raise types of many kinds
        if failure := as_os_error(error, path):
            folder.remove(path) if path.is_dir() else path.unlink(missing_ok=True)
            raise command.not_written(path, failure) from None
        raise UserError(f"this model can't be exported as {format}: {reason_of(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of shapes they look at, and log each of their steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- command line ---------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("export", __doc__)
    trained.add_model_arguments(parser)
    parser.add_argument("--format", nargs="+", choices=SUFFIXES, default=["onnx"], dest="formats")
    parser.add_argument("--output", type=Path, help="folder (default: export beside the model)")
    parser.add_argument(
        "--images", type=command.positive, default=256, help="how many to compare on"
    )
    trained.add_data_arguments(parser)
    hub = parser.add_argument_group("--format hub")
    hub.add_argument("--license", help="of the model card, as apache-2.0 (default: none is stated)")
    hub.add_argument("--push", metavar="OWNER/NAME", help="upload to the Hugging Face hub")
    hub.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.set_defaults(device="cpu")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.model.endswith(".onnx"):
        raise UserError(f"{arguments.model} is an export already: name the checkpoint")
    _check_hub_options(arguments)
    model = trained.open_model(arguments)
    model.classifier.model.cpu()
    images = _images(arguments, model)
    source = trained.stem(arguments.model)
    output = arguments.output or source.parent / "export"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise command.not_written(output, error) from None
    metadata = inference.metadata_of(model.content)
    bare = model.classifier.model
    wanted = answers(bare, images.images)
    measure = "mAP" if is_multilabel(model.classifier) else "top-1"
    print(f"{'format':<14}{'MiB':>8}{'ms/image':>12}{'difference':>12}{measure:>9}  file")
    say(_shown(compare("checkpoint", Path(arguments.model), bare, images, wanted)))
    stem = output / source.name
    writers = {**WRITERS, HUB: folder.writer(_run_of(arguments, model, source), arguments.push)}
    for row in export(bare, metadata, stem, arguments.formats, images, wanted, writers):
        say(_shown(row))
    if arguments.push:
        written = stem.with_name(stem.name + SUFFIXES[HUB])
        say(f"pushed: {push.push(written, arguments.push, private=arguments.private)}")


def _check_hub_options(arguments: argparse.Namespace) -> None:
    for name in ("license", "push", "private"):
        if getattr(arguments, name) and HUB not in arguments.formats:
            raise OptionError(name, f"is for --format {HUB}: add that")
    if arguments.private and not arguments.push:
        raise OptionError("private", "is for --push: add that")
    if arguments.push:
        push.check(arguments.push)


def _run_of(arguments: argparse.Namespace, model: trained.Trained, source: Path) -> card.Run:
    """What a model card tells of the model, which lies at ``source`` beside its run's files."""
    curves = source.parent / CURVES_FILE
    return card.Run(
        Path(arguments.push).name if arguments.push else source.absolute().parent.name,
        model.content,
        curves if curves.is_file() else None,
        arguments.license,
        arguments.ema,
    )


def _images(arguments: argparse.Namespace, model: trained.Trained) -> Images:
    """The first images of each stretch of the validation part; noise where that isn't here."""
    try:
        loader = trained.loader(arguments, model)
    except UserError as error:
        if arguments.data_path or arguments.data_set:
            raise
        say(f"note: compared on noise, for the run's images are not here ({error})")
        preprocessing = Preprocessing.from_dict(model.content["preprocessing"])
        shape = preprocessing.channels, *preprocessing.size
        generator = torch.Generator().manual_seed(0)
        return Images(torch.randn(_TIMED, *shape, generator=generator), None)
    count = len(loader.dataset)
    # Spread over the set, which is in order of the classes.
    chosen = np.linspace(0, count - 1, min(arguments.images, count)).astype(int)
    samples = [loader.dataset[int(i)] for i in command.progress(chosen, "images")]
    good = [sample for sample in samples if sample.image is not None]
    if not good:
        raise UserError(f"no image could be read: {samples[0].bad[0]}")
    return Images(
        torch.stack([sample.image for sample in good]),
        torch.from_numpy(np.array([sample.target for sample in good])),
    )


def _shown(row: Row) -> str:
    accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"
    return (
        f"{row.format:<14}{row.size / 2**20:>8.2f}{row.milliseconds:>12.2f}"
        f"{row.difference:>12.1e}{accuracy:>9}  {row.file}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
