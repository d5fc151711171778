"""Train and evaluate image classifiers: ``python main.py --model deit_small --data-path DIR``.

This file reads the command line; ``training/run.py`` is the run. The two are apart so that
``--help``, ``--print-config`` and a misspelled option answer at once, before torch is imported.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import Config, Parser, get_parser, is_option, load, to_yaml
from errors import CheckpointError, Stopped, UserError, os_errors_in_words
from outputs.console import console, say


def get_args_parser() -> Parser:
    """The command-line parser, made from config/options.py."""
    return get_parser()


def load_config(argv: Sequence[str] | None = None) -> Config:
    """The resolved options; with ``--resume FILE`` those of the checkpoint rank below them."""
    return load(argv, options_of_checkpoint)


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


def as_run(config: Config) -> Config:
    """``config`` with what a run takes from the weights it starts from."""
    if not (config.model.pretrained or config.model.finetune or config.run.eval):
        return config
    from training.asked import asked_only
    from training.image_options import with_options_of_weights
    from training.plugins import import_plugins
    from training.resume import output_folder

    import_plugins(config.run.plugin)
    with asked_only(config):
        return with_options_of_weights(config, output_folder(config))


def print_config(config: Config) -> None:
    """Print ``config`` as it is run, or as it was given where the weights can't be read."""
    shown = config
    try:
        shown = as_run(config)
    finally:
        print(to_yaml(shown, origins=True, everything=True), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (docs/reliability.md lists them)."""
    with console():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        with os_errors_in_words():
            config = load_config(argv)
            if config.run.print_config:
                print_config(config)
                return 0
            from training.run import run

            return run(config)
    except UserError as error:
        say(f"error: {error}", error=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; there was nothing to save", file=sys.stderr)
        return 130
    except Stopped as stopped:
        if not stopped.announced:
            print(f"{stopped}; there was nothing to save", file=sys.stderr)
        return stopped.exit_code


if __name__ == "__main__":
    code = main()
    if code > 128:  # a signal: don't wait for threads that storage may hold
        os._exit(code)
    sys.exit(code)
