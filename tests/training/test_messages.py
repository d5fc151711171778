"""What a run says of itself, and what it advises where images keep the device waiting.

Also of training/announce.py.
"""

import re

from runs import STOPPED, arguments, stopped_after, train

import main
from utils import cores

DIGITS = ("--data-set", "DIGITS", "--batch-size", "64", "--epochs", "1", "--warmup-epochs", "0")
DIGITS += ("--no-repeated-aug", "--no-model-ema", "--log-interval", "50")

SLOW = """
import time
import numpy as np
from datasets import Source, register_dataset

class Slow(Source):
    classes = ["a", "b"]
    targets = np.arange(24) % 2

    def open(self, index):
        time.sleep(0.05)
        return np.full((8, 8), 10 * (index % 2), dtype=np.uint8)

    def sample_id(self, index):
        return str(index)

@register_dataset("slow")
def slow(is_train, options, seed):
    return Slow()
"""


def test_log_lines_say_what_bounds_the_run(tmp_path, capsys):
    assert train("", tmp_path, *DIGITS, "--log-interval", "5") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("epoch 1 [")]
    assert len(lines) > 2
    assert re.search(r"first step \d+\.\d s  \d+\.\d GiB$", lines[0])
    for line in lines[1:]:
        assert re.search(r"[\d.]+ img/s  data wait \d+%  step \d+ ms  \d+\.\d GiB$", line)


def test_the_input_line_says_where_images_come_from(tmp_path, capsys):
    def input_line(name: str, *options: str) -> str:
        with stopped_after(1):
            assert train("", tmp_path / name, *DIGITS, *options) == STOPPED
        return re.search(r"^input +(\d.*)$", capsys.readouterr().out, re.M)[1]

    line = input_line("a")
    assert line.startswith("0.4 MiB of images in memory of cpu; augmented")
    assert line.endswith("on cpu")
    one_by_one = ("--augment-on", "cpu")
    line = input_line("b", "--cache", "none", *one_by_one, "--num-workers", "1")
    assert re.match(r"1 workers?; augmented one by one", line)
    line = input_line("d", "--cache", "none", "--num-workers", "1")
    assert re.match(r"1 workers?; augmented by the batch in the workers$", line)
    line = input_line("c", "--cache", "ram", *one_by_one)
    assert re.match(r"0 workers, 0.3 MiB of images in ram; augmented one", line)


def test_a_run_that_waits_for_images_says_once_what_to_change(tmp_path, capsys):
    (tmp_path / "slow.py").write_text(SLOW)
    options = ["--plugin", str(tmp_path / "slow.py"), "--data-set", "slow", "--batch-size", "4"]
    options += ["--log-interval", "1"]
    assert train("", tmp_path / "run", *DIGITS, *options) == 0
    shown = capsys.readouterr()
    (told,) = [x for x in (shown.out + shown.err).splitlines() if "waiting for images" in x]
    assert re.search(r"\d\d % of the time", told)
    assert f"--num-workers {cores()} (now 0, the machine has {cores()} cores)" in told
    assert "--cache ram" in told and "tools.data pack" in told and "--augment-on" not in told
    assert train("", tmp_path / "other", *DIGITS, *options, "--augment-on", "cpu") == 0
    shown = capsys.readouterr()
    assert "; --augment-on device;" in shown.out + shown.err


def test_a_fast_run_gets_no_advice(tmp_path, capsys):
    assert train("", tmp_path, *DIGITS) == 0
    shown = capsys.readouterr()
    assert "waiting for images" not in shown.out + shown.err


def test_commands_to_paste_are_quoted_and_tensorboard_is_named_where_it_is_on(tmp_path, capsys):
    folder = tmp_path / "my run"
    argv = [word for word in arguments("", folder, *DIGITS) if word != "--no-tensorboard"]
    assert main.main(argv) == 0
    assert f"TensorBoard: tensorboard --logdir '{folder}'\n" in capsys.readouterr().out
    assert train("", tmp_path / "other", *DIGITS) == 0
    assert "tensorboard" not in capsys.readouterr().out.lower()
