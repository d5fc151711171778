"""What is known to be wrong is said before the data are looked at."""

import pytest
import torch
from runs import train

TEACHER = ("--distillation-type", "hard", "--teacher-model", "resnet18", "--teacher-path")
WRONG = {
    "model": (("--model", "deit_smal"), "--model: unknown model 'deit_smal': did you mean"),
    "weights": (("--pretrained",), "--pretrained: no weights of deit_nano_patch4_32"),
    "optimiser": (("--opt", "adamm"), "--opt: unknown optimiser 'adamm'; did you mean"),
    "policy": (("--aa", "rand-x"), "--aa: 'rand-x' is not a policy"),
    "file": ((*TEACHER, "missing.pth"), "--teacher-path: checkpoint missing.pth does not exist"),
    "teacher": (
        ("--distillation-type", "hard", "--teacher-model", "regnety_1", "--teacher-path", "timm"),
        "--teacher-model: unknown model 'regnety_1'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_names_are_checked_before_the_data(tmp_path, capsys, what):
    options, words = WRONG[what]
    assert train(tmp_path / "no data here", tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_teacher_is_named(tmp_path, capsys):
    (tmp_path / "teacher.pth").write_text("<html>log in</html>")
    assert train(tmp_path, tmp_path / "run", *TEACHER, tmp_path / "teacher.pth") == 2
    assert "--teacher-path: checkpoint" in (error := capsys.readouterr().err)
    assert "is an HTML page" in error
    torch.save({"config": 3}, tmp_path / "teacher.pth")
    assert train(tmp_path, tmp_path / "run", *TEACHER, tmp_path / "teacher.pth") == 2
    assert "its config is int 3" in capsys.readouterr().err
