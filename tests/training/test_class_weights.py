"""training/class_weights.py: the weight of each class in the loss, from options and files.

Also of config/class_weights.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import logged, train

import config
from config.class_weights import parse_class_weights
from errors import OptionError
from losses import balanced_weights, effective_weights
from pipeline.dataset import ImageDataset
from pipeline.sources.base import ArraySource, Source
from training.class_weights import class_weights

NAMES = ["ant", "bee", "cat, black"]
COUNTS = [10, 30, 5]


def dataset(names=NAMES) -> ImageDataset:
    targets = np.repeat(np.arange(3), COUNTS)
    source = ArraySource(np.zeros((45, 2, 2), np.uint8), targets, list(names), "arrays")
    return ImageDataset(source)


def refused(text: str) -> str:
    with pytest.raises(OptionError) as caught:
        class_weights(text, dataset())
    message = str(caught.value)
    assert caught.value.option == "class_weights" and "\n" not in message
    return message


def test_weights_by_the_number_of_images():
    counts = torch.tensor(COUNTS)
    assert class_weights("none", dataset()) is None
    assert torch.equal(class_weights("balanced", dataset()), balanced_weights(counts))
    weights = class_weights("effective:0.9", dataset())
    assert torch.equal(weights, effective_weights(counts, 0.9))
    assert weights.mean().item() == pytest.approx(1)


def test_weights_by_name_have_a_mean_of_1():
    # 2, 1 and the 1 of the class that isn't named.
    assert class_weights("ant=2", dataset()).tolist() == pytest.approx([1.5, 0.75, 0.75])
    both = class_weights("bee=0.5, ant=2.5", dataset(["ant", "bee", "a=b"]))
    assert both.tolist() == pytest.approx([7.5 / 4, 1.5 / 4, 3 / 4])


FILES = {
    "weights.csv": 'class,weight\nant,1\nbee,2\n"cat, black",3\n',
    "weights.tsv": "bee\t2\ncat, black\t3\nant\t1\n",
    "weights.json": json.dumps({"ant": 1, "cat, black": 3, "bee": 2.0}),
    "weights.txt": "ant 1\n\ncat, black 3\nbee   2\n",
}


@pytest.mark.parametrize("name", FILES)
def test_weights_of_a_file(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    found = class_weights(str(tmp_path / name), dataset())
    assert found.tolist() == pytest.approx([0.5, 1.0, 1.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant=2,be=1", "no class is called 'be'; did you mean bee?"),
        ("ant=0", "'ant=0' is not NAME=WEIGHT with a weight above 0"),
        ("ant=nan", "'ant=nan' is not"),
        ("ant=1,ant=2", "'ant' is there twice"),
        ("effective", "give β from 0 to below 1"),
        ("effective:1", "give β from 0 to below 1"),
        ("balancd", "did you mean balanced?"),
        ("nowhere.csv", "nowhere.csv does not exist"),
    ],
)
def test_texts_that_are_refused(text, message):
    assert message in refused(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.txt", "ant 1\nbee 2\n", "no weight of 1 of 3 classes (cat, black): add them"),
        ("w.csv", "ant,1\nbea,2\n", "w.csv, line 2: no class is called 'bea'; did you mean bee?"),
        ("w.csv", "ant,1\nbee\n", "w.csv, line 2: '' is no weight"),
        ("w.csv", f"ant,1\nbee,{'9' * 140_000}\n", "w.csv: not CSV (field larger than field limit"),
        ("w.csv", "ant,1\nant,1\n", "w.csv, line 2: 'ant' is there already"),
        ("w.json", "[1, 2]", 'is not {"NAME": WEIGHT}'),
        ("w.json", "{", "not JSON"),
        ("w.json", '{"ant": -1}', "w.json, entry 1: '-1' is no weight"),
        ("w.txt", "\n", "holds no weights"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in refused(str(tmp_path / name))


def test_labels_that_are_not_known_beforehand_can_have_weights_by_name_alone():
    class Unknown(Source):
        classes, targets = NAMES, None

    part = ImageDataset(Unknown())
    for text in ("balanced", "effective:0.5"):
        with pytest.raises(OptionError, match="needs the label of every image beforehand"):
            class_weights(text, part)
    assert class_weights("ant=4,bee=1", part).tolist() == pytest.approx([2, 0.5, 0.5])


def test_what_is_wrong_in_the_text_shows_before_the_data():
    with pytest.raises(OptionError, match="did you mean effective"):
        config.load(["--class-weights", "efective:0.9"])
    assert parse_class_weights("a=b=2").named == (("a=b", 2.0),)


def test_a_run_says_its_weights_and_trains_by_them(images: Path, tmp_path, capsys):
    assert train(images, tmp_path / "a", "--epochs", "1", "--warmup-epochs", "0") == 0
    capsys.readouterr()
    more = ("--epochs", "1", "--warmup-epochs", "0", "--class-weights", "amber=5")
    assert train(images, tmp_path / "b", *more) == 0
    assert "in the loss: amber 2.14, blue 0.429, crimson 0.429" in capsys.readouterr().out
    losses = [logged(tmp_path / name)[0]["train_loss"] for name in "ab"]
    assert losses[0] != losses[1]
