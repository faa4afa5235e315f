"""The curve of a run: lines of `log.jsonl`, what they say, their picture.

In: held-out numbers as they are measured. Out: whether the curve is flat or rises, `curve.png`.
Not here: measuring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_stain.errors import ConfigError
from wsi_stain.train.plot import Axes, draw_lines

__all__ = ["Curve", "Row", "gain"]

LOG = "log.jsonl"
PICTURE = "curve.png"
RISE_FRACTION = 0.01
RISE_MEASURES = 2
# Held-out numbers of which more is better, by stage; of all others less is.
MORE_IS_BETTER = {"mine": ("nats_",), "refine": ("sure_",)}
# Those that only describe: a student's sharpness and share of brown should be the teacher's.
NEITHER = ("sharpness", "dab")


@dataclass(frozen=True)
class Row:
    """One measure.

    Attributes
    ----------
    samples
        Seen so far.
    seconds
        Spent in steps so far.
    loss
        Mean training loss since the measure before; none where no step lies between.
    held_out
        Numbers of the averaged weights, by name.
    """

    samples: int
    seconds: float
    loss: float | None
    held_out: dict[str, float]

    def to_json(self) -> str:
        """One line of the log."""
        row: dict[str, Any] = {
            "samples": self.samples,
            "seconds": round(self.seconds, 1),
            "loss": None if self.loss is None else round(self.loss, 5),
            "held_out": {name: round(value, 5) for name, value in self.held_out.items()},
        }
        return json.dumps(row)


def gain(before: Row, after: Row, stage: str) -> float:
    """Compute the mean relative gain of the held-out numbers; positive is better."""
    gains = []
    for name, old in before.held_out.items():
        if name.startswith(NEITHER):
            continue
        sense = 1.0 if name.startswith(MORE_IS_BETTER.get(stage, ("\0",))) else -1.0
        gains.append(sense * (after.held_out[name] - old) / max(abs(old), 1e-9))
    return sum(gains) / len(gains) if gains else 0.0


@dataclass
class Curve:
    """All measures of a run folder, also of earlier starts.

    Attributes
    ----------
    folder
        Run folder.
    stage
        Tells which way is better.
    rows
        By samples, one per number of samples.
    """

    folder: Path
    stage: str
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, stage: str, samples: int) -> Curve:
        """Read the log of a run that goes on from `samples`; what a lost stretch wrote is left out.

        Raises
        ------
        ConfigError
            A line is damaged.
        """
        path = folder / LOG
        rows: dict[int, Row] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = Row(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}, line {number} is damaged: {error}.", hint="Remove that line."
                ) from error
            # The last measure of a run, and the first of the next, say the same twice.
            kept = rows.get(row.samples)
            rows[row.samples] = row if kept is None or kept.loss is None else kept
        return cls(folder, stage, [rows[n] for n in sorted(rows) if n <= samples])

    def add(self, row: Row) -> None:
        """Append a measure to the log, and draw the curve anew."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
        self.rows = [*(r for r in self.rows if r.samples != row.samples), row]
        self.draw()

    def is_flat(self, gain_fraction: float, measures: int) -> bool:
        """Tell whether none of the last `measures` gained `gain_fraction` on the one before them.

        False while there are too few measures, and where `gain_fraction` is 0.
        """
        if gain_fraction <= 0.0 or len(self.rows) <= measures:
            return False
        reference, recent = self.rows[-measures - 1], self.rows[-measures:]
        return max(gain(reference, row, self.stage) for row in recent) < gain_fraction

    def rise(self) -> Row | None:
        """Give the best measure, if the last two lie after it and the last is 1 % worse."""
        if len(self.rows) <= RISE_MEASURES:
            return None
        best = 0
        for i, row in enumerate(self.rows):
            if gain(self.rows[best], row, self.stage) > 0.0:
                best = i
        fell = gain(self.rows[best], self.rows[-1], self.stage) < -RISE_FRACTION
        return self.rows[best] if fell and len(self.rows) - 1 - best >= RISE_MEASURES else None

    def draw(self) -> None:
        """Write `curve.png`: training loss and held-out numbers against samples."""
        losses = [(row.samples, row.loss) for row in self.rows if row.loss is not None]
        lines: dict[str, Sequence[tuple[float, float]]] = {"training loss": losses}
        for name in self.rows[-1].held_out if self.rows else ():
            lines[name] = [(r.samples, r.held_out[name]) for r in self.rows if name in r.held_out]
        last = self.rows[-1].samples if self.rows else 0
        axes = Axes(
            f"stage {self.stage}: held-out after {last:,} samples", "samples", "value", True
        )
        draw_lines(lines, axes).save(self.folder / PICTURE)
