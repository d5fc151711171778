"""tools.common.stage: rates and trials, and what only a run can do."""

import pytest
import torch
from before_training import SMALL

import config
from tools import doctor, lr_find, overfit
from tools.common.stage import Rates, Trial, single_process


def test_rates_rise_by_the_same_factor_and_keep_the_scale_of_groups():
    rates = Rates(1e-6, 1e-2, 5)
    assert [rates.rate(t) for t in range(5)] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1], "lr_scale": 0.5}, {"params": weights[1:]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    rates.apply(optimizer, 2)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-5, 1e-4])
    assert rates.last == pytest.approx(1e-4)


def test_a_trial_goes_on_from_epoch_to_epoch_and_stops_at_its_update():
    given = config.load([*SMALL, "--batch-size", "256"])
    with single_process(given) as (_, processes, device):
        trial = Trial(given, processes, device)
        for updates in (7, 2):
            trial.train(updates)
    progress = trial.state.progress
    assert trial.data.steps == 5 and progress.update == 9
    assert (progress.epoch, progress.step, progress.samples) == (1, 4, 4 * 256)


def test_tools_refuse_what_only_a_run_can_do(capsys):
    for tool in (overfit, lr_find):
        assert tool.main([*SMALL, "--batch-size", "auto"]) == 2
        assert "error: --batch-size: auto" in capsys.readouterr().err
    for tool in (doctor, overfit, lr_find):
        assert tool.main([*SMALL, "--no-such-option"]) == 2
        assert "unknown option --no-such-option" in capsys.readouterr().err
