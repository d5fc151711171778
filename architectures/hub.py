"""The Hugging Face hub where there is no network: one error at once, no minute of retries."""

import contextlib
import logging
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from huggingface_hub import constants


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """Inside, files of the hub are fetched or come from its cache.

    Its client tries for half a minute, and shows every try, where its host has no address. There
    the cache alone is asked, and OSError says what is the matter.
    """
    host = urlsplit(constants.ENDPOINT).hostname or ""
    problem = "" if constants.HF_HUB_OFFLINE else _no_address(host)
    messages = logging.getLogger("huggingface_hub.utils._http")
    level = messages.level
    messages.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or bool(problem)
    try:
        yield
    except OSError:
        if not problem:
            raise
        raise OSError(f"{host} can't be reached, {problem}, and nothing is cached") from None
    finally:
        messages.setLevel(level)
        if problem:
            constants.HF_HUB_OFFLINE = False


def _no_address(host: str) -> str:
    """Why a host can't be found; empty where it can, or where a proxy would."""
    if urllib.request.getproxies():
        return ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return error.strerror or str(error)
    return ""
