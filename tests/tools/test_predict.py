"""tools.predict: what it says of files, folders, patterns, tables and broken images.

Also of tools/common/trained.py.
"""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from augmentation.transforms import CentreCrop
from inference import load_for_inference
from tools import predict
from tools.common import trained


def ask(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = predict.main([str(a) for a in (*argv, "--device", "cpu")])
    out, err = capsys.readouterr()
    return code, out, err


def expected(checkpoint, path, *, flip=False, ema=False) -> dict[str, float]:
    """Confidence of each class, by hand, one image alone."""
    model, transform, names = load_for_inference(checkpoint, ema=ema)
    with torch.no_grad(), Image.open(path) as image:
        tensor = transform(image.convert("RGB"))[None]
        answer = F.softmax(model(tensor), 1)
        if flip:
            answer = (answer + F.softmax(model(torch.flip(tensor, (-1,))), 1)) / 2
    return dict(zip(names, answer[0].tolist(), strict=True))


@pytest.mark.parametrize("options", [(), ("--flip",), ("--ema",)])
def test_confidences_are_those_of_the_model(checkpoint, images, capsys, options):
    files = sorted(images.glob("val/*/*.png"))
    code, out, _ = ask(
        capsys, checkpoint, images / "val", "--format", "json", "--batch-size", "4", *options
    )
    assert code == 0
    answers = json.loads(out)
    assert [a["file"] for a in answers] == [str(f) for f in files]
    for answer, file in zip(answers, files, strict=True):
        wanted = expected(checkpoint, file, flip="--flip" in options, ema="--ema" in options)
        given = {p["class"]: p["confidence"] for p in answer["predictions"]}
        assert given == pytest.approx(wanted, abs=1e-5)
        assert [p["class"] for p in answer["predictions"]] == sorted(wanted, key=wanted.get)[::-1]


def test_narrow_transparent_and_broken_images_do_not_spoil_the_others(
    checkpoint, images, tmp_path, capsys
):
    good = tmp_path / "c.png"
    shutil.copy(images / "val/blue/0.png", good)
    Image.new("RGB", (50_000, 1)).save(tmp_path / "a.png")
    Image.new("RGB", (1, 500_000)).save(tmp_path / "b.png")
    hidden = Image.open(good).convert("RGBA")
    hidden.putalpha(0)
    hidden.save(tmp_path / "d.png")
    Image.new("RGB", hidden.size, "white").save(tmp_path / "e.png")
    (tmp_path / "f.png").write_bytes(good.read_bytes()[:60])
    code, out, err = ask(capsys, checkpoint, tmp_path, "--format", "json")
    answers = {Path(a["file"]).name: a["predictions"] for a in json.loads(out)}
    assert code == 4 and err.count("f.png") == 1
    assert list(answers) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    given = {p["class"]: p["confidence"] for p in answers["c.png"]}
    assert given == pytest.approx(expected(checkpoint, good), abs=1e-5)
    assert answers["d.png"] == answers["e.png"] != answers["c.png"]


def test_an_image_that_needs_too_much_memory_is_named(
    checkpoint, images, tmp_path, capsys, monkeypatch
):
    crop = CentreCrop.crop

    def greedy(self, image):
        if image.size == (9, 7):
            raise MemoryError
        return crop(self, image)

    monkeypatch.setattr(CentreCrop, "crop", greedy)
    Image.new("RGB", (9, 7)).save(tmp_path / "greedy.png")
    argv = (checkpoint, tmp_path, images / "val/blue", "--format", "json")
    code, out, err = ask(capsys, *argv)
    assert code == 4 and len(json.loads(out)) == len(list(images.glob("val/blue/*")))
    assert "greedy.png: needs more memory than there is" in err


def test_flip_and_ema_change_the_answer(checkpoint, images):
    file = images / "val/blue/0.png"
    plain = expected(checkpoint, file)
    assert plain != pytest.approx(expected(checkpoint, file, flip=True), abs=1e-6)
    assert plain != pytest.approx(expected(checkpoint, file, ema=True), abs=1e-6)


def test_formats_agree(checkpoint, images, capsys):
    file = images / "val/amber/1.png"
    _, out, _ = ask(capsys, checkpoint, file, "--format", "csv", "--topk", "2")
    rows = list(csv.DictReader(io.StringIO(out)))
    wanted = expected(checkpoint, file)
    best = max(wanted, key=wanted.get)
    assert [r["rank"] for r in rows] == ["1", "2"]
    assert rows[0]["class"] == best
    assert float(rows[0]["confidence"]) == pytest.approx(wanted[best], abs=1e-5)
    _, out, _ = ask(capsys, checkpoint, file, "--topk", "1")
    assert out == f"{file}  {best} {100 * wanted[best]:.1f} %\n"


def test_every_kind_of_input(checkpoint, images, capsys, tmp_path, monkeypatch):
    blue = sorted((images / "val/blue").iterdir())
    _, out, _ = ask(capsys, checkpoint, f"{images}/val/b*/*.png")
    assert [line.split("  ")[0] for line in out.splitlines()] == [str(f) for f in blue]
    table = images / "some.csv"
    table.write_text("label,image\n1,val/blue/2.png\n1,val/blue/0.png\n")
    _, out, _ = ask(capsys, checkpoint, table, "--format", "json")
    assert [a["file"] for a in json.loads(out)] == [str(blue[2]), str(blue[0])]
    table.write_text("val/blue/1.png\n")
    _, out, _ = ask(capsys, checkpoint, table, "--format", "json")
    assert [a["file"] for a in json.loads(out)] == [str(blue[1])]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{blue[3]}\n\n{blue[1]}\n"))
    _, out, _ = ask(capsys, checkpoint, "-", "--format", "json")
    assert [a["file"] for a in json.loads(out)] == [str(blue[3]), str(blue[1])]


def test_bad_images_are_named_and_passed_over(checkpoint, images, capsys, tmp_path):
    broken = tmp_path / "broken\x1b[31m.png"
    broken.write_bytes(b"no image")
    missing, good = tmp_path / "missing.png", images / "val/blue/0.png"
    code, out, err = ask(
        capsys, checkpoint, broken, good, missing, "--format", "json", "--batch-size", "1"
    )
    assert code == trained.SOME_UNREADABLE
    assert [a["file"] for a in json.loads(out)] == [str(good)]
    assert "\x1b" not in err and "\\x1b[31m.png: not an image that Pillow can read" in err
    assert f"{missing}: No such file or directory" in err
    assert "2 of 3 images could not be read" in err


def test_nothing_readable_is_still_json(checkpoint, tmp_path, capsys):
    code, out, _ = ask(capsys, checkpoint, tmp_path / "missing.png", "--format", "json")
    assert code == trained.SOME_UNREADABLE and json.loads(out) == []


@pytest.mark.parametrize(
    "given, reason", [("empty", "no images in this folder"), ("no*thing", "no file matches")]
)
def test_inputs_that_name_nothing_are_an_error(checkpoint, tmp_path, capsys, given, reason):
    (tmp_path / "empty").mkdir()
    code, out, err = ask(capsys, checkpoint, tmp_path / given)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / given}: {reason}\n"


def test_answers_that_are_not_finite_are_an_error(checkpoint, images, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["head.bias"][1] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    code, _, err = ask(capsys, tmp_path / "nan.pth", images / "val")
    assert code == 2 and err.startswith("error: the model's answers are not finite")


def test_weights_alone_are_an_error(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"head.weight": torch.zeros(2, 2)}, path)
    code, _, err = ask(capsys, path, tmp_path)
    assert code == 2
    assert err.startswith(f"error: {path}: the checkpoint holds no config") and err.count("\n") == 1
