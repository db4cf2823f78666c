"""Lines over steps as SVG: numbers in, path data out; the template draws and colours them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Points = Sequence[tuple[float, float]]
# More would be drawn on top of each other at the width of a page.
MOST_POINTS = 300
# Where the greatest value is so many times the median, the height is logarithmic: else most of it is flat.
LOG_FROM = 30.0
# So few are marked one by one: a line between two would look like knowledge of what lies between.
MARKED = 12


@dataclass(frozen=True)
class Tick:
    """A label and where it stands, in the chart's units."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series: `path` is SVG path data, `marks` are points to draw; the latest one has `value`."""

    name: str
    path: str
    marks: list[tuple[float, float]]
    value: float


@dataclass(frozen=True)
class Chart:
    """Of `width` times `height` units; the plot keeps `left` and `below` free for labels."""

    name: str
    lines: list[Line]
    across: list[Tick]
    up: list[Tick]
    logarithmic: bool
    width: int
    height: int
    left: int
    below: int = 24


def draw_series(name: str, series: Mapping[str, Points], *, small: bool = False) -> Chart | None:
    """A chart of series over the same steps; None where nothing is to be seen: one point, or one value."""
    every = [point for points in series.values() for point in points]
    values, steps = [y for _, y in every], [x for x, _ in every]
    if len(set(steps)) < 2 or min(values) == max(values):
        return None
    logarithmic = min(values) > 0 and max(values) > LOG_FROM * median(values)
    low, high = (math.log10(v) if logarithmic else v for v in (min(values), max(values)))
    ups = _powers(low, high) if logarithmic else _round_ticks(low, high)
    low, high = min(low, *ups), max(high, *ups)
    chart = Chart(name, [], [], [], logarithmic, 340 if small else 720, 150 if small else 260,
                  52 if small else 70)  # fmt: skip
    first, last = min(steps), max(steps)
    right, top = 14, 10

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if logarithmic else y
        across = chart.left + (x - first) / (last - first) * (chart.width - chart.left - right)
        return round(across, 1), round(height_of(y), 1)

    def height_of(y: float) -> float:
        return top + (high - y) / (high - low) * (chart.height - chart.below - top)

    for label, points in series.items():
        placed = [place(x, y) for x, y in _thinned(points)]
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in placed)
        marks = placed if len(placed) <= MARKED else [place(*points[-1])]
        chart.lines.append(Line(label, path, marks, points[-1][1]))
    for value in ups:
        chart.up.append(Tick(round(height_of(value), 1), said(10**value if logarithmic else value)))
    for step in _round_ticks(first, last, most=4 if small else 7):
        if first <= step <= last:
            chart.across.append(Tick(place(step, values[0])[0], said(step)))
    return chart


def _thinned(points: Points) -> Points:
    """Means of neighbours, where there are more points than can be told apart."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in groups]


def _round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values at equal distances around a span: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / max(1, most - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(start, end + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Exponents of ten around a span, every second one and so on where there are many."""
    start, end = math.floor(low), math.ceil(high)
    return [float(power) for power in range(start, end + 1, max(1, math.ceil((end - start) / 6)))]


def said(value: float) -> str:
    """A number as short as it can be read: 0.0021, 14, 1,200, 3.5e-07."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000_000 or abs(value) < 1e-4:
        return f"{value:.2g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
