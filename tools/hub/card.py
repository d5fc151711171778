"""The model card of the hub form: what a run's checkpoint tells about it."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import config
from augmentation.preprocessing import Preprocessing
from checkpointing.files import MULTILABEL, task_of, thresholds_of
from checkpointing.published import FOLDER
from errors import first_names, printable
from loggers import CURVES_FILE
from tools.common.recipe import is_off_default
from tools.hub.form import HubForm

# What a recipe is, as opposed to the machine it ran on.
_SECTIONS_OF_THE_MACHINE = ("save", "log", "dist")
_OF_THE_MACHINE = (
    *("config", "output_dir", "resume", "device", "plugin"),
    *("num_workers", "loader_timeout", "pin_mem", "cache", "shard_cache", "shard_cache_gb"),
    *("cache_dir", "cache_gb", "eval_batch_size", "download"),
)
_MANY_CLASSES = 50


class Run(NamedTuple):
    """What a card tells of."""

    title: str
    """The name of the model."""
    content: Mapping[str, Any]
    """What the checkpoint holds."""
    curves: Path | None
    """The image of the training curves."""
    license: str | None
    """As the hub has it, "apache-2.0"; None: not stated."""
    ema: bool = False
    """Whether the weights are the moving average."""


def card(run: Run, form: HubForm, images: Preprocessing, repository: str | None) -> str:
    """``README.md`` of the folder: front matter for the hub, then Markdown.

    ``images`` is what evaluation does to them, ``repository`` the name on the hub, None where it
    isn't known yet.
    """
    parts = (*_text(run, form), *_images(images), *_how_to_load(form, repository))
    return "\n".join(("---", _front_matter(run), "---", *parts)) + "\n"


def _front_matter(run: Run) -> str:
    fields: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "transformers"],
    }
    if task_of(run.content) == MULTILABEL:
        fields["tags"].append("multi-label-classification")
    if run.license:
        fields = {"license": run.license} | fields
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()


def _text(run: Run, form: HubForm) -> Iterator[str]:
    content = run.content
    options, names = content["config"], content["class_names"]
    yield f"# {_plain(run.title)}\n"
    model, data = _without_folders(options["model"]), _data(options)
    yield (
        f"{_code(model)}{f' trained on {data}' if data else ''}, {len(names)} classes: "
        f"{_plain(first_names(names, _MANY_CLASSES))}.\n"
    )
    if task_of(content) == MULTILABEL:
        yield (
            "An image may have any number of them: the sigmoid of each logit is the probability of "
            "its class, which is there from the threshold on that validation chose.\n"
        )
        yield "| class | threshold |\n|---|---|"
        limits = thresholds_of(content) or [0.5] * len(names)
        shown = list(zip(names, limits, strict=True))[:_MANY_CLASSES]
        yield from (f"| {_plain(name)} | {limit:.3f} |" for name, limit in shown)
        yield ""
    if form.needs:
        yield (
            f"timm has no such architecture: `import {form.needs}` of the project that trained it "
            "comes first, also for transformers.\n"
        )
    yield f"License: {_plain(run.license or 'none is stated')}.\n"
    if content.get("metrics"):
        yield "## Results\n"
        if run.ema:
            yield "The weights are the moving average of training: its figures begin with `ema_`.\n"
        yield "| metric | |\n|---|---|"
        yield from (f"| {_plain(k)} | {_plain(_shown(v))} |" for k, v in content["metrics"].items())
        yield ""
    if run.curves:
        yield f"## Training\n\n![curves]({CURVES_FILE})\n"
    recipe = recipe_of(options)
    if len(recipe) > 1:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        # A fence that no value can end.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield f"## Recipe\n\nOptions that differ from the defaults:\n\n{fence}yaml"
        yield f"{text}{fence}\n"
    if content.get("versions"):
        versions = ", ".join(f"{name} {v}" for name, v in content["versions"].items())
        yield f"Trained with {_plain(versions)}.\n"


def _images(images: Preprocessing) -> Iterator[str]:
    yield "## Images\n\n| | |\n|---|---|"
    yield from (f"| {name} | {_shown(value)} |" for name, value in images.to_dict().items())


def _how_to_load(form: HubForm, repository: str | None) -> Iterator[str]:
    # A folder until it is pushed.
    name = repository or "FOLDER"
    for_timm = f"hf-hub:{name}" if repository else f"local-dir:{name}"
    first = f"import {form.needs}  # registers {form.architecture}\n" if form.needs else ""
    yield f"""
## How to load it

With timm:

```python
{first}import timm

model = timm.create_model("{for_timm}", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data, is_training=False)
logits = model(transform(image)[None])
```

With transformers:

```python
{first}from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}").eval()
logits = model(**processor(image, return_tensors="pt")).logits
```

With the project that trained it:

```python
from inference import load_for_inference

model, transform, class_names = load_for_inference("{for_timm}")
logits = model(transform(image)[None])
```"""


def recipe_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that are off their defaults, without those about its machine.

    Of a path on that machine only the last part is left.
    """
    return {
        name: _without_folders(value)
        for name, value in options.items()
        if is_off_default(name, value) and not _of_the_machine(name)
    }


def _of_the_machine(name: str) -> bool:
    section = config.by_name(name).section if config.is_option(name) else ""
    return name in _OF_THE_MACHINE or section in _SECTIONS_OF_THE_MACHINE


def _without_folders(value: object) -> object:
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value.removeprefix(FOLDER))
    return Path(path).name if os.path.isabs(path) else value


def _data(options: Mapping[str, Any]) -> str:
    """The name of the data set, without where it lies. "IMNET" is a kind: any image folder."""
    folder, kind = Path(options.get("data_path") or "").name, options.get("data_set")
    parts = (kind if kind != "IMNET" or not folder else "", folder)
    return " ".join(_code(part) for part in parts if part)


def _plain(text: str) -> str:
    """``text`` for Markdown that is nothing but text: no link, image, HTML or heading."""
    # Within a word an underscore is no emphasis.
    text = re.sub(r"([\\`*\[\]<>#|~&$!]|(?<!\w)_|_(?!\w))", r"\\\1", printable(text))
    return re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)", r"\\", text)


def _code(text: object) -> str:
    """``text`` in one piece of code."""
    return f"`{printable(str(text)).replace('`', chr(39))}`"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value)
