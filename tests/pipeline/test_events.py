"""What a job reports on the way: events to the caller, notes and the peak memory for the report."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.pipeline.events import Event, Reporter, peak_memory


def test_events_go_to_the_caller_and_notes_are_kept() -> None:
    events: list[Event] = []
    reporter = Reporter(events.append)
    reporter.emit("phase", "reading")
    reporter.note("too little text")
    reporter.emit("matrix", "q_proj", block=2, error=0.5)
    reporter.emit("note", "a layer was left out")
    assert events == [
        Event("phase", "reading"),
        Event("note", "too little text"),
        Event("matrix", "q_proj", block=2, error=0.5),
        Event("note", "a layer was left out"),
    ]
    assert reporter.notes == ["too little text", "a layer was left out"]


def test_notes_are_kept_without_a_caller_that_listens() -> None:
    reporter = Reporter()
    reporter.emit("phase", "reading")
    reporter.note("too little text")
    assert reporter.notes == ["too little text"]


def test_a_note_is_kept_before_the_caller_fails() -> None:
    def fail(_: Event) -> None:
        raise RuntimeError("the screen is gone")

    reporter = Reporter(fail)
    with pytest.raises(RuntimeError, match="the screen is gone"):
        reporter.note("too little text")
    assert reporter.notes == ["too little text"]


def test_fields_that_events_lack_are_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        Reporter().emit("phase", "reading", colour="red")


def test_the_peak_is_in_bytes_and_stays_when_memory_is_given_back() -> None:
    held = np.ones(64 << 20, dtype=np.uint8)
    peak = peak_memory()
    # Python and torch alone take more than 50 MB; in another unit it would be off by a factor of 1024.
    assert 50e6 + held.nbytes < peak < 1e11
    del held
    assert peak_memory() >= peak
