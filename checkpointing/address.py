"""Checkpoints at https addresses."""

import re
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

import torch

import download
from checkpointing.recognise import what_it_is
from errors import CheckpointError, printable


def fetch(url: str) -> Path:
    """The copy of the checkpoint at ``url`` in torch's cache, fetched once.

    ``#sha256=HEX`` behind it, or timm's ``-HEX.pth`` at the end of the name, is compared with the
    file's checksum, on every use. Raises CheckpointError.
    """
    shown = printable(url)
    if not url.startswith("https://"):
        raise CheckpointError(f"{shown}: only https addresses are fetched")
    address, fragment = urldefrag(url)
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{8,64}", fragment):
        raise CheckpointError(f"{shown}: expected #sha256= and 8 to 64 hexadecimal digits")
    try:
        name = Path(urlsplit(address).path).name
    except ValueError as error:
        raise CheckpointError(f"{shown} is no address: {error}") from None
    if not name.lstrip("."):
        raise CheckpointError(f"{shown}: names no file")
    in_name = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    expected = fragment.removeprefix("sha256=").lower() or (in_name[1] if in_name else "")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        return download.cached(address, folder, sha256=expected, problem=what_it_is)
    except OSError as error:
        raise CheckpointError(
            f"{shown} can't be fetched: {error}; give a file in its place"
        ) from None
