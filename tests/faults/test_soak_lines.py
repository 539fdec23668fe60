from __future__ import annotations

import json

from tests.faults.soak_lines import errors_said


def said(name: str, **facts: object) -> str:
    return f"{name}: {json.dumps(facts)}"


def test_errors_and_tracebacks_are_counted_by_what_they_say_and_by_role() -> None:
    trace = "Traceback (most recent call last):\n  File ...\nKeyError: 'x'"
    lines = [
        said("prefill-0", level="info", event="ready"),
        said("prefill-0", level="warning", event="lost decode node decode-1"),
        said("prefill-0", level="error", event="another incarnation has registered; this one ends"),
        said("prefill-0", level="error", event="blocks could not be packed"),
        said("prefill-1", level="error", event="blocks could not be packed"),
        said("gateway", level="error", event="unexpected error", exception=trace),
        said("gateway-1", level="warning", event="odd", exception=trace),
    ]
    assert errors_said(lines) == {
        "prefill: error: blocks could not be packed": 2,
        "gateway: error: unexpected error KeyError: 'x'": 1,
        "gateway: warning: odd KeyError: 'x'": 1,
    }


def test_what_is_no_line_of_a_program_counts_and_what_the_supervisor_notes_does_not() -> None:
    lines = [
        "decode-0: Fatal Python error: Segmentation fault",
        "decode-0: ",
        "prefill-0: [W1201 CudaIPCTypes.cpp:16] Producer process has been terminated before all "
        "shared CUDA tensors released. See Note [Sharing CUDA tensors]",
        "decode-0: {'event': 'died', 'exit_code': -9}",
    ]
    assert errors_said(lines) == {"decode: Fatal Python error: Segmentation fault": 1}
