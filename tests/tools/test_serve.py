"""tools.serve over real sockets: answers, limits, status codes."""

import asyncio
import http.client
import io
import json
import queue
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import failing_decoder
import pytest
import torch
from PIL import Image
from serving import LIMITS, bomb, form, metrics, opened, png, predict, request, running
from tiny_images import COLOURS

from tools.serve import decoders
from tools.serve import images as serve_images
from tools.serve.app import Parameters
from tools.serve.bodies import Bodies, RequestBody
from tools.serve.connections import Connection
from tools.serve.images import RefusedError
from tools.serve.service import Limits


def test_answers_are_the_models(port, checkpoint, images):
    classifier = opened(checkpoint).classifier
    for path in sorted(images.glob("val/*/0.png")):
        status, _, content = predict(port, path.read_bytes(), "?topk=3")
        with torch.no_grad():
            logits = classifier.model(classifier.transform(Image.open(path).convert("RGB"))[None])
        wanted = logits.softmax(1)[0]
        [image] = content["images"]
        assert status == 200 and image["file"] is None
        shares = [answer["confidence"] for answer in image["predictions"]]
        assert shares == sorted(shares, reverse=True)
        by_name = {a["class"]: a["confidence"] for a in image["predictions"]}
        assert [by_name[n] for n in COLOURS] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_one_bad_image_among_many_is_named(port, images):
    good = (images / "val/blue/0.png").read_bytes()
    body = form([("a.png", good), ("<b>.png", b"no image"), ("c.png", good)])
    status, _, content = predict(port, body, "?topk=1", "multipart/form-data; boundary=cut")
    first, second, third = content["images"]
    assert status == 200
    assert [p["file"] for p in (first, second, third)] == ["a.png", "<b>.png", "c.png"]
    assert first["predictions"] == third["predictions"] and len(first["predictions"]) == 1
    assert second["status"] == 422 and "predictions" not in second
    status, _, content = predict(
        port, form([("b", b"no"), ("c", b"no")]), "", "multipart/form-data; boundary=cut"
    )
    assert status == 422 and content["error"] == content["images"][1]["error"]


def test_narrow_and_transparent_images_are_answered(port, images):
    """50,000 × 1 pixels cost what an image of the model's size does."""
    hidden = Image.open(images / "val/blue/0.png").convert("RGBA")
    hidden.putalpha(0)
    buffer = io.BytesIO()
    hidden.save(buffer, "PNG")
    files = [("wide", png(50_000, 1)), ("tall", png(1, 90_000)), ("hidden", buffer.getvalue())]
    status, _, content = predict(port, form(files), "", "multipart/form-data; boundary=cut")
    assert status == 200 and all("predictions" in image for image in content["images"])
    white = predict(port, png(*hidden.size, "white"))[2]["images"][0]["predictions"]
    # To rounding: the model had them in batches of different sizes.
    found = content["images"][2]["predictions"]
    assert [p["class"] for p in found] == [p["class"] for p in white]
    assert [p["confidence"] for p in found] == pytest.approx([p["confidence"] for p in white])


def test_an_image_that_fails_inside_does_not_spoil_the_others(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(serve_images, "decoded", failing_decoder.decoded)
    sizes = [(9, 9), failing_decoder.GREEDY, failing_decoder.FAILS]
    files = [(str(size), png(*size)) for size in sizes]
    with running(checkpoint) as (_, port):
        status, _, content = predict(port, form(files), "", "multipart/form-data; boundary=cut")
        good, greedy, bug = content["images"]
        assert status == 200 and "predictions" in good
        assert (greedy["file"], greedy["status"]) == (str(sizes[1]), 422)
        assert (bug["file"], bug["status"]) == (str(sizes[2]), 500) and "secret" not in bug["error"]
        sizes += [failing_decoder.CRASHES, (9, 9)]
        assert [predict(port, png(*size))[0] for size in sizes] == [200, 422, 500, 422, 200]
        assert metrics(port)["serve_decoders_lost_total", "crash"] == 2  # tried again once
    assert "secret of the inside" in caplog.text and "exit code -11" in caplog.text


def test_images_that_hang_cost_their_own_answer_alone(checkpoint, monkeypatch):
    """Three of them, with one decoder: the first makes room for the second, the second for …"""
    monkeypatch.setattr(serve_images, "decoded", failing_decoder.decoded)
    monkeypatch.setattr(decoders, "SLOW", 0.1)
    monkeypatch.setattr(decoders, "CROWDED", 0.2)
    statuses = queue.SimpleQueue()

    def hang():
        statuses.put(predict(port, png(*failing_decoder.HANGS))[0])

    with running(checkpoint, Limits(seconds=8.0)) as (service, port):
        hanging = [threading.Thread(target=hang) for _ in range(3)]
        for thread in hanging:
            thread.start()
        while not (service.pending == 3 or statuses.qsize()):
            time.sleep(0.01)
        assert predict(port, png(9, 9))[0] == 200
        for thread in hanging:
            thread.join()
        told = [statuses.get() for _ in hanging]
        assert 503 in told and set(told) <= {503, 504}
        assert predict(port, png(9, 9))[0] == 200
        assert service.decoders.waiting() == service.pending == 0


def test_large_images_that_wait_for_each_other_are_all_answered(checkpoint, monkeypatch):
    """One decoder, and images that each take longer than one that makes room for the next."""
    monkeypatch.setattr(serve_images, "decoded", failing_decoder.decoded)
    monkeypatch.setattr(decoders, "SLOW", 0.1)
    with running(checkpoint, Limits(seconds=30.0)) as (_, port), ThreadPoolExecutor(5) as clients:
        files = [png(*failing_decoder.NAPS)] * 5
        assert [answer[0] for answer in clients.map(partial(predict, port), files)] == [200] * 5
        assert not [name for name in metrics(port) if name[0] == "serve_decoders_lost_total"]


def test_explanation_is_an_image_of_the_class_asked_about(port, images):
    content = (images / "val/blue/0.png").read_bytes()
    maps = []
    for query in ("?explain=true", "?explain=true&about=blue", "?explain=true&about=amber"):
        status, _, answer = predict(port, content, query)
        data = answer["images"][0]["explanation"]
        assert status == 200 and data.startswith("data:image/png;base64,")
        maps.append(data)
    assert len(set(maps)) == 3
    status, _, answer = predict(port, content, "?explain=true&about=unicorn")
    assert status == 422 and "no such class" in answer["error"]
    many = form([("a", content), ("b", content)])
    kind = "multipart/form-data; boundary=cut"
    assert predict(port, many, "?explain=true", kind)[0] == 422


def test_onnx_answers_and_says_that_it_cannot_be_explained(checkpoint, images, tmp_path):
    from tools import export

    argv = [str(checkpoint), "--format", "onnx", "--output", str(tmp_path), "--device", "cpu"]
    assert export.main(argv) == 0
    content = (images / "val/blue/0.png").read_bytes()
    with running(next(tmp_path.glob("*.onnx"))) as (_, port), running(checkpoint) as (_, other):
        mine, theirs = (predict(p, content)[2]["images"][0]["predictions"] for p in (port, other))
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
    # At the limit a body is taken in, and found to be no image.
    assert predict(port, bytes(LIMITS.body))[0] == 422


def test_a_body_is_not_kept_beyond_the_limit():
    """The application is told of the excess with the message that brings it."""
    messages = [{"type": "http.request", "body": bytes(60), "more_body": True}] * 5
    taken = iter(messages)

    async def receive():
        return next(taken)

    async def read():
        scope = {"headers": [(b"transfer-encoding", b"chunked")]}
        body = RequestBody(scope, receive, 100, Bodies(1000))
        await body.receive()
        with pytest.raises(RefusedError) as caught:
            await body.receive()
        return caught.value.status, body.received

    assert asyncio.run(read()) == (413, 120)


@pytest.mark.parametrize("second_part", [[], [(0.1, 480, True)]], ids=["stalls", "waits for room"])
def test_a_body_waits_a_moment_until_others_can_be_cut(second_part):
    """They fill the room, and are too young to be cut when it comes; it isn't cut for its wait."""
    bodies = Bodies(1000)

    async def read(*parts):
        """The status of a request whose body comes in ``parts``: seconds, bytes, more to come."""
        left = iter(parts)

        async def receive():
            seconds, size, more = next(left, (60, 0, False))
            await asyncio.sleep(seconds)
            return {"type": "http.request", "body": bytes(size), "more_body": more}

        body = RequestBody({"headers": [(b"transfer-encoding", b"x")]}, receive, 10**6, bodies)
        try:
            while not body.ended:
                await body.receive()
        except RefusedError as error:
            return error.status
        finally:
            bodies.release(body)
        return 200

    async def together():
        slow = [asyncio.create_task(read((0.3, 480, True), *second_part)) for _ in range(2)]
        await asyncio.sleep(0.5)
        answer = await asyncio.wait_for(read((0.0, 400, True), (0.0, 1, False)), 5)
        await asyncio.sleep(0.1)
        cut = [task.result() for task in slow if task.done()]
        for task in slow:
            task.cancel()
        return answer, cut

    answer, cut = asyncio.run(together())
    assert answer == 200 and 408 in cut


def test_pixels_are_counted_before_decoding(port):
    for content in (png(317, 317), bomb(30_000, 30_000), bomb(10_000, 10_000)):
        status, _, answer = predict(port, content)
        assert status == 413 and "pixels" in answer["error"]


def test_a_format_that_takes_more_memory_has_fewer_pixels_and_the_answer_says_so(port):
    buffer = io.BytesIO()
    Image.new("RGB", (250, 250)).save(buffer, "WEBP")  # 62,500 pixels of 100,000
    status, _, answer = predict(port, buffer.getvalue())
    assert status == 413 and answer["error"] == (
        "a WebP image of 250×250 pixels, each of which takes the memory of 2.1: "
        "more than the limit of 100,000 pixels"
    )


def test_an_image_at_the_pixel_limit_is_answered(port):
    assert predict(port, png(316, 316))[0] == 200  # 99,856


@pytest.mark.parametrize(
    "content, kind, query, status",
    [
        (b"not an image", "image/png", "", 422),
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
def test_what_is_wrong_is_answered_with_its_status(port, content, kind, query, status):
    got, _, answer = predict(port, content, query, kind)
    assert (got, set(answer) - {"images"}) == (status, {"error"})
    assert "\n" not in answer["error"] and answer["error"]


def test_parameters_of_a_query():
    assert Parameters.of(b"") == (None, False, None)
    assert Parameters.of(b"topk=1&topk=0007&explain=ON&about=a%20b+c&x=") == (7, True, "a b c")
    assert Parameters.of(b"topk=1000&explain=False&about=")[:] == (1000, False, "")
    for number in (b"3.0", b"+3", b"%2B3", b"%203%20"):  # as clients that count in floats write it
        assert Parameters.of(b"topk=" + number).topk == 3
    for query in (b"topk=1001", b"topk=0", b"topk=-1", b"topk=1.5", b"topk=%D9%A3", b"explain="):
        with pytest.raises(RefusedError, match=query.partition(b"=")[0].decode()) as caught:
            Parameters.of(query)
        assert caught.value.status == 422


def test_answers_are_sent_at_once(checkpoint, monkeypatch):
    """Not when the client has acknowledged the head of the answer, 40 ms later."""
    delays, made = [], Connection.connection_made

    def noting(connection, transport):
        client = transport.get_extra_info("socket")
        delays.append(client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(connection, transport)

    monkeypatch.setattr(Connection, "connection_made", noting)
    with running(checkpoint) as (_, port):
        assert request(port, "GET", "/live")[0] == 200
    assert len(delays) == 1 and all(delays)


def test_other_paths_and_methods(port):
    assert request(port, "GET", "/nothing")[0] == 404
    status, headers, _ = request(port, "GET", "/predict")
    assert (status, headers["allow"]) == (405, "POST")
    assert set(request(port, "GET", "/nothing")[2]) == {"error"}


def test_a_slow_body_and_a_slow_answer(checkpoint, monkeypatch):
    quick = Limits(seconds=1.5)
    with running(checkpoint, quick) as (service, port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            assert b" 408 " in connection.recv(4096)
        asked = threading.Event()
        predicts = service.batcher.predict
        monkeypatch.setattr(
            service.batcher, "predict", lambda images: (asked.wait(5), predicts(images))[1]
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
            while not service.bodies.held and time.monotonic() < until:
                time.sleep(0.01)
        while service.bodies.held and time.monotonic() < until:
            time.sleep(0.01)
        assert service.bodies.held == 0
        assert metrics(port)["serve_requests_total", "/predict", "400"] == 1
    assert "Traceback" not in caplog.text


def test_a_full_queue_says_when_to_come_again(checkpoint, monkeypatch):
    few = Limits(pending=2, images=2)
    with running(checkpoint, few, max_batch=1) as (service, port):
        held = threading.Event()
        predicts = service.batcher.predict
        monkeypatch.setattr(
            service.batcher, "predict", lambda batch: (held.wait(8), predicts(batch))[1]
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

        predicts = service.batcher.predict
        monkeypatch.setattr(service.batcher, "predict", fails)
        status, _, content = predict(port, png(9, 9))
        assert status == 500 and set(content) == {"error"}
        assert "secret" not in json.dumps(content)
        monkeypatch.setattr(service.batcher, "predict", predicts)
        assert predict(port, png(9, 9))[0] == 200
    assert "secret of the inside" in caplog.text
