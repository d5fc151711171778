"""augmentation/policy.py: the distributions of timm's policies."""

import random

import numpy as np
import pytest
from pixels import LEVEL, PLAIN, PREPROCESSING, SAMPLES, augment
from scipy import stats

from augmentation.batch import supports
from augmentation.policy import KINDS, kind_of
from augmentation.steps import build_policy
from config import AugmentOptions
from utils import seed_all


class Recorder:
    """Stands in for timm's operations: remembers what is asked for, in place of doing it."""

    def __init__(self, policy):
        self.calls = []
        ops = policy.ops if hasattr(policy, "ops") else [o for row in policy.policy for o in row]
        for op in ops:
            op.aug_fn = self.note(op.name)

    def note(self, name):
        def record(image, *arguments, **_):
            if name == "GaussianBlurRand":
                # Drawn by the operation itself.
                arguments = [random.uniform(0.1, 2.0 * arguments[0])]
            self.calls.append((name, arguments[0] if arguments else 0.0))
            return image

        return record


@pytest.mark.parametrize(
    "name",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m5-n3-mstd101-p0.7",
        "rand-m20-mmax30-mstd2",
        "rand-m7-tweights",
        "rand-m8-t3a",
        "original-mstd0.5",
        "originalr",
        "v0",
        "3a",
    ],
)
def test_policy_draws_from_timms_distribution(name):
    theirs = build_policy(name, PREPROCESSING, "bicubic")
    recorder = Recorder(theirs)
    seed_all(0)
    for _ in range(SAMPLES):
        theirs(None)
    options = AugmentOptions(aa=name, color_jitter=None, reprob=0.0)
    plan = augment(options).plan(0, np.arange(SAMPLES))
    ours = list(zip(plan.kinds.ravel(), plan.arguments.ravel(), strict=True))
    values = {}
    for called, argument in recorder.calls:
        kind = kind_of(called)
        if called == "Desaturate":
            argument = 1 - argument
        if called.endswith("Rel"):
            argument *= PREPROCESSING.input_size
        values.setdefault(kind, []).append(round(float(argument), 4))
    # How often each operation comes: a table of counts from one distribution.
    kinds = sorted(set(values) | {int(k) for k, _ in ours if k})
    expected = [len(values.get(k, ())) for k in kinds]
    found = [sum(k == kind for k, _ in ours) for kind in kinds]
    assert min(expected) > 0
    total = plan.kinds.size
    table = [[*expected, total - sum(expected)], [*found, total - sum(found)]]
    table = np.array(table)[:, np.array(table).sum(0) > 0]
    assert stats.chi2_contingency(table).pvalue > LEVEL
    for kind in kinds:
        mine = [round(float(a), 4) for k, a in ours if k == kind]
        if len(set(values[kind])) <= 12:
            # Whole numbers and fixed magnitudes: the same values, as often.
            levels = sorted({round(v, 4) for v in (*values[kind], *mine)})
            counts = [
                [sum(abs(x - v) < 1e-3 for x in side) for v in levels]
                for side in (values[kind], mine)
            ]
            seen = np.array(counts)[:, np.array(counts).sum(0) > 0]
            p = stats.chi2_contingency(seen).pvalue if seen.shape[1] > 1 else 1.0
            assert p > LEVEL, KINDS[kind]
        else:
            assert stats.ks_2samp(values[kind], mine).pvalue > LEVEL, KINDS[kind]


def test_unsupported_policies():
    assert not supports(AugmentOptions(aa="augmix-m5-w4-d2"))
    assert not supports(AugmentOptions(aa="trivial"))
    assert supports(AugmentOptions(aa="trivial", ThreeAugment=True))
    assert supports(AugmentOptions()) and supports(PLAIN)
