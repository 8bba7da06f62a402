"""A progress bar for long computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def nothing(count: int) -> None:
    """Takes the place of a progress bar that is not shown."""


@contextmanager
def progress_bar(shown: bool, total: int, doing: str = "adapting") -> Iterator[Callable[[int], None]]:
    """Gives a function that says how many more of `total` steps are done. `shown` draws them as a bar with the time left, on standard
    error, if that is a terminal or a notebook.

    The bar is drawn only when that function is called, so no thread of it runs beside the call.
    """
    if not shown:
        yield nothing
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, auto_refresh=False, disable=not (console.is_terminal or console.is_jupyter)) as bar:
        task = bar.add_task(doing, total=total)

        def advance(count: int) -> None:
            bar.update(task, advance=count, refresh=True)

        yield advance
