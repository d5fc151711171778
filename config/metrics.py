"""The log keys of an epoch that ``--best-metric`` may name, and shorter names for them."""

from errors import did_you_mean

# Of the model and of its average, without the prefix test_ or ema_.
_OF_A_MODEL = {
    "classification": ("acc1", "acc5", "loss", "balanced_acc", "macro_f1", "worst_class_acc"),
    "multilabel": (
        *("map", "micro_f1", "macro_f1", "micro_f1_best", "macro_f1_best"),
        "loss",
    ),
}
_OF_TRAINING = {
    "classification": ("train_loss", "train_acc1"),
    "multilabel": ("train_loss",),
}
# What they are called elsewhere.
_ELSEWHERE = {
    "top1": "acc1",
    "top5": "acc5",
    "accuracy": "acc1",
    "balanced_accuracy": "balanced_acc",
    "f1": "macro_f1",
    "f1_macro": "macro_f1",
}


def metrics(task: str) -> tuple[str, ...]:
    """The log keys of a run of this ``--task`` that say how good an epoch is."""
    names = _OF_A_MODEL[task]
    kinds = [f"{kind}_{name}" for kind in ("test", "ema") for name in names]
    return (*kinds, *_OF_TRAINING[task])


def metric_key(name: str) -> str:
    """The log key of a metric that is written without ``test_``, or by its name elsewhere;
    ``name`` itself where it is none."""
    key = _with_prefix(name)
    return key if any(key in metrics(task) for task in _OF_A_MODEL) else name


def unknown_metric(name: str, task: str) -> str:
    """What is wrong with a metric that a run of this task doesn't log; empty for one that it
    does."""
    known = metrics(task)
    if name in known:
        return ""
    nearest = did_you_mean(_with_prefix(name), known)
    return f"{name!r} is not logged; one of {', '.join(known)}" + (nearest and f" ({nearest})")


def _with_prefix(name: str) -> str:
    plain = name.lower().replace("-", "_")
    prefix, _, rest = plain.partition("_")
    if prefix not in ("test", "ema", "train"):
        prefix, rest = "test", plain
    return f"{prefix}_{_ELSEWHERE.get(rest, rest)}"
