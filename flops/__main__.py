"""Print what a training step costs, operator by operator, in the three conventions.

    python -m flops --model Qwen/Qwen2.5-0.5B-Instruct --batch 4 --context 512 --rank 8

Only the checkpoint's config.json is read.
"""

import argparse
import json
import math
import sys


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="tiny", help="checkpoint: a folder, a hub id, or tiny (default)")
    p.add_argument("--batch", type=int, default=4, help="rows (default %(default)s)")
    p.add_argument("--context", type=int, default=512, help="tokens in a row (default %(default)s)")
    p.add_argument("--rank", type=int, default=8, help="of LoRA on q_proj and v_proj, 0 for none (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


def counts(args: argparse.Namespace) -> dict:
    """Everything the table shows, as integers. Raises ValueError for bad sizes or an unusable config."""
    from flops.model import BACKWARD, CONVENTIONS, forward, total
    from flops.trace import trace_training_step
    from qwen_min import QwenConfig
    from qwen_min.weights import checkpoint_folder

    if args.batch < 1 or args.context < 2 or args.rank < 0:
        raise ValueError(
            f"got batch {args.batch}, context {args.context}, rank {args.rank}; expected batch >= 1, context >= 2 "
            "(a next token to predict), rank >= 0"
        )
    config = QwenConfig.from_file(checkpoint_folder(args.model, ("config.json",)) / "config.json")
    ranks = {"q_proj": args.rank, "v_proj": args.rank} if args.rank else {}
    operators, step = {}, {}
    for convention in CONVENTIONS:
        ops = forward(config, args.batch, args.context, convention=convention, ranks=ranks, head="loss")
        for op in ops:
            operators.setdefault(op.name, dict.fromkeys(CONVENTIONS, 0))[convention] = op.flops
        step[convention] = {"forward": total(ops), "training step": (1 + BACKWARD) * total(ops)}
    traced_forward, traced = trace_training_step(config, args.batch, args.context, ranks)
    return {
        "model": args.model,
        "batch": args.batch,
        "context": args.context,
        "rank": args.rank,
        "operators": operators,
        "totals": step,
        "traced": {"forward": traced_forward, "forward and backward": traced},
    }


def table(found: dict) -> str:
    """The counts as text."""
    from flops.model import CONVENTIONS

    conventions = list(found["totals"])

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<26}" + "".join(f"{cell:>22}" for cell in cells)

    lines = [
        f"{found['model']}, {found['batch']} x {found['context']} tokens, LoRA rank {found['rank']}",
        "",
        line("operator", conventions),
    ]
    for name, flops in found["operators"].items():
        lines.append(line(name, [f"{flops[c]:,}" if flops[c] else "-" for c in conventions]))
    for name in ("forward", "training step"):
        lines.append(line(name, [f"{found['totals'][c][name]:,}" for c in conventions]))
    logs = [math.log10(found["totals"][c]["training step"]) for c in conventions]
    lines.append(line("  as a power of ten", [f"10^{x:.3f}" for x in logs]))
    traced, forward = found["traced"]["forward and backward"], found["traced"]["forward"]
    agrees = "equals" if forward == found["totals"]["exact"]["forward"] else "DIFFERS FROM"
    lines += [
        "",
        f"A training step counts as 3 x forward. Traced forward: {forward:,} ({agrees} the exact column);",
        f"traced forward and backward: {traced:,}, that is {traced / forward:.2f} x forward.",
        "",
        *(f"{name}: {meaning}." for name, meaning in CONVENTIONS.items()),
    ]
    return "\n".join(lines)


def main() -> int:
    """Exit status 2 with one message for bad input."""
    args = parser().parse_args()
    try:
        found = counts(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
