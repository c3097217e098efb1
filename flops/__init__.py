"""Floating point operations of the decoder, operator by operator, and the ledger that keeps a budget."""

from flops.ledger import BudgetExceeded, Ledger, LedgerError
from flops.model import CONVENTIONS, Op, forward
from flops.training import backward, training_step

__all__ = ["CONVENTIONS", "BudgetExceeded", "Ledger", "LedgerError", "Op", "backward", "forward", "training_step"]
