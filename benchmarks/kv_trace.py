"""The marks of `kv_transfer.trace` as a table: a row for each frame, a column for each point."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_transfer.trace import Mark

# s: sender, r: receiver.
POINTS = {
    "s.slot": "slot",
    "s.gather_queued": "queued",
    "s.gathered": "packed",
    "s.posted": "posted",
    "r.header": "header",
    "r.posted": "receive",
    "r.landed": "landed",
    "s.sent": "sent",
    "r.scatter_queued": "queued",
    "r.verified": "verified",
}
MOST_FRAMES = 16


def describe_frames(marks: Sequence[Mark], began: float) -> str:
    """Microseconds after `began`, a moment of the same clock."""
    frames: dict[tuple[int, int], dict[str, float]] = {}
    last = []
    for mark in marks:
        micros = (mark.seconds - began) * 1e6
        if mark.point in POINTS:
            frames.setdefault((mark.layer, mark.position), {})[mark.point] = micros
        else:
            last.append(f"{mark.point} {micros:.0f}")
    lines = ["layer, position".ljust(16) + "".join(name.rjust(10) for name in POINTS.values())]
    shown = sorted(frames.items(), key=lambda item: item[1].get("s.slot", 0.0))
    for place, points in shown[:MOST_FRAMES]:
        cells = (f"{points[p]:.0f}" if p in points else "" for p in POINTS)
        lines.append(f"{place!s:16}" + "".join(cell.rjust(10) for cell in cells))
    if len(shown) > MOST_FRAMES:
        lines.append(f"and {len(shown) - MOST_FRAMES} more frames")
    return "\n".join([*lines, ", ".join(last)])
