"""An SVG plot of fluid width. x is a share of the plot's width; y and text are in pixels, so text has the same size on all screens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup


class Axis(NamedTuple):
    """A range of values and the round numbers in it that are labelled."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Returns the relative position of a value: 0 at low, 1 at high."""
        return (value - self.low) / (self.high - self.low)


SMALLEST = 1e-290  # minimum span; the steps of a smaller one could not be represented


def axis(low: float, high: float, most: int = 6) -> Axis:
    """Creates an axis from low to high, widened to whole steps: at most `most` steps of 1, 2 or 5 times a power of ten."""
    if not high - low > SMALLEST:
        high = low + (abs(low) if abs(low) > SMALLEST else 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        first, last = math.floor(low / (step * factor) + 1e-9), math.ceil(high / (step * factor) - 1e-9)
        if last - first <= most:
            break
    step *= factor
    return Axis(first * step, last * step, tuple(i * step for i in range(first, last + 1)))


def tick_label(value: float, of: Axis, sign: bool = False) -> str:
    """Formats a label with as many digits as the step of the axis needs."""
    step = of.ticks[1] - of.ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:+,.{digits}f}" if sign and abs(value) > step / 2 else f"{abs(value) if abs(value) < step / 2 else value:,.{digits}f}"
    return text.replace("-", "−")


class Plot:
    """A plot whose marks are drawn in the order in which they are added.

    Args:
        key: an id that is unique on the page. title, description: text alternative; the description states the values. height: height of
            the plot area in pixels. left, right, top, bottom: margins for labels in pixels.
    """

    def __init__(
        self, key: str, title: str, description: str, height: float, *, left: float, right: float = 14, top: float = 10, bottom: float = 24
    ) -> None:
        self.key, self.title, self.description, self.height = key, title, description, height
        self.left = left
        # the plot area is the SVG's content box: percentages refer to its width, and labels are in the padding
        self.box = f"padding:{top:g}px {right:g}px {bottom:g}px {left:g}px;height:{height + top + bottom:g}px"
        self._marks: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._marks.append(
            Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(_percent(x1), _pixel(y1), _percent(x2), _pixel(y2), css)
        )

    def bar(self, x1: float, x2: float, y: float, height: float, css: str, hint: str = "") -> None:
        """Adds a bar between two shares of the width. hint: tooltip text."""
        low, high = sorted((x1, x2))
        self._marks.append(
            Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="1.5" class="{}">{}</rect>').format(
                _percent(low), _pixel(y), _percent(high - low), _pixel(height), css, _hint(hint)
            )
        )

    def dot(self, x: float, y: float, radius: float, css: str, hint: str = "") -> None:
        self._marks.append(
            Markup('<circle cx="{}" cy="{}" r="{}" class="{}">{}</circle>').format(_percent(x), _pixel(y), _pixel(radius), css, _hint(hint))
        )

    def text(self, x: float, y: float, text: str, css: str = "", *, dx: float = 0, anchor: str = "start") -> None:
        """Adds text that is vertically centred at y. dx: offset in pixels to the right of x."""
        self._marks.append(
            Markup('<text x="{}" y="{}" dx="{}" dy=".35em" text-anchor="{}" class="{}">{}</text>').format(
                _percent(x), _pixel(y), _pixel(dx), anchor, css, text
            )
        )

    def curve(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Adds a line through points (share, pixel)."""
        self._stretched("polyline", points, css)

    def area(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """Adds a filled polygon with corners (share, pixel)."""
        self._stretched("polygon", points, css)

    def _stretched(self, shape: str, points: Sequence[tuple[float, float]], css: str) -> None:
        # points do not support percentages, so a nested SVG is stretched over the width, and CSS keeps the stroke width constant
        shown = " ".join(f"{1000 * x:.1f},{y:.1f}" for x, y in points)
        self._marks.append(
            Markup(
                '<svg width="100%" height="{0}" viewBox="0 0 1000 {0}" preserveAspectRatio="none"><{1} points="{2}" class="{3}"/></svg>'
            ).format(_pixel(self.height), Markup(shape), shown, css)
        )

    def x_axis(self, of: Axis, sign: bool = False, label: str = "") -> None:
        """Adds vertical grid lines with labels below them; the line at 0 is stronger."""
        for tick in of.ticks:
            self.line(of.share(tick), 0, of.share(tick), self.height, "zero" if tick == 0 else "grid")
            self.text(of.share(tick), self.height + 13, tick_label(tick, of, sign), anchor="middle")
        if label:
            self.text(0.5, self.height + 31, label, "axis", anchor="middle")

    def y_axis(self, of: Axis, label: str = "") -> None:
        """Adds horizontal grid lines with labels next to them, and the axis label above."""
        for tick in of.ticks:
            y = self.y(of, tick)
            self.line(0, y, 1, y, "zero" if tick == of.low else "grid")
            self.text(0, y, tick_label(tick, of), dx=-7, anchor="end")
        if label:
            self.text(0, -15, label, "axis", dx=-self.left)

    def y(self, of: Axis, value: float) -> float:
        """Returns the position of a value in pixels from the top."""
        return self.height * (1 - of.share(value))

    def __html__(self) -> Markup:
        head = Markup(
            '<svg class="plot" role="img" aria-labelledby="{0}-title {0}-desc" style="{1}">'
            '<title id="{0}-title">{2}</title><desc id="{0}-desc">{3}</desc>'
        ).format(self.key, self.box, self.title, self.description)
        return head + Markup("").join(self._marks) + Markup("</svg>")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _pixel(value: float) -> str:
    return f"{value:.5g}"


def _hint(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup("")
