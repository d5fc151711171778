"""The service over real sockets: answers, limits, status codes, metrics, drift, its end."""

import argparse
import contextlib
import http.client
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from after_training import COLORS, make_pictures, train
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats

from errors import UserError
from tools import report, trained
from tools.serve import __main__ as serve
from tools.serve import app, drift, load
from tools.serve.batcher import Batcher

ROOT = Path(__file__).resolve().parent.parent
LIMITS = app.Limits(body=200_000, pixels=100_000, pictures=3, pending=4, seconds=5.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, pictures):
    return train(pictures, tmp_path_factory.mktemp("run"))


def opened(checkpoint) -> trained.Trained:
    given = argparse.Namespace(model=str(checkpoint), ema=False, device="cpu", plugin=[])
    return trained.open_model(given)


@contextlib.contextmanager
def running(checkpoint, limits=LIMITS, watch=None, **batching):
    """(service, port) of a server in a thread of this process."""
    import uvicorn

    service = app.Service(
        opened(checkpoint), "pets", limits=limits, batching=app.Batching(**batching), watch=watch
    )
    config = uvicorn.Config(app.build_app(service), log_config=None, server_header=False)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield service, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def served(checkpoint):
    with running(checkpoint) as found:
        yield found


@pytest.fixture
def port(served):
    return served[1]


def request(port, method, path, body=None, **headers):
    """(status, headers, JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    kind = answer.headers["content-type"] or ""
    value = json.loads(content) if kind.startswith("application/json") else content.decode()
    return answer.status, answer.headers, value


def predict(port, content, query="", kind="image/png"):
    return request(port, "POST", f"/predict{query}", content, content_type=kind)


def form(files):
    parts = [
        b'--cut\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
        % (name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + b"--cut--\r\n"


def png(width, height, color=(200, 150, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width, height):
    """A PNG whose header alone is large."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def metrics(port):
    """Value of each sample by name and labels."""
    text = request(port, "GET", "/metrics")[2]
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_the_models(port, checkpoint, pictures):
    classifier = opened(checkpoint).classifier
    for path in sorted(pictures.glob("val/*/0.png")):
        status, _, content = predict(port, path.read_bytes(), "?topk=3")
        with torch.no_grad():
            logits = classifier.model(classifier.transform(Image.open(path).convert("RGB"))[None])
        wanted = logits.softmax(1)[0]
        [picture] = content["pictures"]
        assert status == 200 and picture["file"] is None
        shares = [answer["confidence"] for answer in picture["predictions"]]
        assert shares == sorted(shares, reverse=True)
        by_name = {a["class"]: a["confidence"] for a in picture["predictions"]}
        assert [by_name[n] for n in COLORS] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_one_bad_picture_among_many_is_named(port, pictures):
    good = (pictures / "val/blue/0.png").read_bytes()
    body = form([("a.png", good), ("<b>.png", b"no picture"), ("c.png", good)])
    status, _, content = predict(port, body, "?topk=1", "multipart/form-data; boundary=cut")
    first, second, third = content["pictures"]
    assert status == 200
    assert [p["file"] for p in (first, second, third)] == ["a.png", "<b>.png", "c.png"]
    assert first["predictions"] == third["predictions"] and len(first["predictions"]) == 1
    assert second["status"] == 422 and "predictions" not in second
    status, _, content = predict(
        port, form([("b", b"no"), ("c", b"no")]), "", "multipart/form-data; boundary=cut"
    )
    assert status == 422 and content["error"] == content["pictures"][1]["error"]


def test_explanation_is_a_picture_of_the_class_asked_about(port, pictures):
    content = (pictures / "val/blue/0.png").read_bytes()
    maps = []
    for query in ("?explain=true", "?explain=true&about=blue", "?explain=true&about=amber"):
        status, _, answer = predict(port, content, query)
        data = answer["pictures"][0]["explanation"]
        assert status == 200 and data.startswith("data:image/png;base64,")
        maps.append(data)
    assert len(set(maps)) == 3
    status, _, answer = predict(port, content, "?explain=true&about=unicorn")
    assert status == 422 and "no such class" in answer["error"]
    many = form([("a", content), ("b", content)])
    kind = "multipart/form-data; boundary=cut"
    assert predict(port, many, "?explain=true", kind)[0] == 422


def test_onnx_answers_and_says_that_it_cannot_be_explained(checkpoint, pictures, tmp_path):
    from tools import export

    argv = [str(checkpoint), "--format", "onnx", "--output", str(tmp_path), "--device", "cpu"]
    assert export.main(argv) == 0
    content = (pictures / "val/blue/0.png").read_bytes()
    with running(next(tmp_path.glob("*.onnx"))) as (_, port), running(checkpoint) as (_, other):
        mine, theirs = (predict(p, content)[2]["pictures"][0]["predictions"] for p in (port, other))
        assert [a["class"] for a in mine] == [a["class"] for a in theirs]
        assert [a["confidence"] for a in mine] == pytest.approx(
            [a["confidence"] for a in theirs], abs=1e-4
        )
        status, _, answer = predict(port, content, "?explain=true")
        assert status == 422 and "ONNX" in answer["error"]


def test_health_and_the_pages(port):
    assert request(port, "GET", "/health")[2] == {"status": "ok", "model": "pets", "classes": 3}
    api = request(port, "GET", "/openapi.json")[2]
    operation = api["paths"]["/predict"]["post"]
    assert {p["name"] for p in operation["parameters"]} == {"topk", "explain", "about"}
    assert {"200", "408", "413", "415", "422", "503", "504"} <= operation["responses"].keys()
    assert {"multipart/form-data", "image/*"} <= operation["requestBody"]["content"].keys()
    for path in ("/", "/docs"):
        status, headers, text = request(port, "GET", path)
        assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)


# --- limits ---------------------------------------------------------------------------------------


def test_bodies_are_refused_by_length_and_as_they_come(port):
    large = bytes(LIMITS.body + 1)
    status, _, content = predict(port, large)
    assert status == 413 and "200,000 bytes" in content["error"]
    # Chunked: no length is told. More is never taken in than the limit and a little.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    pieces = (bytes(50_000) for _ in range(40))
    connection.request("POST", "/predict", pieces, {"Content-Type": "image/png"})
    answer = connection.getresponse()
    assert answer.status == 413 and b"Traceback" not in answer.read()
    inside = form([("a.png", large)])
    assert predict(port, inside, "", "multipart/form-data; boundary=cut")[0] == 413
    # At the limit a body is taken in, and found to be no picture.
    assert predict(port, bytes(LIMITS.body))[0] == 422


def test_a_body_is_not_kept_beyond_the_limit():
    """The application is told of the excess with the message that brings it."""
    import asyncio

    messages = [{"type": "http.request", "body": bytes(60), "more_body": True}] * 5
    taken = iter(messages)

    async def receive():
        return next(taken)

    async def read():
        body = app._Body({"headers": [(b"transfer-encoding", b"chunked")]}, receive, 100)
        await body.receive()
        with pytest.raises(app.HTTPException) as caught:
            await body.receive()
        return caught.value.status_code, body.received

    assert asyncio.run(read()) == (413, 120)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_are_counted_before_decoding(port, monkeypatch):
    decoded = []
    monkeypatch.setattr(app.pictures.datasets, "decode", decoded.append)
    for content in (png(317, 317), bomb(30_000, 30_000), bomb(10_000, 10_000)):
        status, _, answer = predict(port, content)
        assert status == 413 and "pixels" in answer["error"]
    assert not decoded


def test_a_picture_at_the_pixel_limit_is_answered(port):
    assert predict(port, png(316, 316))[0] == 200  # 99,856


@pytest.mark.parametrize(
    "content, kind, query, status",
    [
        (b"not a picture", "image/png", "", 422),
        (png(20, 20)[:-30], "image/png", "", 422),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/png", "", 422),
        (b"", "image/png", "", 400),
        (b"{}", "application/json", "", 415),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", "", 400),
        (b"broken", "multipart/form-data", "", 400),
        (b"--cut--\r\n", "multipart/form-data; boundary=cut", "", 400),
        (form([("a", b"x")] * 4), "multipart/form-data; boundary=cut", "", 400),
        (png(9, 9), "image/png", "?topk=0", 422),
        (png(9, 9), "image/png", "?topk=many", 422),
    ],
)
def test_what_is_wrong_is_told_with_its_status(port, content, kind, query, status):
    got, _, answer = predict(port, content, query, kind)
    assert (got, set(answer) - {"pictures"}) == (status, {"error"})
    assert "\n" not in answer["error"] and answer["error"]


def test_other_paths_and_methods(port):
    assert request(port, "GET", "/nothing")[0] == 404
    assert request(port, "GET", "/predict")[0] == 405
    assert set(request(port, "GET", "/nothing")[2]) == {"error"}


def test_a_slow_body_and_a_slow_answer(checkpoint, monkeypatch):
    quick = app.Limits(seconds=0.3)
    with running(checkpoint, quick) as (service, port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            assert b" 408 " in connection.recv(4096)
        asked = threading.Event()
        predicts = service.batcher._predict
        monkeypatch.setattr(
            service.batcher, "_predict", lambda images: (asked.wait(5), predicts(images))[1]
        )
        assert predict(port, png(9, 9))[0] == 504
        asked.set()
        assert service.pending == 0
        assert predict(port, png(9, 9))[0] == 200


def test_a_client_that_goes_away_is_no_failure_of_the_service(checkpoint, caplog):
    with running(checkpoint) as (service, port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            until = time.monotonic() + 5
            while not service.pending and time.monotonic() < until:
                time.sleep(0.01)
        while service.pending and time.monotonic() < until:
            time.sleep(0.01)
        assert service.pending == 0
        assert metrics(port)["serve_requests_total", "/predict", "400"] == 1
    assert "Traceback" not in caplog.text


def test_a_full_queue_says_when_to_come_again(checkpoint, monkeypatch):
    few = app.Limits(pending=2, pictures=2)
    with running(checkpoint, few, max_batch=1) as (service, port):
        held = threading.Event()
        predicts = service.batcher._predict
        monkeypatch.setattr(
            service.batcher, "_predict", lambda images: (held.wait(8), predicts(images))[1]
        )
        first = [threading.Thread(target=predict, args=(port, png(9, 9))) for _ in range(2)]
        for thread in first:
            thread.start()
        until = time.monotonic() + 5
        while service.pending < 2 and time.monotonic() < until:
            time.sleep(0.01)
        status, headers, content = predict(port, png(9, 9))
        assert status == 503 and headers["retry-after"] == "1" and "waiting" in content["error"]
        assert request(port, "GET", "/health")[0] == 200
        held.set()
        for thread in first:
            thread.join()
        assert predict(port, png(9, 9))[0] == 200
        kind = "multipart/form-data; boundary=cut"
        assert predict(port, form([("a", png(9, 9))] * 2), "", kind)[0] == 200


def test_a_failure_inside_stays_in_the_log(checkpoint, monkeypatch, caplog):
    with running(checkpoint) as (service, port):

        def fails(images):
            raise RuntimeError("secret of the inside")

        predicts = service.batcher._predict
        monkeypatch.setattr(service.batcher, "_predict", fails)
        status, _, content = predict(port, png(9, 9))
        assert status == 500 and set(content) == {"error"}
        assert "secret" not in json.dumps(content)
        monkeypatch.setattr(service.batcher, "_predict", predicts)
        assert predict(port, png(9, 9))[0] == 200
    assert "secret of the inside" in caplog.text


# --- batching -------------------------------------------------------------------------------------


def test_what_waits_is_answered_together_and_each_gets_its_own():
    entered, go, sizes = threading.Event(), threading.Event(), []

    def answers(images):
        entered.set()
        go.wait(5)
        return images.flatten(1)

    batcher = Batcher(
        lambda content: torch.full((1, 1, 1), float(content)),
        answers,
        max_batch=3,
        max_wait=0.0,
        decoders=1,
        on_batch=lambda size, seconds: sizes.append(size),
    )
    first = batcher.ask(b"0")
    assert entered.wait(5)
    later = [batcher.ask(str(n).encode()) for n in range(1, 6)]
    bad, late = batcher.ask(b"no number"), batcher.ask(b"7")
    assert late.cancel()
    with pytest.raises(ValueError):
        bad.result(5)
    go.set()
    assert [f.result(5).probabilities.tolist() for f in (first, *later)] == [
        [float(n)] for n in range(6)
    ]
    batcher.close()
    assert sizes == [1, 3, 2]


def test_a_picture_waits_for_others_but_not_for_long():
    sizes = []
    batcher = Batcher(
        lambda content: torch.zeros(1, 1, 1),
        lambda images: images.flatten(1),
        max_batch=8,
        max_wait=0.5,
        decoders=1,
        on_batch=lambda size, seconds: sizes.append(size),
    )
    for future in [batcher.ask(b"") for _ in range(3)]:
        future.result(5)
    batcher.close()
    assert sizes == [3]


# --- metrics and drift ----------------------------------------------------------------------------


def test_metrics_count_what_happened(checkpoint, pictures):
    with running(checkpoint) as (_, port):
        for name in COLORS:
            predict(port, (pictures / f"val/{name}/1.png").read_bytes())
        predict(port, b"no picture")
        request(port, "GET", "/some/other/path")
        found = metrics(port)
    assert found["serve_requests_total", "/predict", "200"] == 3
    assert found["serve_requests_total", "/predict", "422"] == 1
    assert found["serve_requests_total", "other", "404"] == 1
    assert found["serve_request_seconds_count", "/predict"] == 4
    assert found["serve_pictures_refused_total", "422"] == 1
    assert found["serve_confidence_count",] == 3
    assert found["serve_batch_pictures_sum",] == 3
    assert sum(v for k, v in found.items() if k[0] == "serve_answers_total") == 3
    assert found["serve_pending",] == 0


def test_stability_index_and_distance_are_those_of_the_formulas():
    reference, observed = np.array([60.0, 30, 10]), np.array([20.0, 30, 50])
    p, q = (reference + 0.5) / 101.5, (observed + 0.5) / 101.5
    by_hand = sum((a - b) * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert drift.stability_index(reference, observed) == pytest.approx(by_hand)
    assert drift.stability_index(reference, reference) == 0
    values = [np.repeat([0, 1, 2], counts.astype(int)) for counts in (reference, observed)]
    wanted = stats.ks_2samp(*values).statistic
    assert drift.distance(reference, observed) == pytest.approx(wanted)


def test_limits_leave_chance_alone():
    """Windows drawn from the reference itself warn about as seldom as is promised."""
    rng = np.random.default_rng(0)
    classes, bins = np.full(200, 1 / 200), np.full(15, 1 / 15)
    warned = 0
    for _ in range(300):
        reference = drift.Reference(
            rng.multinomial(2000, classes).astype(float), rng.multinomial(2000, bins).astype(float)
        )
        index, gap = drift.limits(reference, 500)
        warned += (
            drift.stability_index(reference.classes, rng.multinomial(500, classes)) > index
            or drift.distance(reference.confidences, rng.multinomial(500, bins)) > gap
        )
    assert warned <= 6


def test_drift_is_warned_of_in_log_and_metrics(checkpoint, pictures, tmp_path, caplog):
    argv = [str(checkpoint), "--output", str(tmp_path), "--device", "cpu", "--num-workers", "0"]
    assert report.main(argv) == 0
    names = list(COLORS)
    reference = drift.Reference.read(tmp_path / "report.json", names)
    content = json.loads((tmp_path / "report.json").read_text())
    assert reference.classes.sum() == reference.confidences.sum() == content["pictures"] == 18
    with running(checkpoint, watch=drift.Watch(reference, 18)) as (_, port):
        caplog.set_level(logging.INFO, "serve")
        # The validation pictures themselves are no drift.
        for path in sorted(pictures.glob("val/*/*.png")):
            predict(port, path.read_bytes())
        calm = metrics(port)
        assert not caplog.records or "drift" not in caplog.text
        assert calm["serve_drift_class_psi",] == pytest.approx(0, abs=1e-9)
        assert calm["serve_drift_warning", "classes"] == 0
        blue = (pictures / "val/blue/0.png").read_bytes()
        for _ in range(18):
            predict(port, blue)
        stirred = metrics(port)
    assert stirred["serve_drift_class_psi",] > 0.2
    assert stirred["serve_drift_warning", "classes"] == 1
    warnings = [r for r in caplog.records if "drift of the classes" in r.getMessage()]
    assert [r.levelname for r in warnings] == ["WARNING"]


def test_a_reference_of_another_model_is_named(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(UserError, match="can't be read"):
        drift.Reference.read(path, ["a"])
    path.write_text("[]")
    with pytest.raises(UserError, match="no report.json"):
        drift.Reference.read(path, ["a"])
    rows = [{"class": "b", "predicted": 1}]
    path.write_text(json.dumps({"per_class": rows, "calibration": {"bins": {"count": [1]}}}))
    with pytest.raises(UserError, match="other classes"):
        drift.Reference.read(path, ["a"])


# --- the page of the documents ------------------------------------------------------------------


def blocks(kind):
    text = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_commands_of_the_page_work(checkpoint, pictures, tmp_path):
    """All of docs/serve.md, in order, from a folder as it describes."""
    (tmp_path / "output/pets").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "output/pets/best.pth")
    shutil.copytree(pictures / "val/blue", tmp_path / "pets")
    for name, number in (("cat", 1), ("dog", 2)):
        with Image.open(pictures / f"val/blue/{number}.png") as image:
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
                services.append(subprocess.Popen(
                    [*shlex.split(line), "--port", str(port)], cwd=tmp_path, env=environment
                ))  # fmt: skip
                wait_for(port)
                continue
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, (line, done.stderr)
            if "/predict" in line:
                answers = json.loads(done.stdout)["pictures"]
                assert all(answer["predictions"] for answer in answers)
        for block in blocks("python"):
            code = block.replace("8000", str(port))
            with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, {})
            assert out.getvalue().split()[0] in COLORS
    finally:
        end(services)
    assert len(ran) >= 8


def wait_for(port):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if request(port, "GET", "/health")[0] == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the service did not start")


def end(services):
    for service in services:
        service.terminate()
        service.wait(30)
    services.clear()


# --- the command ----------------------------------------------------------------------------------


def test_sigterm_answers_what_is_in_hand(checkpoint, tmp_path):
    """The real command: where it listens, load with malformed requests, an end that drains."""
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg")
    line = [sys.executable, "-m", "tools.serve", str(checkpoint), "--port", "0"]
    line += ["--device", "cpu", "--max-batch", "64", "--max-wait-ms", "1500", "--threads", "1"]
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    url = process.stdout.readline().strip()
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)[1])
    wait_for(port)
    answers = []
    client = threading.Thread(target=lambda: answers.append(predict(port, png(9, 9))))
    client.start()
    while not metrics(port)["serve_pending",]:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    client.join()
    assert answers[0][0] == 200
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()


def test_load_counts_failures_and_refusals(port, tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(png(20 + number, 20))
    argv = [f"http://127.0.0.1:{port}", str(tmp_path), "--clients", "3", "--seconds", "1.5"]
    assert load.main([*argv, "--malformed-every", "4"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["answered"] > 10 and not figures["failed"]
    assert set(figures["refused"]) == {"400", "415", "422"}
    share = sum(figures["refused"].values()) / (
        figures["answered"] + sum(figures["refused"].values())
    )
    assert share == pytest.approx(1 / 4, abs=0.1)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--timeout", "0"], "--timeout: is not above zero"),
        (["--max-wait-ms", "-1"], "--max-wait-ms: is below zero"),
        (["--max-pictures", "300"], "--max-pictures: a request of 300 never fits"),
        (["--port", "70000"], "--port: 127.0.0.1:70000 can't be listened on"),
        (["--reference", "nowhere.json"], "--reference: nowhere.json can't be read"),
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
