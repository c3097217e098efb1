import resource

import pytest

from flops import BudgetExceeded, Ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_debits_add_up_survive_and_are_booked_once(path):
    ledger = Ledger(path, budget=100)
    for step in (0, 1, 2, 2):
        ledger.debit("a", step, 10)
    ledger.debit("b", 0, 25)
    reopened = Ledger(path, budget=100)
    assert reopened.spent == ledger.spent == 55
    assert reopened.by_experiment() == {"a": 30, "b": 25}
    reopened.debit("a", 0, 10)
    assert Ledger(path, budget=100).spent == 55
    with pytest.raises(ValueError, match="step 0 of a is booked at 10 FLOPs, not 11"):
        ledger.debit("a", 0, 11)


def test_a_step_that_would_overspend_is_refused_and_not_booked(path):
    ledger = Ledger(path, budget=25)
    ledger.debit("a", 0, 20)
    with pytest.raises(BudgetExceeded, match=r"step 1 of a needs 6.000e\+00 FLOPs, 5.000e\+00 of 2.500e\+01 are left"):
        ledger.debit("a", 1, 6)
    with pytest.raises(BudgetExceeded, match=r"spent: a 2.000e\+01"):
        ledger.require("b", 6)
    ledger.require("a", 25)  # 20 of them are spent
    assert Ledger(path, budget=25).spent == 20
    ledger.debit("b", 0, 5)  # exactly the rest of the budget
    assert ledger.spent == 25


def test_a_line_torn_by_a_kill_is_cut_off_by_the_next_debit_and_by_no_reader(path):
    Ledger(path, budget=100).debit("a", 0, 10)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    ledger = Ledger(path, budget=100)
    assert path.read_text() == whole + whole[:20]
    ledger.debit("a", 1, 10)
    assert Ledger(path, budget=100).spent == 20


@pytest.mark.parametrize("entry", [("a", 0, 1.5), ("a", 0, -1), ("a", 0.0, 1), (0, 0, 1), ("a", 0, 10**30)])
def test_an_entry_that_could_not_be_read_back_is_not_booked(path, entry):
    ledger = Ledger(path, budget=10**31)
    with pytest.raises(ValueError, match=r"expected a name and two integers"):
        ledger.debit(*entry)
    assert ledger.spent == 0
    assert not path.exists()


@pytest.mark.parametrize("line", [
    "nonsense", "[]", '{"experiment": "a", "step": 0}', '{"experiment": "a", "step": 0, "flops": -1}',
    '{"experiment": "a", "step": 0, "flops": 1, "steps": 2}', '{"experiment": "b", "step": 0, "flops": 1, "steps": 0}',
    '{"experiment": "b", "step": 0, "flops": 1, "steps": 10000000000000}',
])  # fmt: skip
def test_a_damaged_ledger_is_refused(path, line):
    Ledger(path, budget=100).debit("a", 1, 10)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 2: not a ledger entry"):  # the fifth one books a step again
        Ledger(path, budget=100)


def test_a_write_that_fails_leaves_the_file_as_it_was(path):
    """The disk is full after some bytes; the same process tries again later."""
    ledger = Ledger(path, budget=100)
    ledger.debit("a", 0, 10)
    before = path.read_bytes()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match=r"space|large"):
            ledger.debit("a", 1, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_bytes() == before
    assert ledger.spent == 10
    ledger.debit("a", 1, 10)
    assert Ledger(path, budget=100).spent == ledger.spent == 20


@pytest.mark.parametrize("budget", [float("nan"), -1, 10**400, "5"])
def test_a_budget_has_to_be_a_number(path, budget):
    with pytest.raises(ValueError, match="the budget is"):
        Ledger(path, budget)
