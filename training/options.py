"""The options that a checkpoint brings along. Nothing is imported here before one is read, so that
``--help`` answers at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import is_option
from errors import CheckpointError


def options_of_checkpoint(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the checkpoint that ``--resume`` names, and its folder to continue in."""
    source = given.get("resume")
    if not source or source == "auto":
        return {}
    from checkpointing.files import options_of
    from checkpointing.form import check_options
    from checkpointing.published import is_published, name_for_timm

    if is_published(source):
        return {"model": name_for_timm(source)}
    saved = options_of(source)
    if not isinstance(saved.get("model", ""), str):
        raise CheckpointError(
            f"checkpoint {source}: its config is another program's; take its weights over with "
            "--finetune"
        )
    # A checkpoint may come from anywhere: it doesn't get to name code to import.
    found = {k: v for k, v in saved.items() if k != "plugin" and is_option(k)}
    check_options(source, {k: v for k, v in found.items() if k not in given})
    if "://" not in source and found:
        found["output_dir"] = str(Path(source).parent)
    return found
