"""Checkpoints: fields of odd types and shapes, damaged files, ONNX files of odd form."""

import functools
import importlib.util
import io
import json
import random
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import config
import inference
import models
from augmentation.preprocessing import Preprocessing
from checkpointing.digest import save_safetensors
from checkpointing.files import (
    load_checkpoint,
    options_of,
    save_checkpoint,
    split_of,
    thresholds_of,
    weights_of,
)
from checkpointing.folder import load_newest, name_of
from errors import UserError
from optimization.optimizer import build_optimizer
from optimization.schedule import build_schedule
from optimization.state import TrainState
from tools.torture.targets import Target
from tools.torture.targets.mutation import changed, mutated, odd_number, odd_text, odd_value
from training.resume import find_start, refuse_other_options, resume
from utils import rng_state

_NAMES = ["amber", "blue", "crimson"]
_SIZE = 32
_MODEL = "modern_lenet"
_UPDATES = 5
_DTYPES = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16)
# Sparse tensors warn that they are not done yet.
_KINDS: tuple[Callable[[], Tensor], ...] = (
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: torch.empty(3, device="meta"),
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(0),
    lambda: torch.zeros(3, 0, 2),
)


@functools.cache
def _config() -> config.Config:
    return config.resolve({"model": _MODEL, "input_size": _SIZE, "amp": "fp16"})


def state_of(model: nn.Module) -> TrainState:
    """As a run has it, with a loss scaler."""
    options = _config()
    schedule = build_schedule(options.schedule, lr=0.1, epochs=3, updates_per_epoch=_UPDATES)
    optimizer = build_optimizer(model, options.optim, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    return TrainState(model, optimizer, schedule, scaler, None, lambda module: module)


def update(state: TrainState) -> None:
    """One step on a batch of ones, (2, 4)."""
    loss = state.model(torch.ones(2, 4)).square().mean()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()


@functools.cache
def _content(kind: str) -> dict[str, Any]:
    """A checkpoint of a model by name; of "state", that of a run with one small layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        state = state_of(model)
        update(state)
        if kind != "state":
            model = models.build_model(_MODEL, len(_NAMES), input_size=_SIZE)
        return state.state_dict() | {
            "model": model.state_dict(),
            "rng": rng_state(),
            "config": _config().recipe(),
            "class_names": _NAMES,
            "preprocessing": Preprocessing(_SIZE, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).to_dict(),
            "split": {"seed": 0, "held_out": torch.arange(4), "train": 40},
            "metrics": {"test_acc1": 50.0, "test_loss": 1.0},
            "thresholds": [0.5] * len(_NAMES),
            "ema_thresholds": [0.25, 0.5, 1.0],
            "tracking": {"key": "0" * 16, "project": "p", "name": "n"},
            "bad_images": ["a.png: cut off"],
            "versions": {"torch": "2.0", "timm": "1.0"},
        }


def _odd(rng: random.Random) -> Any:
    """A value of any type, tensors of all kinds too."""
    chance = rng.random()
    if chance < 0.15:
        return rng.choice(_KINDS)()
    if chance < 0.35:
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        return torch.zeros(shape, dtype=rng.choice((torch.float32, *_DTYPES)))
    if chance < 0.38:
        return (odd_text(rng),) * rng.choice((1, 3, 20_000))
    if chance < 0.41:
        return {odd_number(rng): odd_value(rng)}
    if chance < 0.43:
        return functools.reduce(lambda inner, _: [inner, inner], range(rng.choice((20, 80))), 0)
    return odd_value(rng)


def _fields(kind: str, rng: random.Random) -> dict[str, Any]:
    content = _content(kind)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = changed(rng, content, _odd)
        content = found if isinstance(found, dict) else {"model": found}
    return content


def _all(*readers: Callable[[], object]) -> None:
    """Call all of them; raise the last UserError that came out."""
    refused: UserError | None = None
    for read in readers:
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error), error
            refused = error
    if refused:
        raise refused


def _read_fields(content: dict[str, Any], folder: Path) -> None:
    """As commands do: the file, the options, the model, the weights."""
    path = folder / "checkpoint-0001.pth"
    torch.save(content, path)
    found = load_checkpoint(path)
    _all(
        lambda: options_of(path),
        lambda: split_of(found, 0),
        lambda: weights_of(found),
        lambda: thresholds_of(found),
        lambda: load_newest(folder),
        lambda: (inference.from_content(found), inference.metadata_of(found)),
    )


def _resume(content: dict[str, Any], folder: Path) -> None:
    """As a run does: what is taken must do for the next update."""
    for number in (1, 2):
        torch.save(content, folder / f"checkpoint-000{number}.pth")
    options = _config().replace("--resume", resume="auto")
    start = find_start(options, folder)
    state = state_of(nn.Linear(4, 3))
    data = SimpleNamespace(
        class_names=_NAMES,
        split={"seed": 0, "held_out": None, "train": 40},
        updates_per_epoch=lambda options: _UPDATES,
        sampler=SimpleNamespace(num_samples=40),
    )
    processes = SimpleNamespace(is_main=True, world_size=1)
    parts: Any = SimpleNamespace(config=options, state=state, data=data, processes=processes)
    refuse_other_options(options, start)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    try:
        resume(parts, folder, start)
    except UserError:
        now = state.model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items()), "half changed"
        raise
    state.schedule.rate(state.progress.update)
    name_of(state.state_dict())
    update(state)


# --- files ----------------------------------------------------------------------------------------


@functools.cache
def _files() -> dict[str, list[bytes]]:
    """Small valid files by suffix."""
    weights = {"w": torch.arange(12.0).view(3, 4), "b": torch.zeros(3, dtype=torch.float16)}
    content = {"model": weights, "progress": {"epoch": 1, "samples": 0}, "config": {"lr": 0.1}}
    plain, old = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    torch.save(content, old, _use_new_zipfile_serialization=False)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "x"
        save_checkpoint(path, content)
        sealed = path.read_bytes()
        save_safetensors(path, weights, inference.metadata_of(_content("")))
        exported = path.read_bytes()
    return {".pth": [sealed, plain.getvalue(), old.getvalue()], ".safetensors": [exported]}


def _damaged(rng: random.Random) -> tuple[str, bytes]:
    suffix = rng.choice((".pth", ".pth", ".pth", ".safetensors"))
    chance = rng.random()
    if suffix == ".pth" and chance < 0.4:
        return suffix, _archive_of(rng)
    if suffix == ".safetensors" and chance < 0.4:
        return suffix, _with_header(rng)
    return suffix, mutated(rng, _files()[suffix])


def _archive_of(rng: random.Random) -> bytes:
    """An archive whose checksums fit the pickle in it, which is damaged."""
    [_, plain, _] = _files()[".pth"]
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(plain)) as source, zipfile.ZipFile(file, "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(".pkl") or rng.random() < 0.1:
                content = mutated(rng, [content])
            name = entry.filename if rng.random() < 0.98 else f"x/{odd_text(rng)[:99]}"
            packed = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
            archive.writestr(name.encode("utf-8", "replace").decode(), content, packed)
    return file.getvalue()


def _with_header(rng: random.Random) -> bytes:
    [exported] = _files()[".safetensors"]
    length = int.from_bytes(exported[:8], "little")
    header = changed(rng, json.loads(exported[8 : 8 + length]))
    text = json.dumps(header).encode("utf-8", "replace")
    return len(text).to_bytes(8, "little") + text + exported[8 + length :]


def _read_file(given: tuple[str, bytes], folder: Path) -> None:
    suffix, content = given
    path = folder / f"x{suffix}"
    path.write_bytes(content)
    _all(
        lambda: inference.read_content(path),
        lambda: inference.read_content(path, weights=False),
        lambda: options_of(path),
    )


# --- ONNX -----------------------------------------------------------------------------------------


def _graph(rng: random.Random) -> dict[str, Any]:
    """What an ONNX file is to be like, in plain values."""
    dims = (None, "n", "m", 0, 1, 2, 3, 4, 8)
    found: dict[str, Any] = {
        "input": ["n", 3, 4, 4],
        "input_type": "FLOAT",
        "output": ["n", 3],
        "output_type": "FLOAT",
        "node": "MatMul",
        "outputs": 1,
        "metadata": {
            "config": {"model": _MODEL},
            "class_names": _NAMES,
            "preprocessing": Preprocessing(4, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).to_dict(),
        },
        "images": rng.choice((0, 1, 3)),
    }
    types = ("FLOAT", "DOUBLE", "FLOAT16", "INT64", "UINT8", "STRING", "BOOL")
    for _ in range(rng.randrange(3)):
        key = rng.choice(list(found))
        if key in ("input", "output"):
            dims_of = [rng.choice(dims) for _ in range(rng.randrange(6))]
            found[key] = rng.choice((None, dims_of, ["n", *dims_of]))
        elif key.endswith("type"):
            found[key] = rng.choice(types)
        elif key == "node":
            found[key] = rng.choice(("Shape", "Squeeze", "Nan", "Identity"))
        elif key == "outputs":
            found[key] = rng.randrange(4)
        elif key == "metadata":
            found[key] = changed(rng, found[key])
    return found


def _onnx_file(given: Mapping[str, Any], path: Path) -> None:
    import onnx
    from onnx import helper

    floats = onnx.TensorProto.FLOAT
    types = [getattr(onnx.TensorProto, given[name]) for name in ("input_type", "output_type")]
    weights = helper.make_tensor("w", floats, [48, 3], [0.1] * 144)
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=floats),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["z"]),
    ]
    last = given["node"]
    if last == "Nan":
        nodes.append(helper.make_node("Sub", ["z", "z"], ["d"]))
        nodes.append(helper.make_node("Div", ["d", "d"], ["l"]))
    else:
        nodes.append(helper.make_node("Identity" if last == "MatMul" else last, ["z"], ["l"]))
    nodes.append(helper.make_node("Cast", ["l"], ["y0"], to=types[1]))
    nodes += [helper.make_node("Identity", ["y0"], [f"y{i}"]) for i in range(1, given["outputs"])]
    inputs = [helper.make_tensor_value_info("x", types[0], given["input"])]
    outputs = [
        helper.make_tensor_value_info(f"y{i}", types[1], given["output"])
        for i in range(given["outputs"])
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    metadata = given["metadata"] if isinstance(given["metadata"], dict) else {}
    for name, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key = name.encode("utf-8", "replace").decode()
        entry.value = json.dumps(value)
    path.write_bytes(model.SerializeToString())


def _answer(given: Mapping[str, Any], folder: Path) -> None:
    path = folder / "x.onnx"
    _onnx_file(given, path)
    classifier = inference.load_for_inference(path)
    answers = classifier.model(torch.ones(given["images"], 3, 4, 4))
    assert answers.shape == (given["images"], len(classifier.class_names))


TARGETS = (
    Target("checkpoint fields", functools.partial(_fields, "model"), _read_fields, share=0.1),
    Target("checkpoint resumed", functools.partial(_fields, "state"), _resume, share=0.1),
    Target("checkpoint files", _damaged, _read_file, share=0.3),
)
if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
    TARGETS += (Target("ONNX files", _graph, _answer, share=0.1),)
