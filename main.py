"""Train and evaluate image classifiers: ``python main.py --model deit_small --data-path DIR``.

This file reads the command line; ``training/run.py`` is the run. The two are apart so that
``--help``, ``--print-config`` and a misspelled option answer at once, before torch is imported.
"""

import gc
import os
import sys
from collections.abc import Sequence

from config import Config, Parser, get_parser, load, to_yaml
from errors import Stopped, UserError, os_errors_in_words
from outputs.console import console, say
from training.options import options_of_checkpoint


def get_args_parser() -> Parser:
    """The command-line parser, made from config/options.py."""
    return get_parser()


def load_config(argv: Sequence[str] | None = None) -> Config:
    """The resolved options; with ``--resume FILE`` those of the checkpoint rank below them."""
    return load(argv, options_of_checkpoint)


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
    wait_briefly()
    with console():
        return _main(argv)


def wait_briefly() -> None:
    """Let threads of torch that wait for each other leave their core soon, unless told otherwise.

    GNU's OpenMP reads it when torch is imported, and by itself tries 300,000 times. Two quickstarts
    at once on two cores then get 9 % of the speed of one each; like this 26 %, and one alone loses
    nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def import_run() -> None:
    """Import what a run needs, without looking for garbage meanwhile: a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import training.run  # noqa: F401
    finally:
        if collects:
            gc.enable()


def _main(argv: Sequence[str] | None) -> int:
    try:
        with os_errors_in_words():
            config = load_config(argv)
            if config.run.print_config:
                print_config(config)
                return 0
            import_run()
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
