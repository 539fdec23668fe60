"""What the tables of a hand-off say, and of what: two processes, a small pool in host memory."""

from __future__ import annotations

from benchmarks.kv_handoffs import Taken, hand_off, last_layer
from benchmarks.kv_pair import Pair, PairOptions, decode_process, run_as_node
from benchmarks.kv_trace import POINTS, frames_of, lines_of
from kv_transfer.trace import TRACE, Mark

NUM_LAYERS = 4
OPTIONS = PairOptions(
    source="cpu",
    target="cpu",
    num_layers=NUM_LAYERS,
    unit_bytes=1 << 20,  # a layer of it is a group of its own
    num_blocks=4,
    slot_bytes=None,
    num_slots=None,
    ucx_tls=None,
    require_transport="any",
)


def taken(*marks: tuple[str, int, float]) -> Taken:
    return Taken(1.0, 1.5, tuple(Mark(point, layer, 0, 1.0 + at) for point, layer, at in marks))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_last_layer_is_timed_from_its_event_and_sent_alone_and_not_before_it() -> None:
    async def main() -> tuple[Taken, Taken]:
        async with Pair(OPTIONS, decode_process, True) as pair:
            TRACE.start()
            lone = await hand_off(pair, 2, 2)  # connects
            return lone, await last_layer(pair, 2, 0.001)

    try:
        lone, layer = run_as_node(main())
    finally:
        TRACE.stop()
    slots = [mark.layer for mark in layer.marks if mark.point == "s.slot"]
    assert NUM_LAYERS - 1 in slots, "it left before its event"
    assert layer.seconds > 0
    for each in (layer, lone):
        last = frames_of(each)[-1]
        assert last["s.slot"] >= 0
        assert last["r.verified"] <= last["r.start"] <= each.seconds * 1e6


def test_a_step_is_the_median_of_its_turns_and_is_empty_where_few_passed_it() -> None:
    [line] = lines_of(
        "tail",
        [
            taken(("s.slot", 0, 10e-6), ("r.start", 0, 90e-6)),
            taken(("s.slot", 0, 30e-6), ("r.start", 0, 70e-6), ("r.header", 0, 60e-6)),
            taken(("s.slot", 0, 11e-6), ("r.start", 0, 71e-6)),
        ],
    )
    label, *values = cells(line)
    assert label == "tail"
    told = dict(zip(POINTS, values, strict=True))
    assert (told["s.slot"], told["r.start"], told["r.header"]) == ("11", "71", "")


def test_of_several_frames_the_first_and_the_last_are_shown_and_the_last_starts_the_node() -> None:
    # The first to be done with, not the first that was seen.
    several = taken(
        ("s.slot", 3, 1e-6), ("s.slot", 0, 5e-6), ("r.verified", 0, 20e-6),
        ("s.slot", 1, 8e-6), ("r.verified", 1, 30e-6), ("r.verified", 3, 50e-6),
        ("r.start", 0, 60e-6),
    )  # fmt: skip
    first, last = (cells(line) for line in lines_of("lone", [several]))
    start, slot = list(POINTS).index("r.start"), list(POINTS).index("s.slot")
    assert first[0] == "lone, first frame"
    assert (first[1:][slot], first[1:][start]) == ("5", "")
    assert last[0] == "lone, last frame"
    assert (last[1:][slot], last[1:][start]) == ("1", "60")
