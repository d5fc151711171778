"""A progress bar for a terminal."""

import sys
from typing import Any


class ProgressBar:
    """A bar that is drawn where standard output is a terminal; elsewhere nothing.

    Args:
        title: what is going on.
        total: how many ``unit`` there are, batches or images.
        initial: how many are done already.
        visible: False for processes that stay silent.
    """

    def __init__(
        self,
        title: str,
        total: int,
        initial: int = 0,
        *,
        unit: str = "batch",
        visible: bool = True,
    ) -> None:
        self.visible = visible and sys.stdout.isatty()
        self._bar: Any = None
        if self.visible:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=title,
                total=total,
                initial=initial,
                file=sys.stdout,
                leave=False,
                dynamic_ncols=True,
                unit=unit,
            )

    def to(self, done: int) -> None:
        """Move to ``done``."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """Show ``text`` behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
