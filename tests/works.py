"""The table of what works: each row is the mark of a test that shows it, and ``docs/what-works.md`` is made of them.

::

    @works("Optimizers", "Adagrad")
    def test_...

    LBFGS = refused("Optimizers", "LBFGS", says="LBFGS needs the whole gradient")

    @LBFGS
    def test_...
        LBFGS.check(str(error))

``python tests/works.py`` writes the page. A refusal's test fails unless it has checked the sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "what-works.md"
TABLES = {
    "Model kinds": "Models that are sharded as they are.",
    "Training loops": "What a loop, a callback or a `training_step` may do.",
    "Optimizers": "",
    "Ways to compile": "More in [](guide/compile.md).",
    "Savers": "What writes weights and training states, and what reads them.",
    "Scripts": "Scripts and trainers that do not know MiCS.",
}
_INTRODUCTION = """# What works

Every row is shown by the test beside it: most of them train the same thing in one process that sees the global batch,
and compare losses and weights. What does not work is refused with the sentence that stands here, before anything goes
wrong. `python tests/works.py` writes this page, and the suite fails where it and the tests differ.
"""
ROWS: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()  # what a session has collected
_Test = TypeVar("_Test", bound=Callable[..., Any])


class Row(NamedTuple):
    """A row of the page.

    Attributes:
        table: Its table, of ``TABLES``.
        name: What is used, as a user would say it.
        says: The sentence by which it is refused; empty if it works.
        test: The test that shows it, from the folder of the tests.
    """

    table: str
    name: str
    says: str
    test: str

    def __str__(self) -> str:
        outcome = f"refused: {self.says}" if self.says else "works"
        return f"| {_cell(self.name)} | {_cell(outcome)} | `{self.test}` |"


def _cell(text: str) -> str:
    parts = text.replace("|", "\\|").split("`")  # every second one is code, in which a backslash is shown
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_") for part in parts[::2]]
    return "`".join(parts)


def works(table: str, name: str) -> pytest.MarkDecorator:
    """Marks a test that shows that something works; also a parameter, in ``pytest.param(..., marks=...)``."""
    assert table in TABLES, f"no table {table!r}"
    return pytest.mark.works(table, name)


class Refusal:
    """Something that is refused in words.

    Args:
        table: Its table.
        name: What it is.
        says: The sentence that users see, or a part of it.

    Attributes:
        mark: Marks the test that shows it.
    """

    def __init__(self, table: str, name: str, says: str) -> None:
        assert table in TABLES, f"no table {table!r}"
        self.says, self.was_checked = says, False
        self.mark = pytest.mark.works(table, name, refusal=self)

    def __call__(self, test: _Test) -> _Test:
        return self.mark(test)  # type: ignore[no-any-return]

    def check(self, message: str) -> None:
        """Checks that a message has the sentence."""
        self.was_checked = True
        assert " ".join(self.says.split()) in " ".join(message.split()), message


refused = Refusal


def rows_of(items: Iterable[pytest.Item]) -> list[Row]:
    """Returns the rows that tests show, each once for a test function, in the order of the page."""
    found = set()
    for item in items:
        path, _, name = item.nodeid.partition("::")
        test = f"{Path(path).name}::{name.partition('[')[0]}"
        for mark in item.iter_markers("works"):
            refusal = mark.kwargs.get("refusal")
            found.add(Row(*mark.args, "" if refusal is None else refusal.says, test))
    tables = list(TABLES)
    return sorted(found, key=lambda row: (tables.index(row.table), row.name.lower(), row.test))


@contextmanager
def checked_refusals(item: pytest.Item) -> Iterator[None]:
    """Fails a test that shows a refusal and does not check its sentence."""
    refusals = [mark.kwargs["refusal"] for mark in item.iter_markers("works") if "refusal" in mark.kwargs]
    for refusal in refusals:
        refusal.was_checked = False
    yield
    for refusal in refusals:
        assert refusal.was_checked, f"{item.name} did not check the sentence {refusal.says!r}"


def page_of(rows: Iterable[Row]) -> str:
    """Returns the page."""
    rows, parts = list(rows), [_INTRODUCTION]
    for table, text in TABLES.items():
        own = [str(row) for row in rows if row.table == table]
        if own:
            parts += [f"## {table}\n", *([f"{text}\n"] if text else []), "| | | shown by |\n| --- | --- | --- |"]
            parts.append("\n".join(own) + "\n")
    return "\n".join(parts)


class _Collector:
    rows: tuple[Row, ...] = ()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.rows = tuple(rows_of(items))


def main() -> int:
    collector = _Collector()
    outcome = pytest.main(["--collect-only", "-qq", "--no-summary", str(TESTS)], plugins=[collector])
    if outcome == pytest.ExitCode.OK:
        PAGE.write_text(page_of(collector.rows))
        print(f"{PAGE.name}: {len(collector.rows)} rows")
    return int(outcome)


if __name__ == "__main__":
    # Under its own name, so that tests and this script share the class of marks.
    sys.path.insert(0, str(TESTS))
    from works import main as run

    sys.exit(run())
