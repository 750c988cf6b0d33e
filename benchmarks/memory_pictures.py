"""Draw the pictures of docs/explanation/memory.md. The rules themselves are asked, so the pictures cannot lag behind them.

python benchmarks/memory_pictures.py [docs/images]
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from slmsam2_cli.model.memory.fifo import Fifo
from slmsam2_cli.model.memory.interface import MemoryPolicy, MemoryScores, ReadContext
from slmsam2_cli.model.memory.selfsort import SelfSort
from slmsam2_cli.model.memory.shortlong import ShortLong, ShortLongSelfSort

CELL, GAP, LEFT, TOP, LINE = 38, 5, 232, 62, 66  # px
ANNOTATED, LONG, SHORT, BOTH, HERE, IDLE = "#e07b28", "#4a90d9", "#58a55c", "url(#both)", "#ffffff", "#e4e6ea"
INK, QUIET = "#24292f", "#6a737d"


@dataclass
class Picture:
    """An SVG under construction; x and y in px from the upper left corner."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, fill: str, text: str = "", dashed: bool = False, width: float = CELL, ink: str = "") -> None:
        stroke = f'stroke="{INK}" stroke-dasharray="3 3"' if dashed else f'stroke="{QUIET}" stroke-width="0.5"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{CELL}" rx="4" fill="{fill}" {stroke}/>')
        dark = ink or (INK if fill in (HERE, IDLE) else "#ffffff")
        self.text(x + width / 2, y + CELL / 2 + 4.5, text, dark, "middle")

    def text(self, x: float, y: float, text: str, ink: str = INK, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        if text:
            self.parts.append(f'<text x="{x:g}" y="{y:g}" fill="{ink}" text-anchor="{anchor}"{weight}>{escape(text)}</text>')

    def arc(self, x: float, to: float, y: float, ink: str) -> None:
        """From the upper edge of one slice to that of another, with a head at the second."""
        rise = min(30.0, 8 + abs(to - x) / 9)
        self.parts.append(
            f'<path d="M {x:g} {y:g} C {x:g} {y - rise:g}, {to:g} {y - rise:g}, {to:g} {y - 1:g}" fill="none" stroke="{ink}" '
            f'stroke-width="1.4" marker-end="url(#head)"/>'
        )

    def svg(self, title: str) -> str:
        stripes = f'<rect width="8" height="8" fill="{LONG}"/><rect width="4" height="8" fill="{SHORT}"/>'
        definitions = (
            f'<pattern id="both" width="8" height="8" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">{stripes}</pattern>'
            f'<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{QUIET}"/></marker>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'font-family="system-ui, sans-serif" font-size="13" role="img">\n<title>{escape(title)}</title>\n'
            f'<defs>{definitions}</defs>\n<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def x_of(place: int) -> float:
    return LEFT + place * (CELL + GAP)


def legend(picture: Picture, y: float, items: Iterable[tuple[str, str]]) -> None:
    x = float(LEFT)
    for fill, text in items:
        picture.parts.append(f'<rect x="{x:g}" y="{y:g}" width="14" height="14" rx="3" fill="{fill}" stroke="{QUIET}" stroke-width="0.5"/>')
        picture.text(x + 20, y + 11.5, text, QUIET)
        x += 36 + 6.7 * len(text)


def made_scores(angles: Mapping[int, float], confidence: Mapping[int, float], query: float) -> MemoryScores:
    """Make scores of objects that are points on a circle: similarity is the cosine of the angle between them (degrees)."""

    def cosine(one: float, other: float) -> float:
        return math.cos(math.radians(one - other))

    object_score = {s: 6.0 if confidence[s] > 0.05 else -6.0 for s in angles}
    pairwise = {(a, b): cosine(angles[a], angles[b]) for a in angles for b in angles}
    return MemoryScores(object_score, dict(confidence), {s: cosine(a, query) for s, a in angles.items()}, pairwise)


def policies() -> str:
    """What each policy reads for slice 12 of a forward pass, with slice 2 annotated."""
    annotated, current, slices = 2, 12, 15
    angles = {2: 0.0, 3: 15.0, 4: 50.0, 5: 54.0, 6: 25.0, 7: 75.0, 8: 40.0, 9: 30.0, 10: 50.0, 11: 52.0}
    confidence = {2: 1.0, 3: 0.9, 4: 0.8, 5: 0.9, 6: 0.9, 7: 0.8, 8: 0.3, 9: 0.9, 10: 0.0, 11: 0.8}
    context = ReadContext(current, 1, (annotated,), range(annotated + 1, current), slices, made_scores(angles, confidence, query=20.0))
    rows: list[tuple[str, str, MemoryPolicy]] = [
        ("fifo", "SAM 2", Fifo()),
        ("fifo, object score gate", "slice 10 is empty: not read", Fifo(object_score_gate=True)),
        ("shortlong", "SLM-SAM 2", ShortLong()),
        ("selfsort", "MedSAM-2 (reads 3 of 6 here)", SelfSort(nearest=3)),
        ("shortlong+selfsort", "both", ShortLongSelfSort(nearest=3)),
    ]
    picture = Picture(int(x_of(slices)) + 20, TOP + LINE * len(rows) + 46)
    picture.text(16, 24, "Forward pass, slice 12 is segmented next; slice 2 was annotated. Numbers are temporal rows.", bold=True)
    for t in range(slices):
        picture.text(x_of(t) + CELL / 2, TOP - 10, str(t), QUIET, "middle")
    for n, (name, note, policy) in enumerate(rows):
        y = TOP + n * LINE
        picture.text(16, y + 17, name, bold=True)
        picture.text(16, y + 34, note, QUIET)
        strip(picture, y, policy, context, slices)
    legend(
        picture,
        TOP + LINE * len(rows) + 6,
        [(ANNOTATED, "annotated"), (LONG, "long memory"), (BOTH, "long and short"), (SHORT, "short"), (IDLE, "segmented, not read")],
    )
    return picture.svg("Which slices each memory policy reads")


def strip(picture: Picture, y: float, policy: MemoryPolicy, context: ReadContext, slices: int) -> None:
    """What one policy reads: a box per slice with its temporal row."""
    reads = policy.read(context)
    long, short = dict(reads[0].spatial), dict(reads[1].spatial) if len(reads) > 1 else {}
    for t in range(slices):
        if t == context.slice:
            picture.box(x_of(t), y, HERE, "?", dashed=True)
        elif t in context.conditioning:
            picture.box(x_of(t), y, ANNOTATED, str(long[t]))
        elif t in long or t in short:
            fill = BOTH if t in long and t in short else LONG if t in long else SHORT
            picture.box(x_of(t), y, fill, str(long.get(t, short.get(t))))
        else:
            picture.box(x_of(t), y, IDLE if t in context.tracked else HERE)


def bank() -> str:
    """Which slices enter the bank, stay and are read."""
    angles = {0: 0.0, 1: 5.0, 2: 30.0, 3: 34.0, 4: 58.0, 5: 75.0, 6: 40.0, 7: 45.0, 8: -10.0}
    confidence = {0: 1.0, 1: 0.9, 2: 0.8, 3: 0.9, 4: 0.9, 5: 0.8, 6: 0.3, 7: 0.9, 8: 0.7}
    scores, current = made_scores(angles, confidence, query=20.0), 9
    context = ReadContext(current, 1, (0,), range(1, current), 16, scores)
    rule = SelfSort(capacity=4, nearest=2)
    members = rule.members(context)
    read = [s for s, _ in rule.read(context)[0].spatial]
    picture = Picture(int(x_of(current + 1)) + 40, TOP + 5 * LINE + 30)
    picture.text(LEFT, 24, "A bank of 4, of which 2 are read (defaults: 16 and 6)", bold=True)
    for t in range(current + 1):
        picture.text(x_of(t) + CELL / 2, TOP - 10, str(t), QUIET, "middle")
    rows = [
        ("written", "predicted IoU, from 0.5", {t: f"{confidence[t]:.1f}" for t in range(current)}, set(range(current))),
        (
            "",
            "similarity to slice 0, from 0.5",
            {t: f"{scores.pairwise_similarity[t, 0]:.2f}" for t in range(current)},
            set(range(current)),
        ),
        ("admitted", "present, confident, similar", {}, {0, *(s for s in context.tracked if rule.admits(s, context))}),
        ("kept", "the 4 most different", {}, {0, *members}),
        ("read", "the 2 most similar to slice 9", {t: f"{scores.query_similarity[t]:.2f}" for t in (0, *members)}, set(read)),
    ]
    for n, (name, note, numbers, on) in enumerate(rows):
        y = TOP + n * LINE
        picture.text(16, y + 17, name, bold=True)
        picture.text(16, y + 34, note, QUIET)
        for t in range(current):
            fill = ANNOTATED if t == 0 else LONG if t in on and n > 1 else IDLE
            picture.box(x_of(t), y, fill, numbers.get(t, ""))
        picture.box(x_of(current), y, HERE, "?" if n == len(rows) - 1 else "", dashed=True)
    legend(picture, TOP + LINE * len(rows) - 2, [(ANNOTATED, "annotated: never leaves, always read"), (LONG, "in"), (IDLE, "out")])
    return picture.svg("Which slices enter the self-sorting bank, stay and are read")


def passes() -> str:
    """What the first slice of the backward pass reads without and with shared memory."""
    annotated, slices = 5, 12
    written = range(annotated + 1, slices)
    rows = [("not shared", "default", ()), ("shared_memory", "SAM 2's predictor", tuple(written))]
    picture = Picture(int(x_of(slices)) + 20, TOP + 2 * (LINE + 44) + 30)
    picture.text(LEFT, 24, "The forward pass from slice 5 is done; the backward pass begins with slice 4 (fifo)", bold=True)
    for t in range(slices):
        picture.text(x_of(t) + CELL / 2, TOP - 10, str(t), QUIET, "middle")
    for n, (name, note, known) in enumerate(rows):
        y = TOP + 28 + n * (LINE + 44)
        picture.text(16, y + 17, name, bold=True)
        picture.text(16, y + 34, note, QUIET)
        (memory_read,) = Fifo().read(ReadContext(annotated - 1, -1, (annotated,), known, slices))
        read = dict(memory_read.spatial)
        for t in range(slices):
            fill = ANNOTATED if t == annotated else LONG if t in read else IDLE if t in written else HERE
            picture.box(x_of(t), y, fill, "?" if t == annotated - 1 else str(read.get(t, "")), dashed=t == annotated - 1)
        for t in read:
            picture.arc(x_of(t) + CELL / 2, x_of(annotated - 1) + CELL / 2, y, QUIET)
    legend(picture, picture.height - 24, [(ANNOTATED, "annotated"), (LONG, "read"), (IDLE, "segmented forward, not read")])
    return picture.svg("What the first slice of the backward pass reads")


PICTURES = {"memory-policies.svg": policies, "memory-bank.svg": bank, "memory-passes.svg": passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/images"))
    folder = parser.parse_args().folder
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
