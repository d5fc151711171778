"""``--background``: the colour under transparent images."""

from errors import OptionError

DROP = "drop"


def background_colour(background: str) -> tuple[int, int, int] | None:
    """Red, green and blue (0–255) of a colour by name or as #rrggbb; None for "drop".

    Raises OptionError for what is neither.
    """
    if background == DROP:
        return None
    from PIL import ImageColor  # ``--help`` answers without Pillow

    try:
        colour = ImageColor.getrgb(background)
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise OptionError(
            "background",
            f"{background!r} is no colour: give a name (white), #rrggbb in quotes, or {DROP}",
        )
    return colour
