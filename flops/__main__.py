"""Print the FLOPs of a training step, operator by operator, in three conventions.

    python -m flops --model 0.5B --batch 4 --context 512 --rank 8

The dense sizes of Qwen2.5 are built in. Of another checkpoint only the config.json is read. Where it takes a few
seconds, the real code is traced as well, without memory or arithmetic.
"""

import argparse
import json
import math
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"  # of the dense Qwen2.5 models, base and Instruct
SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
MOST_TRACED = 1_000  # blocks of attention, which take a few seconds


def parser() -> argparse.ArgumentParser:
    """The argument parser of the command."""
    called = sys.argv[0] if sys.argv[0].startswith("qwen-min") else "python -m flops"
    p = argparse.ArgumentParser(prog=called, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", default="0.5B", help=f"{', '.join(SIZES)}, tiny, or a checkpoint: a folder or a hub id (default "
        "%(default)s)",
    )  # fmt: skip
    p.add_argument("--batch", type=int, default=4, help="rows in a batch (default %(default)s)")
    p.add_argument("--context", type=int, default=512, help="tokens in a row (default %(default)s)")
    p.add_argument(
        "--rank", type=int, default=8, help="LoRA rank on q_proj and v_proj, 0: no LoRA (default %(default)s)"
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


def counts(args: argparse.Namespace) -> dict:
    """Everything in the table: FLOPs as integers. Raises ValueError for bad sizes or an unusable config."""
    from flops.model import CONVENTIONS, forward, total
    from flops.trace import trace_training_step
    from flops.training import backward, training_step
    from qwen_min import QwenConfig
    from qwen_min.attention import QUERY_BLOCK
    from qwen_min.config import MAX_VALUE
    from qwen_min.weights import checkpoint_folder

    if args.model in SIZES and not Path(args.model).is_dir():
        path = CONFIGS / f"{args.model}.json"
    else:
        path = checkpoint_folder(args.model, ("config.json",)) / "config.json"
    config = QwenConfig.from_file(path)
    longest = config.max_position_embeddings
    if args.batch < 1 or not 2 <= args.context <= longest or not 0 <= args.rank <= MAX_VALUE:
        raise ValueError(
            f"got batch {args.batch}, context {args.context}, rank {args.rank}; expected batch >= 1, context 2 (for a "
            f"next token to predict) to {longest}, rank 0 to {MAX_VALUE}"
        )
    ranks = {"q_proj": args.rank, "v_proj": args.rank} if args.rank else {}
    operators: dict[str, dict[str, int]] = {}
    totals = {}
    for convention in CONVENTIONS:
        ops = forward(config, args.batch, args.context, convention=convention, ranks=ranks, head="loss")
        for op in ops:
            operators.setdefault(op.name, dict.fromkeys(CONVENTIONS, 0))[convention] = op.flops
        step = training_step(config, args.batch, args.context, convention=convention, ranks=ranks)
        totals[convention] = {"forward": total(ops), "backward": step - total(ops), "training step": step}
    rows_and_heads = args.batch * (1 + config.num_attention_heads * args.context // 2**15)
    traced = None
    if config.num_hidden_layers * rows_and_heads * args.context // QUERY_BLOCK <= MOST_TRACED:
        steps = trace_training_step(config, args.batch, args.context, ranks)
        traced = dict(zip(("forward", "backward"), steps, strict=True))
    return {
        "model": args.model,
        "batch": args.batch,
        "context": args.context,
        "rank": args.rank,
        "operators": operators,
        "backward operators": {op.name: op.flops for op in backward(config, args.batch, args.context, ranks=ranks)},
        "totals": totals,
        "traced": traced,
    }


def table(result: dict) -> str:
    """Format the result of `counts` as text."""
    from flops.model import CONVENTIONS

    conventions, totals, traced = list(CONVENTIONS), result["totals"], result["traced"]

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<44}" + "".join(f"{cell:>22}" for cell in cells)

    lines = [
        f"{result['model']}, {result['batch']} x {result['context']} tokens, LoRA rank {result['rank']}",
        "",
        line("operator of the forward pass", conventions),
    ]
    for name, flops in result["operators"].items():
        lines.append(line(name, [f"{flops[c]:,}" if flops[c] else "-" for c in conventions]))
    lines += ["", line("operator of the backward pass", ["exact"])]
    lines += [line(name, [f"{flops:,}"]) for name, flops in result["backward operators"].items()]
    lines += ["", line("", conventions)]
    for name in ("forward", "backward", "training step"):
        lines.append(line(name, [f"{totals[c][name]:,}" for c in conventions]))
    steps = [totals[c]["training step"] for c in conventions]
    lines.append(line("  as a power of ten", [f"10^{math.log10(step):.3f}" for step in steps]))
    ratios = [step / totals[c]["forward"] for c, step in zip(conventions, steps, strict=True)]
    lines.append(line("  in forward passes", [f"{ratio:.2f}" for ratio in ratios]))
    outcome = "Not traced: that would take more than a few seconds."
    if traced:
        agrees = "equals" if all(traced[name] == totals["exact"][name] for name in traced) else "DIFFERS FROM"
        outcome = (
            f"Traced: forward {traced['forward']:,}, backward {traced['backward']:,}. This {agrees} the exact column."
        )
    lines += [
        "",
        outcome,
        "",
        *(f"{name}: {meaning}." for name, meaning in CONVENTIONS.items()),
    ]
    return "\n".join(lines)


def main() -> int:
    """Print the table or JSON. Returns the exit status: 2, after one message, for bad input."""
    args = parser().parse_args()
    try:
        result = counts(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
