"""Small line charts and heat maps as inline SVG, coloured by the page's CSS variables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

NUM_COLORS = 8
_LETTER = 6.6
_MOST_LABELS = 6

_LARGEST = 1e308  # of a value on an axis: a double that can still be moved by its padding


@dataclass(frozen=True)
class Series:
    """Points of one line.

    Args:
        name: for the tooltip.
        x, y: coordinates of the points.
        color: index of a series colour, see the page's CSS; None is the muted one.
        low, high: ends of error bars, or empty.
        labels: text beside the points, or empty.
        line: draw the line through the points.
        dots: draw the points.
        dashed: draw the line dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int | None = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    labels: Sequence[str] = ()
    line: bool = True
    dots: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with linear or logarithmic axes.

    Args:
        series: what is drawn.
        x_label, y_label: below and above the axes.
        width, height: of the view box.
        log_y: logarithmic ordinate; values must be positive.
        reverse_x: the largest abscissa left.
        x_ticks: abscissae to mark; chosen when empty.
    """

    series: Sequence[Series]
    x_label: str
    y_label: str
    width: int = 640
    height: int = 360
    log_y: bool = False
    reverse_x: bool = False
    x_ticks: Sequence[float] = field(default=())

    def svg(self) -> str:
        """The picture; empty when there is no point."""
        if not any(len(series.x) for series in self.series):
            return ""
        axes = _Axes(self)
        parts = [_grid(axes), *(_draw(axes, series) for series in self.series), _labels(axes, self.series)]
        title = f"{self.y_label} against {self.x_label}"
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">'
            + "".join(parts)
            + "</svg>"
        )


class _Axes:
    """From values to places."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.left, self.right, self.top, self.bottom = 52, chart.width - 14, 28, chart.height - 40
        labels = [label for series in chart.series for label in series.labels if label]
        self.has_column = len(labels) > _MOST_LABELS
        if self.has_column:
            self.right -= _LETTER * max(map(len, labels)) + 10
        xs = [x for series in chart.series for x in series.x]
        ys = [y for series in chart.series for values in (series.y, series.low, series.high) for y in values]
        self.x_range = _padded(min(xs), max(xs), 0.04)
        self.y_range = _padded(*(map(math.log10, (min(ys), max(ys))) if chart.log_y else (min(ys), max(ys))), 0.08)
        self.x_ticks = list(chart.x_ticks) or _ticks(*self.x_range)
        self.y_ticks = _log_ticks(*self.y_range) if chart.log_y else _ticks(*self.y_range)

    def x(self, value: float) -> float:
        share = (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        share = 1 - share if self.chart.reverse_x else share
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.chart.log_y else value
        share = (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0])
        return self.bottom - share * (self.bottom - self.top)


def color_class(color: int | None) -> str:
    """CSS classes of a series colour; beyond the number of colours they come again with hollow dots."""
    if color is None:
        return "muted"
    return f"c{color % NUM_COLORS}" + " hollow" * (color // NUM_COLORS % 2)


def heat_map(rows: Sequence[Sequence[float]], row_names: Sequence[str], column_names: Sequence[str]) -> str:
    """Coefficients as coloured cells, rows of any length: blue negative, red positive; values where they fit."""
    cell, left, top = (34, 30, 18) if len(rows) <= 12 else (16, 26, 14)
    limit = max((abs(value) for row in rows for value in row), default=0) or 1.0
    parts = []
    for i, row in enumerate(rows):
        parts.append(_text(left - 5, top + (i + 0.5) * cell, row_names[i], "end", dy=".35em"))
        for j, value in enumerate(row):
            x, y = left + j * cell, top + i * cell
            sign, share = ("pos" if value > 0 else "neg"), abs(value) / limit
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" class="cell"/>'
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" class="{sign}" opacity="{share:.3f}">'
                f"<title>state {escape(row_names[i])}, output {escape(column_names[j])}: {value:.6g}</title></rect>"
            )
            if cell >= 30:
                parts.append(_text(x + cell / 2, y + cell / 2, _short(value), "middle", dy=".35em", kind="value"))
    for j, name in enumerate(column_names):
        if cell >= 30 or j % 4 == 0:
            parts.append(_text(left + (j + 0.5) * cell, top - 5, name, "middle"))
    width, height = left + len(column_names) * cell + 4, top + len(rows) * cell + 2
    size = f'viewBox="0 0 {width} {height}" style="max-width:{1.1 * width:.0f}px"'
    return f'<svg {size} role="img" aria-label="coefficients">{"".join(parts)}</svg>'


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if abs(value) >= 0.095 else f"{value:.1g}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    space = min(high - low, _LARGEST) * share or abs(high) * 0.1 or 1.0
    return max(low - space, -_LARGEST), min(high + space, _LARGEST)


def _ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = min(high - low, _LARGEST) / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis between 10^low and 10^high."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    found = [value for value in found if low <= math.log10(value) <= high]
    return found if len(found) > 1 else [10**low, 10**high]


def _grid(axes: _Axes) -> str:
    chart = axes.chart
    parts = []
    for tick in axes.y_ticks:
        y = axes.y(tick)
        parts.append(f'<line x1="{axes.left}" x2="{axes.right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(axes.left - 6, y, f"{tick:.4g}", "end", dy=".35em"))
    for tick in axes.x_ticks:
        parts.append(_text(axes.x(tick), axes.bottom + 17, f"{tick:.4g}", "middle"))
    parts.append(f'<line x1="{axes.left}" x2="{axes.right}" y1="{axes.bottom}" y2="{axes.bottom}" class="axis"/>')
    parts.append(_text((axes.left + axes.right) / 2, chart.height - 6, chart.x_label, "middle", kind="label"))
    parts.append(_text(6, 14, chart.y_label, "start", kind="label"))
    return "".join(parts)


def _draw(axes: _Axes, series: Series) -> str:
    kind = color_class(series.color)
    points = [(axes.x(x), axes.y(y)) for x, y in zip(series.x, series.y)]
    parts = []
    if series.line and len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(
            f'<polyline points="{path}" class="line {kind}"{dash}><title>{escape(series.name)}</title></polyline>'
        )
    for (x, _), low, high in zip(points, series.low, series.high):
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(low):.1f}" y2="{axes.y(high):.1f}" class="line {kind}"/>'
        )
    if series.dots:
        for (x, y), value_x, value_y in zip(points, series.x, series.y):
            title = f"{series.name}: {value_x:.4g}, {value_y:.4g}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="dot {kind}"><title>{escape(title)}</title></circle>'
            )
    return "".join(parts)


def _labels(axes: _Axes, all_series: Sequence[Series]) -> str:
    """Text beside the points; many labels stand in a column at the right."""
    wanted = [
        (axes.x(x), axes.y(y), label)
        for series in all_series
        for x, y, label in zip(series.x, series.y, series.labels)
        if label
    ]
    wanted.sort(key=lambda item: item[1])
    return (_column if axes.has_column else _beside)(axes, wanted)


def _beside(axes: _Axes, wanted: Sequence[tuple[float, float, str]]) -> str:
    """Moved up or down until no two overlap; left of points near the right edge."""
    placed: list[tuple[float, float, float, float]] = []
    parts = []
    for x, y, label in wanted:
        width = _LETTER * len(label)
        is_right = x + 8 + width <= axes.chart.width - 2
        left = x + 9 if is_right else x - 11 - width
        spots = sorted((step * 6 for step in range(-20, 21)), key=abs)
        inside = [s for s in spots if axes.top <= y + s <= axes.bottom - 6]
        shift = next((s for s in inside if _is_free(left, y + s, width, placed)), 0)
        placed.append((left, left + width, y + shift - 6, y + shift + 6))
        if abs(shift) > 9:
            parts.append(_leader(x, y, left - 1 if is_right else left + width + 1, y + shift))
        parts.append(_text(left, y + shift, label, "start", dy=".35em", kind="name"))
    return "".join(parts)


def _column(axes: _Axes, wanted: Sequence[tuple[float, float, str]]) -> str:
    """Right of the axes, in the order of the points, as near to their heights as the line spacing allows."""
    gap, left = 13.0, axes.right + 14
    heights: list[float] = []
    for _, y, _ in wanted:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    limit = axes.bottom - 4
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - gap
    parts = []
    for (x, y, label), height in zip(wanted, heights):
        parts.append(_leader(x + 5, y, left - 2, height))
        parts.append(_text(left, height, label, "start", dy=".35em", kind="name"))
    return "".join(parts)


def _leader(x: float, y: float, end_x: float, end_y: float) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end_x:.1f}" y2="{end_y:.1f}" class="grid"/>'


def _is_free(left: float, y: float, width: float, placed: Sequence[tuple[float, float, float, float]]) -> bool:
    return all(left > r or left + width < l or y - 6 > b or y + 6 < t for l, r, t, b in placed)  # noqa: E741


def _text(x: float, y: float, text: str, anchor: str, dy: str = "0", kind: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" dy="{dy}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
