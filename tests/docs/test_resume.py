"""docs/resume.md: its commands are run one after the other."""

import pages
from pages import SMALL, TINY, log, run


def test_resume(before_training):
    first, again, back, other = pages.commands("docs/resume.md")
    tiny = [*TINY, *SMALL]
    tiny[tiny.index("--epochs") + 1] = "4"
    assert len(log(run(first, tiny, ""))) == 2
    folder = run(again, tiny, "")
    assert [r["epoch"] for r in log(folder)] == [1, 2, 3, 4]
    whole = log(folder)[3]
    run(back, tiny, "")
    assert list(folder.glob("set-aside/checkpoint-0004.pth"))
    # Gone over once more, the last epoch is the same.
    repeated = log(folder)[3]
    for key in ("train_loss", "test_loss", "update"):
        assert repeated[key] == whole[key]
    assert len(log(run(other, tiny, ""))) == 4
