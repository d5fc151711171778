"""Files from the network: one way to fetch them, bounded in size, in time and in where they are.

What a server sends is never trusted: it may be endless, come a byte at a time, or lead to machines
that only this one can reach.
"""

import contextlib
import functools
import glob
import hashlib
import http.client
import io
import ipaddress
import os
import re
import shutil
import socket
import ssl
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urldefrag, urljoin, urlsplit

from errors import first_line, os_error_text, printable
from utils import written_whole

try:
    import fcntl
except ImportError:  # not a Unix: two processes may fetch the same file, the last one stays
    fcntl = None

REDIRECTS = 5
_BLOCK = 256 << 10  # bytes
_HEADERS = 1 << 20  # bytes that may come before the content
_MOVED = (301, 302, 303, 307, 308)
_LATER = (408, 425, 429)  # answers of 4xx that another try may change


@dataclass(frozen=True)
class Limits:
    """What a transfer may take.

    Attributes:
        size: bytes of the file.
        seconds: of the whole transfer.
        window: seconds of waiting within which ``least`` bytes have to come; also for a connection.
        least: bytes.
    """

    size: int = 50 * 10**9
    seconds: float = 12 * 3600
    window: float = 30
    least: int = 32 << 10


class TransferRefusedError(OSError):
    """What is offered is not taken; another try would end the same."""


def cached(
    address: str,
    folder: Path,
    *,
    sha256: str = "",
    problem: Callable[[Path], str | None] = lambda path: None,
) -> Path:
    """The copy of the file at an https ``address``, fetched once by all processes and hosts.

    It lies in a folder of ``folder`` that is the address's own: files of the same name don't
    meet. In ``folder`` itself, as torch.hub has it, one is taken that its checksum proves.

    Args:
        sha256: the first hexadecimal digits of its checksum, compared on every use; a copy that
            differs is removed.
        problem: says what is wrong with a file that has come.

    Raises OSError, whose message says what to do.
    """
    address = _checked(address, ("https",))
    digest = hashlib.sha256(address.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.+-]", "_", Path(urlsplit(address).path).name, flags=re.ASCII)[-100:]
    name = name.lstrip(".")
    path = folder / digest / name
    if sha256 and not path.is_file() and (folder / name).is_file():
        with contextlib.suppress(OSError):
            _compare(folder / name, sha256)
            return folder / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            # Another process may have fetched it in the meantime.
            if not path.is_file():
                with written_whole(path, shared=True) as partial:
                    fetch(address, partial, schemes=("https",))
                    if wrong := problem(partial):
                        raise TransferRefusedError(f"it {wrong}")
                    _compare(partial, sha256)
                return path
    try:
        _compare(path, sha256)
    except TransferRefusedError:
        path.unlink(missing_ok=True)
        raise
    return path


def _compare(path: Path, expected: str) -> None:
    if not expected:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise TransferRefusedError(f"its sha256 is {found}, expected {expected}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process fetches ``path``; what one that was killed left of it is removed."""
    if fcntl is None:
        yield
        return
    # A link in the place of the lock would lead to a file of someone's choice.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock = os.open(path.with_name(f".{path.name}.lock"), flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in path.parent.glob(f".{glob.escape(path.stem)}.*.tmp{glob.escape(path.suffix)}"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


def fetch(
    address: str,
    path: Path,
    *,
    limits: Limits = Limits(),
    schemes: tuple[str, ...] = ("http", "https"),
) -> None:
    """Write what is at ``address`` to ``path``. Raises OSError in one line that says what to do.

    Redirects are followed, :data:`REDIRECTS` at most, but never from https to http, nor to an
    address of this machine or its own network, unless ``address`` itself is one. Proxies of the
    environment are used; through one, it is the proxy that looks up names.
    """
    try:
        with contextlib.closing(_opened(address, limits, schemes)) as response:
            save(response, path, limits, response.length)
    except urllib.error.URLError as error:
        reason = error.reason if isinstance(error.reason, OSError) else error
        raise _in_words(reason) from None
    except (http.client.HTTPException, OSError) as error:
        raise _in_words(error) from None
    except UnicodeError:
        raise TransferRefusedError("this is no address: its host can't be encoded") from None


def save(source: IO[bytes], path: Path, limits: Limits, length: int | None = None) -> None:
    """Copy ``source``, of ``length`` bytes if that is known, to ``path``, within the ``limits``.

    Raises OSError, before a byte is written where ``length`` exceeds what the disk or ``limits``
    allow.
    """
    from tqdm import tqdm

    free = shutil.disk_usage(path.parent).free
    # Of an unknown length the disk isn't filled to its end: others write to it.
    most = min(limits.size, free if length is not None else free * 9 // 10)
    if (length or 0) > most:
        raise _too_large(length, limits.size, free)
    ends = time.monotonic() + limits.seconds
    came = 0
    with (
        open(path, "wb") as target,
        # Shown on a terminal alone.
        tqdm(total=length, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while block := source.read(_BLOCK):
            came += len(block)
            if came > most:
                raise _too_large(came, limits.size, free)
            if time.monotonic() > ends:
                raise TransferRefusedError(f"it was not here within {limits.seconds:g} s")
            target.write(block)
            bar.update(len(block))
    if length is not None and came != length:
        raise OSError(f"{came} bytes came of {length}")


def _too_large(size: int, limit: int, free: int) -> TransferRefusedError:
    if size > limit:
        return TransferRefusedError(f"{size:,} bytes or more, and at most {limit:,} are fetched")
    return TransferRefusedError(f"{size:,} bytes or more, and {free:,} are free on the disk")


def is_internal(host: str) -> bool:
    """Whether an IP address is of this machine, its network, or reserved: not the internet's."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 6:
        # IPv4 in IPv6's clothes: mapped, 6to4, and behind a translator (RFC 6052).
        inner = address.ipv4_mapped or address.sixtofour
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
        address = inner or address
    return not address.is_global or address.is_multicast


def _opened(address: str, limits: Limits, schemes: tuple[str, ...]) -> http.client.HTTPResponse:
    """The answer to a request, behind the redirects, whose content comes as it is on the server."""
    guard = _Guard(limits)
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _Handler(guard)):
        opener.add_handler(handler)
    for _ in range(REDIRECTS + 1):
        headers = {"User-Agent": "python-urllib", "Accept-Encoding": "identity"}
        request = urllib.request.Request(_checked(address, schemes), headers=headers)
        response = opener.open(request, timeout=limits.window)
        place = response.headers.get("Location")
        if response.status not in _MOVED or not place:
            break
        response.close()
        if address.startswith("https:"):
            schemes = ("https",)
        try:
            address = urljoin(address, place)
        except ValueError:
            raise TransferRefusedError(f"it leads to {_brief(place)}, no address") from None
        guard.redirected = True
    else:
        raise TransferRefusedError(f"it leads from place to place, more than {REDIRECTS} times")
    coded = response.headers.get("Content-Encoding", "identity").lower()
    problem: OSError | None = None
    if response.status != 200:
        kind = OSError
        if 400 <= response.status < 500 and response.status not in _LATER:
            kind = TransferRefusedError
        problem = kind(f"the server answers {response.status} {_brief(response.reason)}")
    elif coded != "identity":
        problem = TransferRefusedError(f"it comes compressed ({_brief(coded)})")
    if problem:
        response.close()
        raise problem
    guard.left = 2 * limits.size + _HEADERS
    return response


def _checked(address: str, schemes: tuple[str, ...]) -> str:
    """``address`` in ASCII and without its fragment; TransferRefusedError for one not to be asked.

    Its host is looked at when it is connected to.
    """
    shown = _brief(address)
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise TransferRefusedError(f"{shown} is no address: {error}") from None
    if parts.scheme not in schemes:
        raise TransferRefusedError(f"{shown} is not fetched: only {' and '.join(schemes)} is")
    if not parts.hostname or port == 0:
        raise TransferRefusedError(f"{shown} is no address: it names no host")
    if parts.username is not None:
        raise TransferRefusedError("an address with a user's name in it is not fetched")
    return quote(urldefrag(address).url, safe=string.punctuation)


def _brief(text: str) -> str:
    """The start of what a server sent, for a message."""
    return printable(text[:100] + "…" * (len(text) > 100))


def _in_words(error: Exception) -> OSError:
    """``error`` with a message that says what helps."""
    if isinstance(error, TransferRefusedError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return TransferRefusedError(
            f"its certificate is not trusted ({error.verify_message}); SSL_CERT_FILE=FILE names "
            "certificates of your own"
        )
    if isinstance(error, http.client.IncompleteRead):
        return OSError("the connection ended early")
    if isinstance(error, socket.gaierror | ConnectionError | TimeoutError):
        reason = error.strerror or first_line(error)
        return OSError(f"{reason}; behind a proxy, set HTTPS_PROXY")
    if isinstance(error, OSError):
        return OSError(error.errno, os_error_text(error)) if error.errno else error
    return OSError(_brief(first_line(error)))


class _Guard:
    """Watches over the connections of one transfer: where they lead, and how fast bytes come."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.left = _HEADERS  # bytes that may still come
        self.redirected = False
        self._proxied = False
        self._internal = False  # the address that was asked for is
        self._ends = time.monotonic() + limits.seconds
        self._waited, self._came = 0.0, 0  # in this window

    def connect(self, address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
        """A connection to one of the IP addresses that a name has now, each checked by itself:
        a second look-up could give others."""
        problem: OSError | None = None
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found:
            connection = socket.socket(family, kind, protocol)
            try:
                if not self._proxied:
                    self._check(address[0], place[0])
                connection.settimeout(timeout)
                connection.connect(place)
            except OSError as error:
                connection.close()
                problem = error
                continue
            return connection
        raise problem or OSError(f"{address[0]} has no address")

    def through_proxy(self, host: str) -> None:
        """What follows is asked of a proxy. Where ``host`` is known here too, it is checked."""
        self._proxied = True
        with contextlib.suppress(socket.gaierror):
            for *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
                self._check(host, place[0])

    def directly(self) -> None:
        """What follows is asked of the host itself."""
        self._proxied = False

    def _check(self, host: str, place: str) -> None:
        internal = is_internal(place)
        if not self.redirected:
            self._internal = internal
        elif internal and not self._internal:
            raise TransferRefusedError(
                f"it leads to {printable(host)}, an address of this network: give that address "
                "itself if it is meant"
            )

    def receive(self, connection: socket.socket, buffer: memoryview) -> int:
        """``recv_into`` that raises OSError where too little comes, or too much."""
        start = time.monotonic()
        left = min(self.limits.window - self._waited, self._ends - start)
        connection.settimeout(max(left, 1e-3))
        try:
            count = connection.recv_into(buffer)
        except TimeoutError:
            raise OSError(self._slow(time.monotonic())) from None
        # Only what is waited for counts: the disk may take its time.
        now = time.monotonic()
        self._waited += now - start
        self._came += count
        self.left -= count
        if self.left < 0:
            raise TransferRefusedError("more comes than belongs to a file")
        if now > self._ends or (
            self._waited >= self.limits.window and self._came < self.limits.least
        ):
            raise OSError(self._slow(now))
        if self._waited >= self.limits.window:
            self._waited, self._came = 0.0, 0
        return count

    def _slow(self, now: float) -> str:
        if now >= self._ends:
            return f"it was not here within {self.limits.seconds:g} s"
        return f"{self._came:,} bytes in {self.limits.window:g} s are too few"


class _Watched(io.RawIOBase):
    """What comes over a connection, as http.client reads it."""

    def __init__(self, connection: socket.socket, guard: _Guard) -> None:
        self._connection, self._guard = connection, guard

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._guard.receive(self._connection, buffer)

    def close(self) -> None:
        self._connection.close()
        super().close()


class _WatchedSocket:
    """The part of a socket that http.client uses. A reader made of it keeps it open."""

    def __init__(self, connection: socket.socket, guard: _Guard) -> None:
        self._connection, self._guard = connection, guard
        self._read = False
        self.sendall = connection.sendall

    def makefile(self, _: str) -> io.BufferedReader:
        self._read = True
        return io.BufferedReader(_Watched(self._connection, self._guard))

    def close(self) -> None:
        if not self._read:
            self._connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, *arguments: Any, guard: _Guard, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._guard = guard
        self._create_connection = guard.connect

    def connect(self) -> None:
        super().connect()
        self.sock = _WatchedSocket(self.sock, self._guard)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The certificate has to be that of the name, whatever address it was connected to."""


class _Handler(urllib.request.AbstractHTTPHandler):
    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self._guard = guard

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_Connection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_SecureConnection, request, context=ssl.create_default_context())

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _open(
        self, kind: type[_Connection], request: urllib.request.Request, **arguments: Any
    ) -> http.client.HTTPResponse:
        asked = urlsplit(request.full_url)
        if request.host == asked.netloc:
            self._guard.directly()
        else:
            self._guard.through_proxy(asked.hostname or "")
        make = functools.partial(kind, guard=self._guard)
        return self.do_open(make, request, **arguments)
