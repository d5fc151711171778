"""docs/performance.md: its commands pack a folder and train on the shards."""

import pages
from pages import SMALL, TINY, log, run


def test_performance(before_training):
    pack, train = pages.commands("docs/performance.md")
    run(pack, [], "packed")
    assert list((before_training / "packed").glob("train-*.tar"))
    command = train.replace("--model deit_small ", "")
    assert len(log(run(command, [*TINY, *SMALL, "--no-repeated-aug"], "run"))) == 1
