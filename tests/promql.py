"""As much of PromQL as the dashboard and the alert rules need: parsed, and evaluated over series.

What it does not know is an error, never a guess. Rates are over what was seen in the window,
stretched to its length; Prometheus treats the ends of the window with more care.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = list[tuple[float, float]]
Value = float | Vector

_LOOKBACK_S = 300.0
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>\d+(?:\.\d+)?(?![\w:]))
      | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
      | (?P<text>"(?:[^"\\]|\\.)*")
      | (?P<window>\[\d+[smhd]\])
      | (?P<sign>==|!=|>=|<=|=~|!~|[-+*/><=(){},])
    )""",
    re.VERBOSE,
)
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt, ">=": operator.ge,
    "<=": operator.le,
}  # fmt: skip
_AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": math.fsum, "max": max, "min": min, "count": len,
    "avg": lambda values: math.fsum(values) / len(values),
}  # fmt: skip
_SETS = ("and", "or", "unless")
_LEVELS = (("or",), ("and", "unless"), tuple(_COMPARISONS), ("+", "-"), ("*", "/"))


class PromqlError(ValueError):
    """An expression is wrong, or of a kind that is not known here."""


# --- series ----------------------------------------------------------------------------------


class Database:
    """Series, as a file has them: lines of ``NAME{LABELS} VALUE MILLISECONDS``."""

    def __init__(self, path: Path) -> None:
        self._series: dict[str, dict[Labels, Samples]] = {}
        for line in path.read_text().splitlines():
            found = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+) (\d+)", line)
            if found is None:
                raise PromqlError(f"no sample: {line}")
            labels = frozenset(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
            samples = self._series.setdefault(found[1], {}).setdefault(labels, [])
            samples.append((int(found[4]) / 1e3, float(found[3])))

    def select(self, name: str, matchers: Sequence[Matcher]) -> dict[Labels, Samples]:
        return {
            labels: samples
            for labels, samples in self._series.get(name, {}).items()
            if all(matcher.takes(dict(labels)) for matcher in matchers)
        }


def write_samples(path: Path, at: float, exposition: str, labels: Mapping[str, str]) -> None:
    """Add what ``/metrics`` says at a time to a file, with the labels of where that is."""
    where = ",".join(f'{name}="{value}"' for name, value in labels.items())
    with path.open("a") as file:
        for line in exposition.splitlines():
            if line.startswith("#"):
                continue
            name, value = line.rsplit(" ", 1)
            bare, _, own = name.rstrip("}").partition("{")
            text = ",".join(part for part in (own, where) if part)
            file.write(f"{bare}{{{text}}} {value} {round(at * 1e3)}\n")


# --- expressions -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Matcher:
    label: str
    sign: str
    text: str

    def takes(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.label, "")
        is_equal = (
            re.fullmatch(self.text, value) is not None
            if self.sign.endswith("~")
            else value == self.text
        )
        return is_equal is not self.sign.startswith("!")


class Node:
    """A part of an expression."""

    def at(self, series: Database, time_s: float) -> Value:
        raise NotImplementedError

    def parts(self) -> Iterator[Node]:
        """Return this and all within it."""
        yield self


@dataclasses.dataclass(frozen=True, slots=True)
class Number(Node):
    value: float

    def at(self, series: Database, time_s: float) -> Value:
        return self.value


@dataclasses.dataclass(frozen=True, slots=True)
class Selector(Node):
    name: str
    matchers: tuple[Matcher, ...]
    window_s: float | None

    def at(self, series: Database, time_s: float) -> Value:
        if self.window_s is not None:
            raise PromqlError(f"{self.name} has a window, and no function takes it")
        found = {}
        for labels, samples in series.select(self.name, self.matchers).items():
            recent = [value for at, value in samples if time_s - _LOOKBACK_S < at <= time_s]
            if recent:
                found[labels] = recent[-1]
        return found

    def over_window(self, series: Database, time_s: float) -> dict[Labels, Samples]:
        if self.window_s is None:
            raise PromqlError(f"{self.name} needs a window, as in {self.name}[5m]")
        return {
            labels: [each for each in samples if time_s - self.window_s < each[0] <= time_s]
            for labels, samples in series.select(self.name, self.matchers).items()
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Aggregation(Node):
    kind: str
    by: tuple[str, ...]
    of: Node

    def at(self, series: Database, time_s: float) -> Value:
        groups: dict[Labels, list[float]] = {}
        for labels, value in _vector(self.of.at(series, time_s)).items():
            groups.setdefault(_only(labels, self.by), []).append(value)
        return {labels: _AGGREGATIONS[self.kind](values) for labels, values in groups.items()}

    def parts(self) -> Iterator[Node]:
        yield self
        yield from self.of.parts()


@dataclasses.dataclass(frozen=True, slots=True)
class Call(Node):
    name: str
    arguments: tuple[Node, ...]

    def at(self, series: Database, time_s: float) -> Value:
        if self.name in ("rate", "increase"):
            (of,) = self.arguments
            if not isinstance(of, Selector):
                raise PromqlError(f"{self.name} takes series with a window")
            is_rate, found = self.name == "rate", {}
            for labels, samples in of.over_window(series, time_s).items():
                if len(samples) >= 2 and of.window_s is not None:
                    increase = _increase(samples) * of.window_s / (samples[-1][0] - samples[0][0])
                    found[labels] = increase / of.window_s if is_rate else increase
            return found
        if self.name == "histogram_quantile":
            share, buckets = (each.at(series, time_s) for each in self.arguments)
            assert isinstance(share, float)
            return _quantiles(share, _vector(buckets))
        if self.name == "absent":
            (vector,) = (each.at(series, time_s) for each in self.arguments)
            return {} if vector else {frozenset(): 1.0}
        raise PromqlError(f"there is no function {self.name} here")

    def parts(self) -> Iterator[Node]:
        yield self
        for each in self.arguments:
            yield from each.parts()


@dataclasses.dataclass(frozen=True, slots=True)
class Operation(Node):
    sign: str
    left: Node
    right: Node

    def at(self, series: Database, time_s: float) -> Value:
        left, right = self.left.at(series, time_s), self.right.at(series, time_s)
        if self.sign in _SETS:
            first, second = _vector(left), _vector(right)
            if self.sign == "or":
                return {**second, **first}
            wanted = self.sign == "and"
            return {k: v for k, v in first.items() if (k in second) is wanted}
        if isinstance(left, float) and isinstance(right, float):
            return float(_apply(self.sign, left, right))
        keys = left if isinstance(left, dict) else _vector(right)
        found: Vector = {}
        for labels in keys:
            a = left if isinstance(left, float) else left[labels]
            b = right if isinstance(right, float) else right.get(labels)
            if b is None:
                continue
            value = _apply(self.sign, a, b)
            if self.sign not in _COMPARISONS:
                found[labels] = value
            elif value:
                found[labels] = a
        return found

    def parts(self) -> Iterator[Node]:
        yield self
        yield from self.left.parts()
        yield from self.right.parts()


def parse(text: str) -> Node:
    """Read an expression. Raises PromqlError."""
    parser = _Parser(text)
    node = parser.operation(0)
    if parser.tokens:
        raise PromqlError(f"{parser.tokens[0]!r} is too much in {text!r}")
    return node


def query(text: str, series: Database, time_s: float) -> Value:
    """Return an expression's value at a time."""
    return parse(text).at(series, time_s)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[str] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise PromqlError(f"{text[at:]!r} cannot be read")
            self.tokens.append(found[0].strip())
            at = found.end()

    def operation(self, level: int) -> Node:
        if level == len(_LEVELS):
            return self.primary()
        node = self.operation(level + 1)
        while self.tokens and self.tokens[0] in _LEVELS[level]:
            sign = self.tokens.pop(0)
            node = Operation(sign, node, self.operation(level + 1))
        return node

    def primary(self) -> Node:
        token = self.take()
        if token == "(":
            node = self.operation(0)
            self.take(")")
            return node
        if re.fullmatch(r"[\d.]+", token):
            return Number(float(token))
        if not re.fullmatch(r"[A-Za-z_:][\w:]*", token) or token in _SETS:
            raise PromqlError(f"{token!r} is no value in {self.text!r}")
        if token in _AGGREGATIONS:
            by = self.names() if self.tokens[:1] == ["by"] else ()
            (of,) = self.arguments()
            return Aggregation(token, by, of)
        if self.tokens[:1] == ["("]:
            return Call(token, self.arguments())
        return self.selector(token)

    def names(self) -> tuple[str, ...]:
        self.take("by")
        self.take("(")
        names = [self.take()]
        while self.tokens[:1] == [","]:
            self.take(",")
            names.append(self.take())
        self.take(")")
        return tuple(names)

    def arguments(self) -> tuple[Node, ...]:
        self.take("(")
        nodes = [self.operation(0)]
        while self.tokens[:1] == [","]:
            self.take(",")
            nodes.append(self.operation(0))
        self.take(")")
        return tuple(nodes)

    def selector(self, name: str) -> Selector:
        matchers = []
        if self.tokens[:1] == ["{"]:
            self.take("{")
            while self.tokens[:1] != ["}"]:
                label, sign, text = self.take(), self.take(), self.take()
                if sign not in ("=", "!=", "=~", "!~") or not text.startswith('"'):
                    raise PromqlError(f"{label}{sign}{text} matches nothing in {self.text!r}")
                matchers.append(Matcher(label, sign, text[1:-1]))
                if self.tokens[:1] == [","]:
                    self.take(",")
            self.take("}")
        window_s = None
        if self.tokens and (found := re.fullmatch(r"\[(\d+)([smhd])\]", self.tokens[0])):
            self.take()
            window_s = float(int(found[1]) * _UNITS_S[found[2]])
        return Selector(name, tuple(matchers), window_s)

    def take(self, expected: str | None = None) -> str:
        if not self.tokens:
            raise PromqlError(f"{self.text!r} is not complete")
        token = self.tokens.pop(0)
        if expected not in (None, token):
            raise PromqlError(f"{token!r} stands where {expected!r} should, in {self.text!r}")
        return token


def _vector(value: Value) -> Vector:
    if isinstance(value, float):
        raise PromqlError("a number stands where series should")
    return value


def _only(labels: Labels, names: Sequence[str]) -> Labels:
    return frozenset(each for each in labels if each[0] in names)


def _apply(sign: str, left: float, right: float) -> float:
    if sign in _COMPARISONS:
        return float(_COMPARISONS[sign](left, right))
    if sign == "/":
        return left / right if right else math.nan if left == 0 else math.copysign(math.inf, left)
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _increase(samples: Samples) -> float:
    """Return by how much a counter has grown; one that falls has begun anew."""
    total = 0.0
    for (_, before), (_, after) in zip(samples, samples[1:], strict=False):
        total += after - before if after >= before else after
    return total


def _quantiles(share: float, buckets: Vector) -> Vector:
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, count in buckets.items():
        bound = float(dict(labels)["le"])
        groups.setdefault(frozenset(x for x in labels if x[0] != "le"), []).append((bound, count))
    return {labels: _quantile(share, sorted(rows)) for labels, rows in groups.items()}


def _quantile(share: float, rows: list[tuple[float, float]]) -> float:
    rank = share * rows[-1][1]
    if rows[-1][1] == 0:
        return math.nan
    low = below = 0.0
    for bound, count in rows:
        if count >= rank:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return rows[-1][0]
