"""Train and evaluate image classifiers: ``python main.py --model deit_small --data-path DIR``.

This file reads the command line; ``training/run.py`` is the run. The two are apart so that
``--help``, ``--print-config`` and a misspelled option answer at once, before torch is imported.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import Config, Parser, get_parser, is_option, load, to_yaml
from errors import UserError


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
    from checkpointing.published import is_published, name_for_timm

    if is_published(source):
        return {"model": name_for_timm(source)}
    saved = options_of(source)
    # A checkpoint may come from anywhere: it doesn't get to name code to import.
    found = {k: v for k, v in saved.items() if k != "plugin" and is_option(k)}
    if "://" not in source and found:
        found["output_dir"] = str(Path(source).parent)
    return found


def as_run(config: Config) -> Config:
    """``config`` with what a run takes from the weights it starts from."""
    if not (config.model.pretrained or config.model.finetune or config.run.eval):
        return config
    from training.image_options import with_options_of_weights
    from training.plugins import import_plugins
    from training.resume import output_folder

    import_plugins(config.run.plugin)
    return with_options_of_weights(config, output_folder(config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (docs/reliability.md lists them)."""
    try:
        config = load_config(argv)
        if config.run.print_config:
            print(to_yaml(as_run(config), origins=True, everything=True), end="")
            return 0
        from training.run import run

        return run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; there was nothing to save", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
