"""What ``tools.bench card`` has found: parts, tests that failed, figures against their targets."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.bench.figures import Row, limit_share, read_figures


@dataclass(frozen=True)
class Done:
    """How a part ended."""

    name: str
    code: int | None
    """Exit code, negative for a signal; None: it was not begun."""
    seconds: float
    why: str = ""
    """What else is to be known of its end."""

    def text(self) -> str:
        """One line."""
        end = "not begun" if self.code is None else f"exit {self.code} after {self.seconds:.0f} s"
        return f"{self.name}: {end}{self.why and f', {self.why}'}"


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached."""

    what: str
    benchmark: str
    words: tuple[str, ...]
    """All of them are in the title of its row."""
    value: Callable[[Row], float | None]
    least: float | None = None
    most: float | None = None
    unit: str = ""

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The figure, None where it wasn't measured."""
        found = [row for row in rows if all(word in row["title"] for word in self.words)]
        return self.value(found[0]) if found else None

    def reached(self, value: float | None) -> bool | None:
        """Whether ``value`` is good enough; None where there is none."""
        if value is None:
            return None
        return value >= self.least if self.least is not None else value <= self.most

    def wanted(self) -> str:
        """The bound in words."""
        sign, bound = ("≥", self.least) if self.least is not None else ("≤", self.most)
        return f"{sign} {bound:,g}{self.unit}"


def _rate(row: Row) -> float:
    return row["ours"]


def _ratio(row: Row) -> float:
    return row["ratio"]


def _field(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


_TIMM, _EAGER = "against timm's model", "against an eager fp16 loop"
TARGETS = (
    Target("DeiT-S", "step", ("deit_small", _TIMM), _rate, least=10_000, unit=" images/s"),
    Target("DeiT-S of the matmul rate", "step", ("deit_small", _TIMM), limit_share, least=0.40),
    Target("DeiT-B of the matmul rate", "step", ("deit_base", _TIMM), limit_share, least=0.50),
    Target("DeiT-Ti of the matmul rate", "step", ("deit_tiny", _TIMM), limit_share, least=0.25),
    *(
        Target(f"{name} against timm compiled", "step", (word, _TIMM), _ratio, least=1.3, unit="×")
        for name, word in (("DeiT-S", "deit_small"), ("DeiT-B", "deit_base"), ("DeiT-Ti", "tiny"))
    ),
    *(
        Target(f"{name} against an eager loop", "step", (word, _EAGER), _ratio, least=3, unit="×")
        for name, word in (("DeiT-S", "deit_small"), ("DeiT-B", "deit_base"), ("DeiT-Ti", "tiny"))
    ),
    Target("ResNet-50 against timm's", "step", ("resnet50", _TIMM), _ratio, least=1, unit="×"),
    Target(
        "augmentation, share of a DeiT-S step",
        "step",
        ("augmentation",),
        _field("share_of_step"),
        most=0.05,
    ),
    Target("CaiT-S24 against timm's", "attention", ("cait_S24",), _ratio, least=2, unit="×"),
    Target(
        "CaiT-S24 compiled against timm's",
        "attention",
        ("cait_S24", "compiled"),
        _ratio,
        least=2,
        unit="×",
    ),
    Target(
        "CaiT-S24's memory, share of timm's",
        "attention",
        ("cait_S24",),
        _field("share_of_memory"),
        most=0.5,
    ),
    Target("the quickstart", "epoch", ("quickstart",), _field("seconds"), most=30, unit=" s"),
)


def red_tests(text: str) -> list[str]:
    """Names of the tests that failed, in the verbose output of pytest, cut short or not."""
    found = {}
    for line in text.splitlines():
        # "[gw1] [ 10%] FAILED tests/x.py::name" as it runs, "FAILED tests/x.py::name - why" after.
        match = re.match(r"(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (\S+\.py.*)", line)
        if match:
            found[match[1].partition(" - ")[0].strip()] = None
    return list(found)


def write_summary(out: Path, done: Sequence[Done]) -> None:
    """Write ``summary.json`` and ``summary.txt`` into ``out``, from its figures and logs."""
    red = [
        name
        for log in sorted((out / "logs").glob("tests-*.txt"))
        for name in red_tests(log.read_text(encoding="utf-8", errors="replace"))
    ]
    rows: dict[str, list[Row]] = {}
    for path in sorted(out.glob("*-*.json")):
        measured = [row for row in read_figures(path) if "--toy" not in row["command"]]
        rows.setdefault(path.name.partition("-")[0], []).extend(measured)
    targets = []
    for target in TARGETS:
        value = target.measured(rows.get(target.benchmark, []))
        reached = target.reached(value)
        targets.append(
            {"what": target.what, "wanted": target.wanted(), "value": value, "reached": reached}
        )
    parts = [asdict(one) for one in done]
    content = {"parts": parts, "red_tests": red, "targets": targets}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    (out / "summary.txt").write_text(_text(done, red, targets), encoding="utf-8")


def _text(done: Sequence[Done], red: Sequence[str], targets: Sequence[dict[str, Any]]) -> str:
    lines = ["parts", *(f"  {one.text()}" for one in done)]
    lines += [f"tests that failed: {len(red)}", *(f"  {name}" for name in red)]
    lines.append("targets")
    for target in targets:
        value, words = target["value"], {True: "reached", False: "MISSED", None: "not measured"}
        shown = "" if value is None else f" {value:,.4g}"
        line = f"  {target['what']}:{shown} ({target['wanted']}), {words[target['reached']]}"
        lines.append(line)
    return "\n".join(lines) + "\n"
