"""The page of what works says what the tests show, and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from works import PAGE, ROWS, TESTS, Row, checked_refusals, page_of, refused, rows_of

REFUSAL = refused("Optimizers", "made up", says="It cannot   work.")


def test_the_page_has_a_row_for_every_marked_test_and_no_other(request: pytest.FixtureRequest) -> None:
    """Of the files that this session collects; where it collects all, the whole page is compared."""
    items = request.config.stash[ROWS]
    collected = {Path(item.nodeid.partition("::")[0]).name for item in items}
    known = {path.name for path in TESTS.rglob("test_*.py")}
    shown = {line for line in PAGE.read_text().splitlines() if "::" in line}
    mine = {line for line in shown if line.rpartition("| `")[2].partition("::")[0] in collected}
    missing = "run python tests/works.py"
    assert {str(row) for row in rows_of(items)} == mine, missing
    assert not {line for line in shown if line.rpartition("| `")[2].partition("::")[0] not in known}, missing
    if known <= collected:
        assert page_of(rows_of(items)) == PAGE.read_text(), missing


def test_no_name_stands_twice_with_different_outcomes(request: pytest.FixtureRequest) -> None:
    outcomes: dict[tuple[str, str], set[str]] = {}
    for row in rows_of(request.config.stash[ROWS]):
        outcomes.setdefault((row.table, row.name), set()).add(row.says)
    assert not {name for name, found in outcomes.items() if len(found) > 1}


def test_a_refusal_compares_the_sentence() -> None:
    with pytest.raises(AssertionError, match="something else"):
        REFUSAL.check("something else")
    REFUSAL.check("Adagrad: It cannot\nwork. Use another.")


def test_a_page_shows_outcomes_and_escapes_what_markdown_reads() -> None:
    rows = [
        Row("Optimizers", "a_b", "", "test_x.py::test_y"),
        Row("Savers", "s|t", "No <x>.", "test_x.py::test_z"),
    ]
    lines = page_of(rows).splitlines()
    assert "| a\\_b | works | `test_x.py::test_y` |" in lines
    assert "| s\\|t | refused: No &lt;x>. | `test_x.py::test_z` |" in lines
    assert "## Model kinds" not in lines


class Item:
    name = "test_lazy"

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [REFUSAL.mark.mark]


@pytest.mark.parametrize("checks", [True, False])
def test_a_test_of_a_refusal_that_checks_nothing_fails(checks: bool) -> None:
    item: Any = Item()
    with nullcontext() if checks else pytest.raises(AssertionError, match="did not check"), checked_refusals(item):
        if checks:
            REFUSAL.check("It cannot work.")
