"""A short run of `tests/faults.py`."""

from tests.faults import Campaign


def test_kills_and_refused_writes_leave_no_trace(tmp_path):
    campaign = Campaign(tmp_path)
    campaign.kill(3)
    campaign.refuse_writes(4)
    campaign.cut_writes(1)
    assert campaign.tally == {
        "kills": 3,
        "runs that ended with the undisturbed run's bytes": campaign.tally[
            "runs that ended with the undisturbed run's bytes"
        ],
        "writes refused, ended in one message": 4,
        "runs with writes cut in their middle": 1,
    }
