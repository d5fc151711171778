"""download.py: what is fetched, and what is refused, from servers that mean harm."""

import contextlib
import multiprocessing
import os
import shutil
import socket
import socketserver
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from https_server import content, moved, serving, trusted_certificate

import download
from download import Limits, TransferRefusedError, cached, fetch, is_internal

BODY = bytes(range(256)) * 40

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs openssl for a certificate"
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server():
    with serving() as served:
        yield served


@pytest.fixture
def https(tmp_path, monkeypatch):
    with serving(trusted_certificate(tmp_path, monkeypatch)) as served:
        yield served


@pytest.fixture
def public(monkeypatch):
    """127.0.0.1 counts as an address of the internet, all others as they are."""
    monkeypatch.setattr(
        download, "is_internal", lambda host: host != "127.0.0.1" and is_internal(host)
    )


def test_what_comes_is_what_is_there(server, tmp_path):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (BODY[:3], BODY[3:]))
    server.answers |= {
        "/length": content(BODY),
        "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
        "/end": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
        "/a%20b?c=d%2F": content(BODY),
    }
    for path in ("length", "chunks", "end", "a b?c=d%2F#part"):
        fetch(f"{server.address}/{path}", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == BODY, path


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nfew", "3 bytes came of 99999"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            "the connection ended early",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxy\r\nab", "ended early"),
        (b"", "ended|closed"),
        (b"\x00\xff\x1b[31m nonsense\r\n\r\n", r"^\\x00ÿ\\x1b\[31m nonsense$"),
        (b"HTTP/1.1 500 \x1b[2J\x07\r\nContent-Length: 0\r\n\r\n", r"answers 500 \\x1b\[2J\\x07"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\na", "answers 206"),
        (content(BODY, "Content-Encoding: gzip"), r"comes compressed \(gzip\)"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 300 + b"\r\n", "100 headers"),
        (moved("/absent"), "answers 404 Not Found"),
        (moved("ftp://127.0.0.1/x"), "ftp://127.0.0.1/x is not fetched"),
        (moved("file:///etc/passwd"), "file:///etc/passwd is not fetched"),
        (moved("http://[::1"), "no address"),
        (moved("http://me:secret@127.0.0.1/"), "user's name"),
        (moved("/path"), "more than 5 times"),
    ],
)
def test_answers_that_are_no_file(server, tmp_path, answer, message):
    server.answers["/path"] = answer
    with pytest.raises(OSError, match=message) as caught:
        fetch(f"{server.address}/path", tmp_path / "file", limits=Limits(window=5))
    assert "secret" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert server.asked["/path"] == (6 if "5 times" in message else 1)


@pytest.mark.parametrize(
    "address",
    ["http://", "http://[::1", "http://h:99999/x", "http://u@h/x", "http://h:0/x", "ftp://h/x"],
)
def test_addresses_that_are_none(tmp_path, address):
    with pytest.raises(TransferRefusedError):
        fetch(address, tmp_path / "file")


def endless(file):
    file.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        file.write(b"x" * 65536)


def endless_headers(file):
    while True:
        file.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def drops(file):
    file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        file.write(b"x")
        file.flush()
        time.sleep(0.02)


def drops_of_headers(file):
    for letter in b"HTTP/1.1 200 OK\r\nA: " + b"b" * 1000:
        file.write(bytes([letter]))
        file.flush()
        time.sleep(0.02)


def stalls(file):
    file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    file.flush()
    time.sleep(5)


@pytest.mark.parametrize(
    ("answer", "limits", "message"),
    [
        (endless, Limits(size=1 << 20), "and at most 1,048,576 are fetched"),
        (content(b"x" * 2000), Limits(size=1999), "2,000 bytes or more"),
        (endless_headers, Limits(), "more comes than belongs to a file"),
        (drops, Limits(window=0.3), r"\d+ bytes in 0.3 s are too few"),
        (drops_of_headers, Limits(window=0.3), "in 0.3 s are too few"),
        (stalls, Limits(window=0.2), "in 0.2 s are too few"),
        (drops, Limits(seconds=0.3, least=1), "not here within 0.3 s"),
        (stalls, Limits(seconds=0.3), "not here within 0.3 s"),
    ],
)
def test_transfers_are_cut(server, tmp_path, answer, limits, message):
    server.answers["/file"] = answer
    start = time.monotonic()
    with pytest.raises(OSError, match=message):
        fetch(f"{server.address}/file", tmp_path / "file", limits=limits)
    assert time.monotonic() - start < 5  # the server would go on


@pytest.mark.parametrize("known", [True, False])
def test_a_disk_that_is_too_small(server, tmp_path, monkeypatch, known):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 5000))
    server.answers["/file"] = content(BODY) if known else b"HTTP/1.0 200 OK\r\n\r\n" + BODY
    with pytest.raises(TransferRefusedError, match="5,000 are free on the disk"):
        fetch(f"{server.address}/file", tmp_path / "file")
    if known:
        assert not (tmp_path / "file").exists()  # not begun


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("0.0.0.0", True),
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("192.168.1.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("224.0.0.1", True),
        ("::", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("fd00:ec2::254", True),
        ("ff02::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:169.254.169.254", True),
        ("2002:7f00:1::", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("64:ff9b::808:808", False),
        ("::ffff:8.8.8.8", False),
        ("8.8.8.8", False),
        ("2606:4700:4700::1111", False),
    ],
)
def test_internal_addresses(host, expected):
    assert is_internal(host) is expected


@pytest.mark.parametrize(
    "host", ["127.0.0.2", "localhost.localdomain", "[::1]", "[::ffff:127.0.0.2]", "2130706434"]
)
def test_a_redirect_leads_to_no_internal_address(server, public, tmp_path, monkeypatch, host):
    look_up = socket.getaddrinfo
    names = {"localhost.localdomain": "127.0.0.2"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *a, **k: look_up(names.get(name, name), *a, **k)
    )
    server.answers["/file"] = moved(f"http://{host}:{server.address.rpartition(':')[2]}/inside")
    with pytest.raises(TransferRefusedError, match="an address of this network"):
        fetch(f"{server.address}/file", tmp_path / "file")
    assert server.asked["/inside"] == 0


def test_a_name_that_changes_its_address_is_checked_where_it_is_connected(
    server, public, tmp_path, monkeypatch
):
    """DNS rebinding: the first look-up gives an address of the internet, the next an inner one."""
    look_up = socket.getaddrinfo
    answers = iter(["127.0.0.1", "127.0.0.2"])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *a, **k: look_up(next(answers), *a, **k)
    )
    port = server.address.rpartition(":")[2]
    server.answers |= {"/file": moved("/other"), "/other": content(BODY)}
    with pytest.raises(TransferRefusedError, match="leads to rebinding.example, an address of"):
        fetch(f"http://rebinding.example:{port}/file", tmp_path / "file")
    assert server.asked == {"/file": 1}


def test_a_server_of_ones_own_network_may_send_on_within_it(server, tmp_path):
    server.answers |= {"/file": moved("/other"), "/other": content(BODY)}
    fetch(f"{server.address}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY


def test_proxies_of_the_environment(server, public, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    # A proxy is asked for whole addresses.
    server.answers["http://elsewhere.example/file"] = content(BODY)
    fetch("http://elsewhere.example/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == BODY
    server.answers["http://elsewhere.example/file"] = moved("http://169.254.169.254/key")
    with pytest.raises(TransferRefusedError, match="an address of this network"):
        fetch("http://elsewhere.example/file", tmp_path / "file")
    assert server.asked["http://169.254.169.254/key"] == 0


class Tunnel(socketserver.StreamRequestHandler):
    """A proxy that connects to where it is told, for https."""

    told: ClassVar[list[str]] = []

    def handle(self):
        self.told.append(self.rfile.readline().decode())
        while self.rfile.readline().strip():
            pass
        port = int(self.told[-1].split()[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as far:
            self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            thread = threading.Thread(target=self.pass_on, args=(self.connection, far))
            thread.start()
            self.pass_on(far, self.connection)
            thread.join()

    @staticmethod
    def pass_on(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@needs_openssl
def test_a_proxy_for_https(https, tmp_path, monkeypatch):
    https.answers["/file"] = content(BODY)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        fetch(f"{https.address}/file", tmp_path / "file")
        proxy.shutdown()
    assert (tmp_path / "file").read_bytes() == BODY
    [line] = Tunnel.told
    assert line.startswith(f"CONNECT {https.address.removeprefix('https://')} HTTP/1.")


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(OSError, match="refused.*HTTPS_PROXY"):
        fetch(f"http://127.0.0.1:{port}/file", tmp_path / "file")


# --- the cache ----------------------------------------------------------------------------------


@needs_openssl
def test_the_cache_knows_files_by_their_address(https, tmp_path):
    """Two addresses with the same file name once shared the first one's file."""
    https.answers |= {f"/{path}": content(path.encode()) for path in ("a/x.pth", "b/x.pth?v=2")}
    for _ in range(2):
        for path in ("a/x.pth", "b/x.pth?v=2"):
            file = cached(f"{https.address}/{path}#sha256=00", tmp_path / "cache")
            assert file.read_bytes() == path.encode() and file.name == "x.pth"
    assert https.asked == {"/a/x.pth": 1, "/b/x.pth?v=2": 1}
    https.answers["/..%2f..%2fx%0a=%1b.pth"] = content(BODY)
    file = cached(f"{https.address}/..%2f..%2fx%0a=%1b.pth", tmp_path / "cache")
    assert file.parent.parent == tmp_path / "cache" and file.name == "_2f.._2fx_0a__1b.pth"


@needs_openssl
def test_https_is_not_left(https, server, tmp_path):
    https.answers |= {"/x.pth": moved(f"{server.address}/x.pth"), "/y.pth": moved("/x.pth")}
    server.answers["/x.pth"] = content(BODY)
    for name in ("x.pth", "y.pth"):
        with pytest.raises(TransferRefusedError, match="only https is"):
            fetch(f"{https.address}/{name}", tmp_path / "file")
        with pytest.raises(TransferRefusedError, match="only https is"):
            cached(f"{https.address}/{name}", tmp_path / "cache")
    server.answers["/up"] = moved(f"{https.address}/z.pth")
    https.answers["/z.pth"] = content(BODY)
    fetch(f"{server.address}/up", tmp_path / "file")
    assert server.asked["/x.pth"] == 0


@needs_openssl
def test_a_certificate_that_is_not_trusted(https, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    with pytest.raises(TransferRefusedError, match="certificate is not trusted.*SSL_CERT_FILE"):
        fetch(f"{https.address}/x.pth", tmp_path / "file")


def _cached(address: str, folder: Path) -> None:
    assert cached(address, folder).read_bytes() == BODY


@needs_openssl
def test_processes_fetch_a_file_once(https, tmp_path):
    def slowly(file):
        time.sleep(0.3)
        file.write(content(BODY))

    https.answers["/x.pth"] = slowly
    context = multiprocessing.get_context("fork")
    arguments = (f"{https.address}/x.pth", tmp_path / "cache")
    processes = [context.Process(target=_cached, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert https.asked == {"/x.pth": 1}


@needs_openssl
def test_nothing_half_stays(https, tmp_path):
    """Neither of a transfer that failed, nor of a process that was killed in one."""
    https.answers["/x[1].pth"] = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfew"
    address = f"{https.address}/x[1].pth"
    with pytest.raises(OSError, match="3 bytes came of 9"):
        cached(address, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert [file.suffix for file in folder.iterdir()] == [".lock"]
    (folder / ".x_1_.gone-77.tmp.pth").write_bytes(b"half")
    https.answers["/x[1].pth"] = content(BODY)
    cached(address, tmp_path / "cache")
    assert sorted(file.name for file in folder.iterdir()) == [".x_1_.pth.lock", "x_1_.pth"]


@needs_openssl
def test_a_lock_that_is_a_link_is_not_followed(https, tmp_path):
    https.answers["/x.pth"] = content(BODY)
    file = cached(f"{https.address}/x.pth", tmp_path / "cache")
    file.unlink()
    lock, victim = file.with_name(".x.pth.lock"), tmp_path / "victim"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        cached(f"{https.address}/x.pth", tmp_path / "cache")
    assert not victim.exists()
