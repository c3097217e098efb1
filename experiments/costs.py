"""Print the FLOPs of a training step, operator by operator, in three conventions.

    python -m experiments.costs --model 0.5B --batch 4 --context 512 --rank 8

The dense sizes of Qwen2.5 are built in. Of another checkpoint only the config.json is read. Where it takes a few
seconds, the real code is traced as well, without memory or arithmetic.
"""

import argparse
import math
import re
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.interruption import Interruption

SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
MOST_TRACED = 1_000  # blocks of attention in a forward pass; a few seconds


def options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("--model", default="0.5B", help=f"{', '.join(SIZES)}, tiny, or a checkpoint: a folder or a hub id (default "
        "%(default)s)")  # fmt: skip
    add("--batch", type=int, default=4, help="rows in a batch (default %(default)s)")
    add("--context", type=int, default=512, help="tokens in a row (default %(default)s)")
    add("--rank", type=int, default=8, help="LoRA rank on q_proj and v_proj, 0: no LoRA (default %(default)s)")


def table(model: str, batch: int, context: int, rank: int) -> str:
    """The FLOPs of each operator and of the step, as text. Raises CommandError or CheckpointError for bad sizes."""
    import flops
    from flops.model import CONVENTIONS
    from flops.trace import trace_training_step
    from qwen_min import QwenConfig
    from qwen_min.attention import QUERY_BLOCK
    from qwen_min.config import MAX_VALUE
    from qwen_min.weights import checkpoint_folder

    if Path(model).is_dir() or not re.fullmatch(r"[\d.]+B", model):
        path = checkpoint_folder(model, ("config.json",)) / "config.json"
    elif model in SIZES:
        path = Path(flops.__file__).parent / "configs" / f"{model}.json"
    else:
        raise cli.CommandError(f"there is no Qwen2.5 of {model}, expected {', '.join(SIZES)}, or a checkpoint")
    config = QwenConfig.from_file(path)
    longest = config.max_position_embeddings
    if not 1 <= batch <= sys.maxsize or not 2 <= context <= longest or not 0 <= rank <= MAX_VALUE:
        raise cli.CommandError(
            f"got batch {batch}, context {context}, rank {rank}; expected batch 1 to {sys.maxsize}, context 2 (for a "
            f"next token to predict) to {longest}, rank 0 to {MAX_VALUE}"
        )
    sizes, ranks = (config, batch, context), {"q_proj": rank, "v_proj": rank} if rank else {}
    operators: dict[str, dict[str, int]] = {}
    steps = {c: flops.training_step(*sizes, convention=c, ranks=ranks) for c in CONVENTIONS}
    forward = dict.fromkeys(CONVENTIONS, 0)
    for convention in CONVENTIONS:
        for op in flops.forward(*sizes, convention=convention, ranks=ranks, head="loss"):
            operators.setdefault(op.name, {})[convention] = op.flops
            forward[convention] += op.flops
    backward = {c: steps[c] - forward[c] for c in CONVENTIONS}
    rows: list[tuple] = [("operator of the forward pass", *CONVENTIONS)]
    rows += [(name, *(found.get(c) or "-" for c in CONVENTIONS)) for name, found in operators.items()]
    rows += [("",), ("operator of the backward pass", "exact")]
    rows += [(op.name, op.flops) for op in flops.backward(*sizes, ranks=ranks)]
    rows += [("",), ("", *CONVENTIONS), ("forward", *forward.values()), ("backward", *backward.values())]
    rows += [("training step", *steps.values())]
    rows += [("  as a power of ten", *(f"10^{math.log10(step):.3f}" for step in steps.values()))]
    rows += [("  in forward passes", *(f"{steps[c] / forward[c]:.2f}" for c in CONVENTIONS))]
    written = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    lines = [(f"{name:<44}" + "".join(f"{cell:>22}" for cell in cells)).rstrip() for name, *cells in written]
    outcome = "Not traced: that would take more than a few seconds."
    if config.num_hidden_layers * batch * context // QUERY_BLOCK <= MOST_TRACED:
        traced = trace_training_step(*sizes, ranks)
        agrees = "equals" if traced == (forward["exact"], backward["exact"]) else "DIFFERS FROM"
        outcome = f"Traced: forward {traced[0]:,}, backward {traced[1]:,}. This {agrees} the exact column."
    return "\n".join([*lines, "", outcome, "", *(f"{name}: {meaning}." for name, meaning in CONVENTIONS.items())])


def work(args: argparse.Namespace, _: Interruption) -> None:
    """Count and print."""
    found = table(args.model, args.batch, args.context, args.rank)
    print(f"{args.model}, {args.batch} x {args.context} tokens, LoRA rank {args.rank}\n\n{found}")


parser, main = cli.command("experiments.costs", __doc__, options, work)

if __name__ == "__main__":
    sys.exit(main())
