"""A short run of `tests/faults.py`."""

import pytest

from tests.faults import Campaign


@pytest.mark.slow
def test_kills_and_refused_writes_leave_no_trace(tmp_path):
    campaign = Campaign(tmp_path)
    campaign.kill(2)
    campaign.refuse_writes(3)
    campaign.cut_writes(1)
    faults = ("kills", "writes refused, ended in one message", "runs with writes cut in their middle")
    assert [campaign.tally[fault] for fault in faults] == [2, 3, 1]
