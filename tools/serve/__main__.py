"""Serve a trained model over HTTP: POST /predict, GET /health, /metrics, /docs, and a page to try.

    python -m tools.serve output/pets/best.pth
    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

Only this machine is answered unless --host says otherwise. docs/serve.md has the limits and what
the metrics mean.
"""

import argparse
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from errors import OptionError
from pipeline.workers import keep_freed_memory
from tools.common import command, labels, trained
from tools.serve import logs
from tools.serve.nursery import Nursery
from utils import cores

PACKAGES = {
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
}


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("serve", __doc__)
    trained.add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    number = command.positive
    batching = parser.add_argument_group("batching")
    batching.add_argument("--max-batch", type=number, default=16, help="images at a time")
    batching.add_argument(
        "--max-wait-ms", type=float, default=5.0, help="an image waits for others, at most"
    )
    batching.add_argument(
        "--decoders", type=number, help="images decoded at a time (default: one per core)"
    )
    batching.add_argument(
        "--threads", type=number, help="the model's (default: what the decoders leave of the cores)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-body-mib", type=float, default=16.0, help="of a request")
    limits.add_argument("--max-megapixels", type=float, default=50.0, help="of an image")
    limits.add_argument("--max-images", type=number, default=32, help="in a request")
    limits.add_argument("--max-pending", type=number, default=256, help="images in hand")
    limits.add_argument("--max-bodies-mib", type=float, default=256.0, help="of all requests")
    limits.add_argument("--max-connections", type=number, default=512, help="open at a time")
    limits.add_argument("--timeout", type=float, default=10.0, help="seconds for a request")
    drift = parser.add_argument_group("drift")
    drift.add_argument("--reference", type=Path, help="report.json of tools.report")
    drift.add_argument("--window", type=number, default=500, help="answers that are compared")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    for module, package in PACKAGES.items():
        command.require(module, package)
    _check(arguments)
    _fill_standard_files()
    logs.set_up()
    # Strangers' images make Pillow warn; what matters is refused.
    warnings.filterwarnings("ignore", module="PIL")
    torch.set_num_threads(arguments.threads or cores())
    # Before the model, and whatever starts threads.
    with Nursery() as nursery:
        _serve(arguments, nursery)


def _serve(arguments: argparse.Namespace, nursery: Nursery) -> None:
    # The model takes the same memory for each batch: a fifth of ResNet-18's time otherwise. The
    # decoders, which are forked from the nursery, keep their own bounds.
    keep_freed_memory()
    # The packages that are optional are there by now.
    from tools.serve import app, drift, server
    from tools.serve.service import Batching, Limits, Service

    model = trained.open_model(arguments)
    monitor = None
    if arguments.reference:
        reference = drift.Reference.read(
            arguments.reference,
            model.classifier.class_names,
            several=labels.is_multilabel(model.classifier),
        )
        monitor = drift.DriftMonitor(reference, arguments.window)
    listener = _listen(arguments.host, arguments.port)
    service = Service(
        model,
        Path(arguments.model).name,
        nursery,
        limits=Limits(
            body=int(arguments.max_body_mib * 2**20),
            pixels=int(arguments.max_megapixels * 1e6),
            images=arguments.max_images,
            pending=arguments.max_pending,
            seconds=arguments.timeout,
            bodies=int(arguments.max_bodies_mib * 2**20),
            connections=arguments.max_connections,
        ),
        batching=Batching(
            max_batch=arguments.max_batch,
            max_wait=arguments.max_wait_ms / 1000,
            decoders=arguments.decoders or cores(),
            divide=not arguments.threads,
        ),
        drift=monitor,
    )
    server.serve(app.build_app(service), service, listener)


def _fill_standard_files() -> None:
    """Open what was closed of standard input, output and error: connections would take the place,
    and get what libraries write there."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("max_body_mib", "max_megapixels", "timeout"):
        if not getattr(arguments, name) > 0:
            raise OptionError(name, "is not above zero")
    if not arguments.max_wait_ms >= 0:
        raise OptionError("max_wait_ms", "is below zero")
    if arguments.max_bodies_mib < arguments.max_body_mib:
        raise OptionError(
            "max_bodies_mib", f"is below the {arguments.max_body_mib:g} of --max-body-mib"
        )
    if arguments.max_images > arguments.max_pending:
        raise OptionError(
            "max_images",
            f"a request of {arguments.max_images} never fits in --max-pending "
            f"{arguments.max_pending}",
        )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; says where. Raises OptionError for an address that can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError("port", f"{host}:{port} can't be listened on ({reason})") from None
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}/", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            "warning: whoever reaches this port can use the model: docs/serve.md", file=sys.stderr
        )
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
