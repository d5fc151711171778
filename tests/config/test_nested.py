"""Nested config files of other programs: what to write instead, with the file's line."""

import pytest

from config import load
from errors import OptionError

NESTED = [
    (
        "epochs: 3\nmodel:\n  name: deit_small\n  pretrained: true\n",
        2,
        "below 'model': write model: deit_small, pretrained: true",
    ),
    (
        "optim: {name: sgd, lr: 1e-3, betas: [0.9, 0.99]}",
        1,
        "write opt: sgd, lr: 1e-3, opt_betas: [0.9, 0.99]",
    ),
    (
        "optimizer:\n  type: AdamW\n  learning_rate: 0.1\n",
        1,
        "write opt: AdamW, learning_rate otherwise (did you mean --lr?)",
    ),
    ("lr_scheduler: {policy: cosine, warmup: 5}", 1, "write sched: cosine, warmup_epochs: 5"),
    ("data:\n  root: pets\n", 1, "write data_path: pets"),
    ("mixup: {alpha: 0.3}", 1, "write mixup: 0.3"),
    ("model_ema: {decay: 0.999}", 1, "write model_ema_decay: 0.999"),
    ("train: {epochs: 3, foo: 1}", 1, "write epochs: 3, foo otherwise"),
]


@pytest.mark.parametrize("text, line, words", NESTED, ids=[n[0].split(":")[0] for n in NESTED])
def test_nested_options_are_told_flat(write_yaml, text, line, words):
    path = write_yaml(text)
    with pytest.raises(OptionError) as caught:
        load(["--config", path])
    assert str(caught.value).startswith(f"--config: {path}, line {line}: options are flat")
    assert words in str(caught.value) and "\n" not in str(caught.value)
