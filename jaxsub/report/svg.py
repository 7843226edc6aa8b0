"""Inline SVG charts written by hand: axes with round ticks, lines with bands, labels beside the lines.

Colours come from the page's style sheet by class name, so a chart follows the light or dark scheme. Coordinates are
view-box units; a chart is drawn at about its own size, so a unit is about a pixel.
"""

import dataclasses
import math

from .markup import Markup, tag

_MAX_POINTS = 100  # a line keeps at most this many points; more cannot be told apart at this size
_LABEL_GAP = 12.5  # least distance between the base lines of two labels


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """One axis: its label, range and ticks [(value, text)]; `log` for a logarithmic one."""

    label: str
    low: float
    high: float
    ticks: list
    log: bool = False

    def share(self, value):
        """Where `value` lies between `low` (0) and `high` (1), kept inside."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(max(value, 1e-300)), math.log(low), math.log(high)
        return min(max((value - low) / (high - low or 1), 0), 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line through `points` [(x, y)], in the colour of class `style`; `band` is [(x, low, high)]."""

    points: list
    style: str
    label: str = ""
    band: list = dataclasses.field(default_factory=list)
    dots: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """A point of interest: a dot at (x, y) and its text, to the left or the right of it, `line` lines down."""

    x: float
    y: float
    text: str
    style: str
    left: bool = False
    line: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A thin straight line across the plot at `value` of the axis 'x' or 'y', with its text."""

    axis: str
    value: float
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """Size of a chart and the margins around its plot."""

    width: int = 360
    height: int = 214
    left: int = 40
    right: int = 72
    top: int = 24
    bottom: int = 36

    def x(self, axis, value):
        """Horizontal place of a value."""
        return self.left + axis.share(value) * (self.width - self.left - self.right)

    def y(self, axis, value):
        """Vertical place of a value; the axis runs upwards."""
        return self.height - self.bottom - axis.share(value) * (self.height - self.top - self.bottom)


def linear(label, low, high, *, count=5, percent=False):
    """An axis from `low` to `high` with about `count` ticks at multiples of 1, 2, 2.5 or 5."""
    step = _round_step((high - low) / count) if high > low else 1
    first = math.ceil(low / step - 1e-9)
    values = [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, [(v, f"{100 * v:.0f}%" if percent else f"{v:.6g}") for v in values])


def counts(label, high):
    """An axis of component numbers, 0 to `high`, ticks at whole numbers."""
    axis = linear(label, 0, high, count=5)
    return dataclasses.replace(axis, ticks=[(v, t) for v, t in axis.ticks if float(v).is_integer()])


def doubling(label, values):
    """A logarithmic axis with a tick at each of `values` (1, 2, 4, ...) and a little room at its ends."""
    return Axis(label, min(values) / 1.15, max(values) * 1.15, [(v, f"{v:.0f}") for v in values], log=True)


def logarithmic(label, low, high):
    """A logarithmic axis; ticks at decades, or at 1, 2, 5 of each where there are few."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1,)
    stride = max(1, round(decades / 5))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [s * 10.0**e for e in exponents if e % stride == 0 for s in steps]
    inside = [v for v in values if low * 0.999 <= v <= high * 1.001]
    if len(inside) < 2:  # less than a factor of two: round values cannot be had from 1, 2, 5
        inside = [v for v, _ in linear("", low, high, count=3).ticks if v > 0]
    return Axis(label, low, high, [(v, f"{v:.6g}" if 1e-3 <= v < 1e5 else f"{v:.0e}") for v in inside], log=True)


def _round_step(rough):
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= rough * 0.999)


def chart(title, x, y, lines, *, marks=(), rules=(), frame=Frame()):
    """An <svg> with axes `x` and `y`, the lines with their bands, dots with text, and rules across.

    `title` is what a screen reader says; a line's label stands at its right end, in its colour.
    """
    parts = [tag("title", title), _grid(x, y, frame)]
    parts += [_rule(rule, x, y, frame) for rule in rules]
    parts += [_band(line, x, y, frame) for line in lines if line.band]
    parts += [_line(line, x, y, frame) for line in lines if line.points]
    parts.append(_end_labels(lines, x, y, frame))
    parts += [_mark(mark, x, y, frame) for mark in marks]
    return tag("svg", parts, class_="chart", viewBox=f"0 0 {frame.width} {frame.height}", role="img")


def text(x, y, content, style="", anchor=None):
    """A <text>; `anchor` is 'middle' or 'end'."""
    return tag("text", content, x=_number(x), y=_number(y), class_=style or None, text_anchor=anchor)


def _grid(x, y, frame):
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    parts = [text(max(left - 36, 0), 12, y.label, "axis")]
    horizontal = "".join([f"M{left} {_number(frame.y(y, v))}H{right}" for v, _ in y.ticks])
    parts.append(tag("path", d=horizontal, class_="grid"))
    parts += [text(left - 6, frame.y(y, v) + 3.5, label, anchor="end") for v, label in y.ticks]
    parts.append(tag("path", d=f"M{left} {bottom}H{right}", class_="base"))
    parts += [text(frame.x(x, v), bottom + 14, label, anchor="middle") for v, label in x.ticks]
    parts.append(text((left + right) / 2, frame.height - 5, x.label, "axis", "middle"))
    return Markup("".join(parts))


def _rule(rule, x, y, frame):
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    if rule.axis == "y":
        place = frame.y(y, rule.value)
        line, label = f"M{frame.left} {_number(place)}H{right}", text(right + 5, place + 3.5, rule.text, "axis")
    else:
        place = frame.x(x, rule.value)
        line = f"M{_number(place)} {frame.top}V{bottom}"
        label = text(place, frame.top - 3, rule.text, "axis", "middle")
    return Markup(tag("path", d=line, class_="rule") + (label if rule.text else ""))


def _line(line, x, y, frame):
    points = thin(line.points)
    path = "M" + "L".join([_point(x, y, frame, *point) for point in points])
    drawn = tag("path", d=path, class_=f"line {line.style}")
    if line.dots or len(points) == 1:
        circles = [(_number(frame.x(x, a)), _number(frame.y(y, b))) for a, b in points]
        drawn += "".join([tag("circle", cx=a, cy=b, r="2.6", class_=f"dot {line.style}") for a, b in circles])
    return Markup(drawn)


def _band(line, x, y, frame):
    band = thin(line.band)
    outline = [_point(x, y, frame, a, high) for a, _, high in band]
    outline += [_point(x, y, frame, a, low) for a, low, _ in reversed(band)]
    return tag("path", d="M" + "L".join(outline) + "Z", class_=f"band {line.style}")


def _end_labels(lines, x, y, frame):
    """Labels at the right ends of the lines, pushed apart where they would overlap."""
    ends = [(frame.y(y, line.points[-1][1]) + 3.5, line) for line in lines if line.label and line.points]
    ends.sort(key=lambda end: end[0])
    places = []
    for place, _ in ends:
        places.append(max(place, places[-1] + _LABEL_GAP) if places else place)
    lowest = frame.height - frame.bottom + 3.5
    for i in range(len(places) - 1, -1, -1):  # back up from the bottom if the last ones fell off
        places[i] = min(places[i], lowest if i == len(places) - 1 else places[i + 1] - _LABEL_GAP)
    start = frame.width - frame.right + 6
    return Markup(
        "".join([text(start, p, line.label, f"label {line.style}") for p, (_, line) in zip(places, ends, strict=True)])
    )


def _mark(mark, x, y, frame):
    across, down = frame.x(x, mark.x), frame.y(y, mark.y)
    dot = tag("circle", cx=_number(across), cy=_number(down), r="3.2", class_=f"dot {mark.style}")
    if mark.left:
        return Markup(dot + text(across - 7, down - 5, mark.text, f"label {mark.style}", "end"))
    return Markup(dot + text(across + 7, down + 13 + 13 * mark.line, mark.text, f"label {mark.style}"))


def intervals(title, x, y, rows, *, frame=Frame()):
    """An <svg> of dots with bars: rows [(x, value, low, high, chance)]; chance is a short tick of its own."""
    parts = [tag("title", title), _grid(x, y, frame)]
    for place, value, low, high, chance in rows:
        across = frame.x(x, place)
        if chance is not None:
            level = _number(frame.y(y, chance))
            parts.append(tag("path", d=f"M{_number(across - 9)} {level}h18", class_="line null"))
        if low is not None and high is not None:
            bar = f"M{_number(across)} {_number(frame.y(y, low))}V{_number(frame.y(y, high))}"
            parts.append(tag("path", d=bar, class_="line observed thick"))
        parts.append(tag("circle", cx=_number(across), cy=_number(frame.y(y, value)), r="3.4", class_="dot observed"))
    _, value, _, _, chance = rows[-1]
    start = frame.width - frame.right + 6
    parts.append(text(start, frame.y(y, value) + 3.5, "observed", "label observed"))
    if chance is not None and abs(frame.y(y, chance) - frame.y(y, value)) > _LABEL_GAP:
        parts.append(text(start, frame.y(y, chance) + 3.5, "chance", "label null"))
    return tag("svg", parts, class_="chart", viewBox=f"0 0 {frame.width} {frame.height}", role="img")


def ranking(title, x, rows, *, rules=(), frame=Frame(), pitch=19):
    """An <svg> of dots with bars, one below the other: rows [(label, value, low, high, style)] on the axis `x`.

    The chart is as high as its rows ask for; rules are those of `x`.
    """
    frame = dataclasses.replace(frame, height=frame.top + frame.bottom + pitch * len(rows))
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    upright = "".join([f"M{_number(frame.x(x, v))} {frame.top}V{bottom}" for v, _ in x.ticks])
    parts = [tag("title", title), tag("path", d=upright, class_="grid")]
    parts += [text(frame.x(x, v), bottom + 14, label, anchor="middle") for v, label in x.ticks]
    parts.append(text((left + right) / 2, frame.height - 5, x.label, "axis", "middle"))
    parts += [_rule(rule, x, x, frame) for rule in rules]
    for number, (label, value, low, high, style) in enumerate(rows):
        place = frame.top + pitch * (number + 0.5)
        parts.append(text(left - 8, place + 4, label, f"label {style}", "end"))
        if low is not None and high is not None:
            bar = f"M{_number(frame.x(x, low))} {_number(place)}H{_number(frame.x(x, high))}"
            parts.append(tag("path", d=bar, class_=f"line {style} thick"))
        parts.append(tag("circle", cx=_number(frame.x(x, value)), cy=_number(place), r="3.4", class_=f"dot {style}"))
    return tag("svg", parts, class_="chart", viewBox=f"0 0 {frame.width} {frame.height}", role="img")


def thin(points):
    """At most `_MAX_POINTS` of the points: the first thirty, then evenly spaced ones, and the last."""
    if len(points) <= _MAX_POINTS:
        return points
    dense, rest = 30, _MAX_POINTS - 30
    step = (len(points) - 1 - dense) / rest
    return points[:dense] + [points[dense + round(step * (i + 1))] for i in range(rest)]


def _point(x, y, frame, across, up):
    return f"{_number(frame.x(x, across))} {_number(frame.y(y, up))}"


def _number(value):
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")
