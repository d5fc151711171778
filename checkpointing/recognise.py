"""What a file is that isn't a checkpoint, by its first bytes, and what to give in its place."""

import json
import re
from pathlib import Path

from checkpointing.archive import is_archive, names_in

_NAME_ONE = "name a checkpoint (.pth, .safetensors)"
_UNPACK = "unpack it first, and name the checkpoint in it"
_OTHER_LIBRARY = "only PyTorch's weights are read: convert it first"

# (offset, bytes there, what the file is, what to do)
_SIGNATURES = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file", "git lfs pull fetches it"),
    (0, b"/annex/objects/", "a git-annex pointer, not the file", "git annex get fetches it"),
    (0, b"\x89PNG\r\n", "a PNG image", _NAME_ONE),
    (0, b"\xff\xd8\xff", "a JPEG image", _NAME_ONE),
    (0, b"GIF8", "a GIF image", _NAME_ONE),
    (0, b"BM", "a BMP image", _NAME_ONE),
    (0, b"II*\0", "a TIFF image", _NAME_ONE),
    (0, b"MM\0*", "a TIFF image", _NAME_ONE),
    (8, b"WEBP", "a WebP image", _NAME_ONE),
    (4, b"ftyp", "an HEIC or AVIF image, or a video", _NAME_ONE),
    (0, b"%PDF", "a PDF document", _NAME_ONE),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"\x89HDF\r\n", "an HDF5 file, as TensorFlow and Keras write them", _OTHER_LIBRARY),
    (4, b"TFL3", "a TensorFlow Lite model", _OTHER_LIBRARY),
    (0, b"GGUF", "a GGUF file", _OTHER_LIBRARY),
    (0, b"\x93NUMPY", "a NumPy array", _NAME_ONE),
    (0, b"\x7fELF", "a program or library", _NAME_ONE),
)
# What torch.save writes without a zip archive begins with this number.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_HEAD = 1024  # bytes that are looked at


def what_it_is(path: Path) -> str | None:
    """``is a PNG image: name a checkpoint …`` of a file or folder that can't be a checkpoint.

    None where it may be one. A file's name doesn't count, but for what it should be named. Raises
    OSError where it can't be read.
    """
    if path.is_dir():
        return _folder(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "is empty: copy or download it again"
    if head.startswith(b"PK"):
        return _zip(path)
    # First, as it begins with a number, which may be any signature.
    if path.suffix == ".safetensors" and head[8:9] == b"{":
        return None
    for offset, signature, what, fix in _SIGNATURES:
        if head.startswith(signature, offset):
            return f"is {what}: {fix}"
    if re.match(rb"\x80[\x02-\x05]", head) and _LEGACY in head[:24]:
        return None
    if not head.strip(b"\0"):
        return "is empty, it begins with zeros alone: copy or download it again"
    found = _safetensors(path, head) or _protobuf(head) or _pickle(head) or _text(path, head)
    return found or f"is no checkpoint, it begins with the bytes {head[:8].hex(' ')}: {_NAME_ONE}"


def _folder(path: Path) -> str:
    """A folder that isn't a sharded checkpoint."""
    newest = sorted((*path.glob("checkpoint-*.pth"), *path.glob("checkpoint-*.shards")))[-1:]
    found = [p for p in (path / "best.pth", *newest) if p.exists()] or sorted(path.glob("*.pth"))
    if found:
        return f"is a folder: name a checkpoint in it, {' or '.join(map(str, found[:2]))}"
    return "is a folder without a checkpoint or config.json: name a file"


def _zip(path: Path) -> str | None:
    if not is_archive(path):
        size = path.stat().st_size
        return f"is cut off, its end is missing after {size} bytes: copy or download it again"
    names = names_in(path)
    if not names:
        return None  # damaged: reading it says where
    ends = [name.partition("/")[2] for name in names]
    if "constants.pkl" in ends:
        return "is a TorchScript archive: name the checkpoint that it was exported from"
    if "data.pkl" in ends:
        return None
    if any(name.endswith((".pt2", "models/model.json", "archive_format")) for name in names):
        return "is a program of torch.export: name the checkpoint that it was exported from"
    if all(name.endswith(".npy") for name in names):
        return f"is a file of NumPy arrays (.npz): {_NAME_ONE}"
    if any(name.endswith(("model.weights.h5", "keras_metadata.pb")) for name in names):
        return f"is a Keras model: {_OTHER_LIBRARY}"
    if any(name.lower().endswith(_IMAGES) for name in names):
        return "is a zip archive of images: unpack it for --data-path, and name a checkpoint here"
    return f"is a zip archive that torch.save did not write: {_UNPACK}"


def _safetensors(path: Path, head: bytes) -> str | None:
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or length + 8 > path.stat().st_size:
        return None
    return f"is a safetensors file: name it {path.with_suffix('.safetensors').name}"


def _protobuf(head: bytes) -> str | None:
    """ONNX and TensorFlow: messages of numbered fields; the first is a version or a graph."""
    if re.match(rb"\x08[\x01-\x20](?:\x12|\x1a|:)", head):
        return (
            "is an ONNX model: name the checkpoint that it was exported from "
            "(python -m tools.predict and tools.serve take files named .onnx)"
        )
    return None


def _pickle(head: bytes) -> str | None:
    if re.match(rb"\x80[\x02-\x05]|\([dl]p\d+\n|c\w+\n\w+\n", head):
        return (
            "is a Python pickle that torch.save did not write; reading it would run code: save its "
            "weights with torch.save(model.state_dict(), …) where you trust it"
        )
    if re.match(rb"[\x81-\x8f\xde\xdf][\xa1-\xbf\xd9\x00]", head):
        return f"is msgpack, as Flax and JAX write it: {_OTHER_LIBRARY}"
    return None


def _text(path: Path, head: bytes) -> str | None:
    """What kind of text it is; None where it is no text."""
    try:
        # The last character may be cut in two.
        text = head.decode("utf-8-sig", errors="strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    if re.search(r"[\0-\x08\x0e-\x1f\x7f]", text):
        return None
    start = text.lstrip().lower()
    if re.match(r"<(!doctype html|html|head|!--|\?xml|script)", start):
        return (
            "is an HTML page or XML, not the file: a login or error page was saved in its place; "
            "download it by its direct link"
        )
    if start.startswith(("{", "[")) and (len(head) == _HEAD or _is_json(text)):
        return f"is JSON: {_NAME_ONE}"
    if re.search(r"^[\w-]+:(\s|$)", text, re.M):
        return f"is a YAML file: {_NAME_ONE}; options go to --config"
    commas = {line.count(",") for line in text.splitlines()[:2]}
    if path.suffix == ".csv" or (len(commas) == 1 and 0 not in commas):
        return f"is a CSV file: {_NAME_ONE}; tables of images go to --data-path"
    return f"is a text file: {_NAME_ONE}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
