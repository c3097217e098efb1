"""Write text with a checkpoint: continue a prompt, or chat.

    python -m experiments.text generate "Foxes eat hares, and when the hares are gone,"
    python -m experiments.text chat

Ctrl-C stops an answer; at the prompt of a chat it ends the chat.
"""

import argparse
import io
import signal
import sys
import time
from contextlib import suppress
from typing import TextIO

from experiments import cli
from experiments.storage.interruption import Interrupted, Interruption

INSTRUCT = "Qwen/Qwen2.5-0.5B-Instruct"  # the defaults of the rules are those of its generation_config.json


def options(p: argparse.ArgumentParser) -> None:
    verbs = p.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    one.add_argument("prompt", help="the text to continue; - reads it from standard input")
    many = verbs.add_parser("chat", help="chat with an instruct checkpoint", description="Chat, a line at a time.")
    many.add_argument("--system", help="the system message (default: the checkpoint's)")
    for verb, work in ((one, generate), (many, chat)):
        verb.set_defaults(work=work)
        add = verb.add_argument
        add("--model", help=f"checkpoint: a folder, a hub id or the embedded tiny (default: that of the adapter, or "
            f"{INSTRUCT})")  # fmt: skip
        add("--adapter", help="folder of a LoRA adapter in peft's format")
        cli.add_device(verb, dtype="bfloat16")
        add("--max-tokens", type=cli.positive, default=512, help="most tokens of an answer (default %(default)s)")
        add("--temperature", type=float, default=0.7, help="0: greedy decoding (default %(default)s)")
        add("--top-k", type=cli.positive, default=20, help="most tokens to draw among (default %(default)s)")
        add("--top-p", type=float, default=0.8, help="draw among the likeliest tokens that together have this "
            "probability (default %(default)s)")  # fmt: skip
        add("--repetition-penalty", type=float, default=1.1, help="more than 1: tokens that the text already has "
            "become less likely (default %(default)s)")  # fmt: skip
        add("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")


class Writer:
    """A model that writes answers to standard output, character by character, by the rules of the command line."""

    def __init__(self, args: argparse.Namespace):
        """Load the checkpoint, and the adapter if there is one. Raises errors that `cli.is_meant` for the user."""
        import torch

        from experiments.forecasting.adapter import resolve
        from lora import load_adapter, merge_and_unload
        from qwen_min import load
        from qwen_min.linear import keep_only_packed, packs_single_row
        from qwen_min.sampling import Sampling

        self.args = args
        self.rules = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
        device = cli.checked_device(args.device)
        _, self.folder, _ = resolve(args.model or (None if args.adapter else INSTRUCT), args.adapter)
        self.model, self.tokenizer = load(self.folder, device, getattr(torch, args.dtype))
        if args.adapter:
            load_adapter(self.model, args.adapter)
            merge_and_unload(self.model)
        if packs_single_row(self.model.head_weight):
            keep_only_packed(self.model)

    def write(self, ids: list[int], seed: int, pieces: list[str], prompt: str = "") -> None:
        """Print the prompt, and its continuation while it is generated; add its pieces to a list.

        At the end, also after Ctrl-C, stderr tells how quick that was. Raises CommandError if there are no token ids,
        or too many for the answer to fit.
        """
        from qwen_min.generation import stream

        positions = self.model.config.max_position_embeddings
        if not ids:
            raise cli.CommandError("the prompt is empty, expected a text to continue")
        if len(ids) + self.args.max_tokens > positions:
            raise cli.CommandError(
                f"{len(ids)} tokens of prompt and --max-tokens {self.args.max_tokens} exceed the model's {positions} "
                "positions; shorten one of them, or begin a new chat"
            )
        print(prompt, end="", flush=True)
        characters, started = self.tokenizer.stream(), time.monotonic()
        try:
            for token in stream(self.model, ids, self.args.max_tokens, self.tokenizer.end_ids, self.rules, seed):
                pieces.append(characters(token))
                print(pieces[-1], end="", flush=True)
        finally:
            seconds = time.monotonic() - started
            print(flush=True)
            print(f"[{len(pieces)} tokens in {seconds:.1f} s: {len(pieces) / seconds:.1f} tokens/s]", file=sys.stderr)


def standard_input() -> TextIO:
    """Standard input; what is not UTF-8 in it is refused by the tokenizer."""
    if sys.stdin is None:
        raise cli.CommandError("standard input is closed, expected a text")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def generate(args: argparse.Namespace, _: Interruption) -> None:
    """Print a continuation of the prompt."""
    writer = Writer(args)
    prompt = standard_input().read() if args.prompt == "-" else args.prompt
    writer.write(writer.tokenizer.encode(prompt), args.seed, [], prompt)


def chat(args: argparse.Namespace, interruption: Interruption) -> None:
    """Answer each line of standard input, with all earlier lines and answers in mind."""
    from qwen_min.chat import ChatTemplate

    writer = Writer(args)
    template = ChatTemplate(writer.folder)
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    print("An empty line or Ctrl-D ends the chat; Ctrl-C stops an answer.", file=sys.stderr)
    is_terminal = standard_input().isatty()
    with suppress(EOFError):
        while line := input("> " if is_terminal else "").strip():
            messages.append({"role": "user", "content": line})
            ids = template.encode(writer.tokenizer, messages)
            pieces: list[str] = []
            try:
                writer.write(ids, args.seed + len(messages), pieces)
            except Interrupted as stop:
                if stop.exit_status != 128 + signal.SIGINT:
                    raise
                interruption.asked = None  # the answer was to stop, not the chat
            messages.append({"role": "assistant", "content": "".join(pieces)})


parser, main = cli.command("experiments.text", __doc__, options, lambda args, stop: args.work(args, stop))

if __name__ == "__main__":
    sys.exit(main())
