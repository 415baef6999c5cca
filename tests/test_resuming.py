"""A training that is killed in the middle of an epoch goes on at the sample."""

from __future__ import annotations

from pathlib import Path

import pytest
from joined_tools import LENGTHS, rows_of
from script_tools import run_python
from works import works

SCRIPT = Path(__file__).parent / "scripts" / "resuming.py"


@works(
    "Savers",
    "A loop of one's own: `save_checkpoint(dataloaders=...)`, killed in mid-epoch, resumes at each rank's sample",
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_training_sees_each_sample_once(tmp_path: Path, workers: int) -> None:
    paths = {"PYTHONPATH": f"{SCRIPT.parents[1]}:{SCRIPT.parents[2]}"}
    # Two checkpoints lie before each end: where all ranks have data, and where one or three have run out.
    for kill_at in (3, 9, 15) if workers == 0 else (9,):
        assert run_python(tmp_path, SCRIPT, workers, kill_at, ranks=4, environment=paths).returncode != 0
        assert not (tmp_path / "seen-0").exists()
    ended = run_python(tmp_path, SCRIPT, workers, 0, ranks=4, environment=paths)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for rank, length in enumerate(LENGTHS):
        epochs = [0, 0 if workers else 1]  # workers get the data set as it was at first
        expected = [round(rows_of(rank, index, epoch).sum().item(), 4) for epoch in epochs for index in range(length)]
        assert (tmp_path / f"seen-{rank}").read_text() == str(expected)
