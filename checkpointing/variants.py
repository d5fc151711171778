"""The form of a model, from the options of a run or of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from architectures.variant import Variant
from config import by_name, convert, keywords
from errors import CheckpointError, OptionError, printable

FORM_OPTIONS = ("model_kwargs", "global_pool", "bn_momentum", "bn_eps")


def variant_of(options: Mapping[str, Any]) -> Variant:
    """The :class:`Variant` that ``options`` by name ask for; what is missing has its default.

    Raises OptionError for a value that its option can't have.
    """
    values = {name: convert(by_name(name), x) for name, x in form_options(options).items()}
    arguments = keywords("model_kwargs", values.pop("model_kwargs", ()))
    return Variant(arguments=arguments, **values)


def saved_variant(content: Mapping[str, Any]) -> Variant:
    """The :class:`Variant` of the model in a checkpoint or export.

    Raises CheckpointError for options that have no possible value.
    """
    options = content.get("config")
    try:
        return variant_of(options if isinstance(options, Mapping) else {})
    except OptionError as error:
        raise CheckpointError(f"an option in it is wrong: {printable(str(error))}") from None


def form_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that say more of the model than its name, as plain values."""
    found = {name: options.get(name) for name in FORM_OPTIONS}
    return {name: value for name, value in found.items() if value not in (None, "", (), [])}
