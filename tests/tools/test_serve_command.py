"""tools.serve as a command: its options, its end, the commands of docs/serve.md, the load."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from PIL import Image
from runs import PATIENCE
from serving import ROOT, metrics, png, predict, request, wait_for
from tiny_images import COLOURS

from distributed.liveness import process_runs
from tools.serve import __main__ as serve
from tools.serve import load, server
from tools.serve.service import Limits
from tools.torture import clients
from utils import cores


def blocks(kind):
    text = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands_of_the_page_work(checkpoint, images, tmp_path):
    """All of docs/serve.md, in order, from a folder as it describes."""
    (tmp_path / "output/pets").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "output/pets/best.pth")
    shutil.copytree(images / "val/blue", tmp_path / "pets")
    for name, number in (("cat", 1), ("dog", 2)):
        with Image.open(images / f"val/blue/{number}.png") as image:
            image.save(tmp_path / f"{name}.jpg")
            image.save(tmp_path / f"pets/{name}.jpg")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ran, services = [], []
    try:
        for line in "".join(blocks("sh")).splitlines():
            line = line.replace("8000", str(port)).replace("python ", f"{sys.executable} ", 1)
            ran.append(line)
            if " -m tools.serve " in line:
                end(services)
                services.append(
                    subprocess.Popen(
                        [*shlex.split(line), "--port", str(port)],
                        cwd=tmp_path,
                        env=environment,
                        # Closed input and output, whose numbers go to no connection.
                        preexec_fn=lambda: os.closerange(0, 2),
                    )
                )
                wait_for(port)
                continue
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, (line, done.stderr)
            if "/predict" in line:
                answers = json.loads(done.stdout)["images"]
                assert all(answer["predictions"] for answer in answers)
        for block in blocks("python"):
            code = block.replace("8000", str(port))
            with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, {})
            assert out.getvalue().split()[0] in COLOURS
    finally:
        end(services)
    assert len(ran) >= 8


def end(services):
    for service in services:
        service.terminate()
        service.wait(PATIENCE)
    services.clear()


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


def test_sigterm_answers_what_is_in_hand(checkpoint):
    """The real command: where it listens, an end that drains."""
    line = [sys.executable, "-m", "tools.serve", str(checkpoint), "--port", "0"]
    line += ["--device", "cpu", "--threads", "1", "--timeout", "60"]
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    url = process.stdout.readline().strip()
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)[1])
    wait_for(port)
    content = png(9, 9)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        # In hand for as long as its last bytes are to come.
        client.sendall(f"{head}Content-Type: image/png\r\n\r\n".encode() + content[:-9])
        while not metrics(port)["serve_body_bytes",]:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        while listens(port):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        client.sendall(content[-9:])
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert process.wait(PATIENCE) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_model_that_is_stuck_is_told_of_and_ends_all_the_same(checkpoint, tmp_path):
    plugin = tmp_path / "stuck.py"
    plugin.write_text(
        "import time\nfrom tools.common import trained\n"
        "trained.probabilities = lambda model, images: time.sleep(1e6)\n"
    )
    line = [sys.executable, "-m", "tools.serve", str(checkpoint), "--port", "0"]
    line += ["--device", "cpu", "--threads", "1", "--timeout", "0.5", "--plugin", str(plugin)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    port = int(process.stdout.readline().strip().strip("/").rpartition(":")[2])
    wait_for(port)
    children = clients.Service(port, process, tmp_path).tree()[1:]
    assert len(children) == 1 + cores()  # the one that forks, and the decoders
    until = time.monotonic() + PATIENCE
    while request(port, "GET", "/health")[0] == 200 and time.monotonic() < until:
        # On a busy machine its time may be up before the model has it.
        assert predict(port, png(9, 9))[0] in (408, 504)
    for path in ("/health", "/live"):
        status, _, told = request(port, "GET", path)
        assert status == 503 and "the model has been at one batch for" in told["error"]
    process.terminate()
    assert process.wait(PATIENCE) == 1
    assert "left behind" in process.stderr.read()
    while any(process_runs(pid) for pid in children) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(process_runs(pid) for pid in children)


def test_a_second_signal_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    service = mock.Mock(limits=Limits())
    stopping = server.Server(None, service)
    stopping.handle_exit(signal.SIGTERM, None)
    assert stopping.should_exit and not codes
    stopping.handle_exit(signal.SIGTERM, None)
    assert codes == [143]


def test_load_counts_failures_and_refusals(port, tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(png(20 + number, 20))
    argv = [f"http://127.0.0.1:{port}", str(tmp_path), "--clients", "3", "--seconds", "1.5"]
    assert load.main([*argv, "--malformed-every", "4"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["answered"] > 10 and not figures["failed"]
    # On a machine that is busy not each kind has had its turn.
    assert {"422"} <= set(figures["refused"]) <= {"400", "415", "422"}
    share = sum(figures["refused"].values()) / (
        figures["answered"] + sum(figures["refused"].values())
    )
    assert share == pytest.approx(1 / 4, abs=0.1)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--timeout", "0"], "--timeout: is not above zero"),
        (["--max-wait-ms", "-1"], "--max-wait-ms: is below zero"),
        (["--max-bodies-mib", "8"], "--max-bodies-mib: is below the 16 of --max-body-mib"),
        (["--max-images", "300"], "--max-images: a request of 300 never fits"),
        (["--port", "70000"], "--port: 127.0.0.1:70000 can't be listened on"),
        (["--reference", "nowhere.json"], "--reference: nowhere.json: No such file"),
    ],
)
def test_options_that_cannot_be(checkpoint, options, said, capsys):
    threads = torch.get_num_threads()
    assert serve.main([str(checkpoint), "--device", "cpu", *options]) == 2
    torch.set_num_threads(threads)
    assert said in capsys.readouterr().err


def test_a_taken_port_is_named(checkpoint, port, capsys):
    threads = torch.get_num_threads()
    assert serve.main([str(checkpoint), "--device", "cpu", "--port", str(port)]) == 2
    torch.set_num_threads(threads)
    assert f"127.0.0.1:{port} can't be listened on" in capsys.readouterr().err
