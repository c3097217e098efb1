"""Count the floating point operations of the decoder, operator by operator, and keep a budget in a ledger."""

from flops.ledger import BudgetExceeded, Ledger, LedgerError
from flops.model import CONVENTIONS, Op, forward
from flops.training import backward, training_step

__all__ = ["CONVENTIONS", "BudgetExceeded", "Ledger", "LedgerError", "Op", "backward", "forward", "training_step"]
