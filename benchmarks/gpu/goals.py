"""What the results say about the goals: geo-means, the worst cells, and each goal with its number, met or missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import measure
from benchmarks.gpu.plan import SAMPLE
from benchmarks.gpu.task import OK, Result

Results = Mapping[str, Result]
_ROOF = 1.02
_TRAINING_ROWS = 2048
# a group of layers, whether K -> N is of it, and the least factor over PEFT as shipped
_OVER_PEFT: tuple[tuple[str, Callable[[int, int], bool], float], ...] = (
    ("up to 4096x4096", lambda K, N: max(K, N) <= 4096, 2.0),
    ("4096<->14336", lambda K, N: {K, N} == {4096, 14336}, 1.6),
    ("8192<->28672", lambda K, N: {K, N} == {8192, 28672}, 1.3),
)
_PLANE, _TRAINING = 120, 48  # cells of a whole plane, and of its rows from 2048 on


@dataclass(frozen=True)
class Goal:
    """One goal.

    ``value`` is None where nothing was measured; ``count`` says over how much, ``expected`` how much a whole run has.
    """

    name: str
    wanted: str
    value: float | int | None
    met: bool | None
    count: int
    expected: int = 0
    note: str = ""

    def row(self) -> dict[str, str]:
        """For a table."""
        shown = "-" if self.value is None else f"{self.value:.3f}" if isinstance(self.value, float) else str(self.value)
        verdict = "" if self.met is None else "met" if self.met else "MISSED"
        if self.value is None:
            verdict = "not measured"
        elif self.met and self.count < self.expected:
            verdict = "met so far"
        row = {"goal": self.name, "wanted": self.wanted, "found": shown, "": verdict}
        return row | {
            "over": f"{self.count} of {self.expected}" if self.expected else str(self.count),
            "note": self.note,
        }


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def cells(results: Results, **about: Any) -> list[Result]:
    """The timed product cells whose description has these values."""
    return [
        result
        for key, result in results.items()
        if key.startswith("cell ") and result["status"] == OK and about.items() <= result["about"].items()
    ]


def ratio(result: Result, phase: str, name: str = "peftkern") -> float | None:
    """A variant's ratio to the frozen products in a phase; None where it was not timed."""
    found = result["times"].get(phase, {}).get(name)
    return None if found is None else found["ratio"]


def all_goals(products: Results, models: Results) -> list[Goal]:
    """Every goal, in the order in which they were set."""
    found = []
    for adapter in ("bf16", "fp32"):
        plane = cells(products, r=16, p=0.05, dtype="bf16", adapter=adapter)
        training = [cell for cell in plane if cell["about"]["M"] >= _TRAINING_ROWS]
        found += [
            _mean(f"forward, {adapter} adapters", training, "forward", 1.03),
            _mean(f"forward+backward, {adapter} adapters", training, "forward+backward", 1.06),
            _square(plane, adapter),
            _roofline(f"within 2 % of its roofline, {adapter} adapters", training),
        ]
    plane = cells(products, r=16, p=0.05, dtype="bf16")
    others = [cell for cell in cells(products) if cell not in plane]
    found += [_no_loss("no cell slower than the best other: plane", plane, 2 * _PLANE)]
    found += [_no_loss("no cell slower than the best other: other cells", others, SAMPLE)]
    found += _over_peft(models)
    return [*found, *_decode(products), _step(models)]


def _mean(name: str, found: list[Result], phase: str, wanted: float) -> Goal:
    values = [value for cell in found if (value := ratio(cell, phase)) is not None]
    mean = geometric_mean(values)
    met = None if mean is None else mean <= wanted
    note = f"worst {max(values):.3f}" if values else ""
    return Goal(f"{name}, geo-mean M >= {_TRAINING_ROWS}", f"<= {wanted}", mean, met, len(values), _TRAINING, note)


def _square(plane: list[Result], adapter: str) -> Goal:
    found = [c for c in plane if (c["about"]["M"], c["about"]["K"], c["about"]["N"]) == (8192, 4096, 4096)]
    value = ratio(found[0], "forward") if found else None
    return Goal(
        f"forward at 4096x4096, M=8192, {adapter} adapters", "<= 1.015", value,
        None if value is None else value <= 1.015, len(found), 1,
    )  # fmt: skip


def over_roofline(cell: Result, phase: str) -> float | None:
    """How far a cell's ratio is above its roofline's, as a factor."""
    own = ratio(cell, phase)
    return None if own is None else own / cell["roofline"][phase]["ratio"]


def _roofline(name: str, found: list[Result]) -> Goal:
    factors = [f for cell in found for phase in cell["times"] if (f := over_roofline(cell, phase)) is not None]
    missed = sum(factor > _ROOF for factor in factors)
    worst = max(factors, default=None)
    note = f"{missed} of {len(factors)} above"
    return Goal(name, f"<= {_ROOF}", worst, None if worst is None else not missed, len(factors), 2 * _TRAINING, note)


def _no_loss(name: str, found: list[Result], expected: int) -> Goal:
    losers = sum("peftkern" in _losers(cell) for cell in found)
    graphs = sum("peftkern graph" in _losers(cell) for cell in found)
    absent = sum(bool(cell.get("excluded")) for cell in found)
    met = None if not found else not losers and not graphs
    note = f"and {graphs} as CUDA graphs; {absent} lack a competitor"
    noises = [noise for cell in found for times in cell["times"].values() if (noise := measure.noise(times))]
    note += f"; frozen over itself up to {max(noises):.3f}, and no smaller loss counts" if noises else ""
    return Goal(name, "0", losers if found else None, met, len(found), expected, note)


def _losers(cell: Result) -> set[str]:
    """Which of ours are slower than another somewhere in a cell."""
    return {loss["own"] for phase in cell["losses"].values() for loss in phase}


def _over_peft(models: Results) -> list[Goal]:
    goals = []
    for name, belongs, wanted in _OVER_PEFT:
        for kind, other in (("layer", "peft"), ("layer compiled", "peft compiled")):
            values = []
            for key, result in models.items():
                at_hand = key.startswith((f"{kind} llama", f"{kind} qwen")) and result["status"] == OK
                if at_hand and belongs(result["about"]["K"], result["about"]["N"]):
                    times = result["times"]["forward+backward"]
                    values.append(times[other]["ratio"] / times["peftkern"]["ratio"])
            least = min(values, default=None)
            met = None if least is None else least >= wanted
            goals.append(
                Goal(f"over {other}, {name}", f">= {wanted}", least, met, len(values), note="the least of them")
            )
    return goals


def _decode(products: Results) -> list[Goal]:
    found = [r for key, r in products.items() if key.startswith("decode ") and r["status"] == OK]
    eager = [r["times"]["peftkern"]["ratio"] for r in found]
    graph = [r["graphs"]["peftkern graph"]["ratio"] for r in found if "peftkern graph" in r.get("graphs", {})]
    launches = [sum(r["kernels"].values()) for r in found if r.get("kernels")]
    goals = []
    for name, values in (("decode over merged weights", eager), ("the same as CUDA graphs", graph)):
        worst, mean = max(values, default=None), geometric_mean(values)
        note = "" if mean is None else f"worst; geo-mean {mean:.3f}"
        goals.append(Goal(name, "<= 1.05", worst, None if worst is None else worst <= 1.05, len(values), 36, note))
    most = max(launches, default=None)
    return [
        *goals,
        Goal("launches of a decode call", "1", most, None if most is None else most == 1, len(launches), 36),
    ]


def _step(models: Results) -> Goal:
    result = models.get("model p=0.05", {})
    times = result.get("times", {})
    value = times["peftkern"]["ratio"] if "peftkern" in times else None
    note = f"PEFT {times['peft']['ratio']:.3f}" if "peft" in times else ""
    return Goal(
        "training step of the small Llama over frozen", "no goal", value, None, int(value is not None), note=note
    )


def worst(products: Results, count: int = 12) -> list[dict[str, str]]:
    """The cells that are furthest above their rooflines, either phase."""
    rows = []
    for cell in cells(products):
        for phase in cell["times"]:
            factor = over_roofline(cell, phase)
            if factor is not None:
                rows.append((factor, phase, cell))
    rows.sort(key=lambda row: -row[0])
    return [
        {
            "cell": title(cell["about"]), "phase": phase, "x frozen": f"{ratio(cell, phase):.3f}",
            "roofline": f"{cell['roofline'][phase]['ratio']:.3f}", "above": f"{factor:.3f}",
            "choice": _choice(cell, "forward" if phase == "forward" else "backward"),
        }
        for factor, phase, cell in rows[:count]
    ]  # fmt: skip


def _choice(cell: Result, direction: str) -> str:
    return cell["choice"].get(direction) or cell["choice"].get("backend", "")


def title(about: Mapping[str, Any]) -> str:
    """A cell in few characters."""
    return f"{about['layer']} M={about['M']} r={about['r']} p={about['p']:g} {about['adapter']}"


def losing(products: Results) -> list[dict[str, str]]:
    """Every loss to another variant, the largest first."""
    rows = [
        (loss["ratio"], title(cell["about"]), phase, loss)
        for cell in cells(products)
        for phase, found in cell["losses"].items()
        for loss in found
    ]
    rows.sort(key=lambda row: -row[0])
    return [
        {
            "cell": name,
            "phase": phase,
            "own": loss["own"],
            "than": loss["than"],
            "ratio": f"{value:.3f}",
            "us": f"{loss['us']}",
        }
        for value, name, phase, loss in rows
    ]
