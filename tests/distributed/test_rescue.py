"""Two processes under either framework skip the same steps, and go back to the same weights."""

from __future__ import annotations

from pathlib import Path

import gfs_core as gfs
from tests.bitwise import assert_same
from tests.distributed.launch import launch
from tests.distributed.rescue_run import BAD, BREAKS, STEPS, train


def test_both_processes_do_the_same(tmp_path: Path) -> None:
    for mode, ranks in launch(train, tmp_path, 2, "lightning", "trainer").items():
        kept, others = (rank["kept"] for rank in ranks)
        assert len(kept) == STEPS
        for step in {*range(STEPS)} - {*range(BREAKS + 1, BREAKS + 4)}:
            assert_same(kept[step], others[step])
            assert all(p.isfinite().all() for p in kept[step])
        assert_same(kept[BAD + 1], kept[BAD])
        assert_same(kept[BREAKS + 4], kept[50])
        said = {m.step: "; ".join(m.reasons) for m in gfs.read_history(tmp_path / mode / "history.jsonl")}
        assert "the step was skipped" in said[BAD]
        assert "to the weights of step 50" in said[BREAKS + 3]
