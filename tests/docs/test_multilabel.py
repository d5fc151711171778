"""docs/multilabel.md: its commands and its Python are run in turn, on tiny sets."""

import contextlib
import io
import json
import runpy
import shlex
from pathlib import Path

from pages import TINY, blocks, commands, run, tool
from tiny_images import tiny_image

PAGE = "docs/multilabel.md"
SMALL = "--model deit_nano_patch4_32 --input-size 16"


def test_the_commands_of_the_page_work(before_training, monkeypatch):
    photos = before_training / "photos"
    photos.mkdir()
    rows = ["path,labels"]
    for i in range(30):
        tiny_image((200 * (i % 2), 200 * (i % 3 == 0), 0), (16, 16), i).save(photos / f"{i}.png")
        rows.append(f"{i}.png,{'|'.join(['red'] * (i % 2) + ['green'] * (i % 3 == 0))}")
    (photos / "labels.csv").write_text("\n".join(rows) + "\n")
    ran = []
    for command in commands(PAGE):
        ran.append(command.split()[1:3])
        words = shlex.split(command)
        if words[1] == "main.py":
            command = command.replace("--model deit_small --pretrained", SMALL)
            command = command.replace("--batch-size 64 --epochs 30", "")
            run(command, [*TINY, "--model-ema-decay", "0.5"], "output/evaluated")
        elif words[1].startswith("examples/"):
            argv = [words[1], "-", "scenes", "--train", "60", "--val", "12"]
            monkeypatch.setattr("sys.argv", argv)
            runpy.run_path(words[1], run_name="__main__")
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert tool(words[2])([*words[3:], "--device", "cpu"]) == 0
            assert out.getvalue()
    assert len(ran) >= 10
    report = json.loads(Path("output/fashion_scenes/report/report.json").read_text())
    assert report["task"] == "multilabel" and report["images"] == 12
    for block in blocks(PAGE, "python"):
        exec(block, {})
