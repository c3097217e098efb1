"""Floating point operations of the decoder, operator by operator, and the ledger that keeps a budget."""

from flops.ledger import BudgetExceeded, Ledger, LedgerError
from flops.model import CONVENTIONS, Op, forward, training_step

__all__ = ["CONVENTIONS", "BudgetExceeded", "Ledger", "LedgerError", "Op", "forward", "training_step"]
