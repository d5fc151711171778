"""What becomes of each option on resume: the table says it of all of them, once."""

import collections

from config import ON_RESUME, all_options, on_resume, resume_table


def test_every_option_is_in_the_table_once():
    named = collections.Counter(name for rule in ON_RESUME for name in rule.options)
    assert set(named) == {opt.name for opt in all_options()}
    assert set(named.values()) == {1}
    for opt in all_options():
        assert resume_table().count(f"`{opt.flag}`") >= 1


def test_what_may_not_change_is_refused():
    refused = {opt.name for opt in all_options() if on_resume(opt.name).kind == "refused"}
    form = {"model_kwargs", "global_pool", "bn_eps", "lora", "lora_alpha", "lora_targets"}
    images = {"in_chans", "bit_depth"}
    others = {"task", "model", "opt", "opt_kwargs", "val_fraction", "overfit_batches"}
    assert refused == form | images | others


def test_every_rule_says_what_it_means():
    for rule in ON_RESUME:
        assert rule.note and not rule.note.endswith(".") and rule.kind in resume_table()
