"""The table of faults in README.md names tests that exist, for every fault that has to have some."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
#: Faults that every version must answer.
ANSWERED = {*range(1, 9), *range(11, 15), 16, *range(19, 26), 27, 28, 29, *range(33, 37), 39, 40, 41, *range(43, 49)}
ANSWERED |= set(range(52, 57))


def table() -> dict[int, list[str]]:
    """Fault number -> tests that are named for it."""
    text = (TESTS / "faults" / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (\d+)\. .*$", text, flags=re.M)[1:]
    return {
        int(number): re.findall(r"^- `(.+)`$", part, re.M) for number, part in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_fault_that_must_be_answered_has_a_test() -> None:
    found = table()
    assert {number for number in ANSWERED if not found.get(number)} == set()


def test_every_test_that_the_table_names_exists() -> None:
    missing = []
    for name in (name for names in table().values() for name in names):
        file, _, test = name.partition("::")
        path = TESTS / file
        if not path.is_file() or not re.search(rf"^def {re.escape(test)}\(", path.read_text(encoding="utf-8"), re.M):
            missing.append(name)
    assert missing == []
