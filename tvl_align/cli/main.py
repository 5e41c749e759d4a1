"""The `tvl-align` command. It imports only the module of the given command, so that --help and --version are fast."""

import difflib
import importlib
import sys

from tvl_align import __version__
from tvl_align.system.console import UserError, quiet_logs, reports_errors

COMMANDS = {
    "demo": "run the full pipeline on synthetic data, in minutes",
    "world": "write a synthetic data set in the TVL format",
    "pretrain": "train small Stage-1 encoders on a data set in the TVL format",
    "encode": "encode a data set into a feature store (same flags as train)",
    "features": "import your own features into a feature store",
    "train": "train a Stage-2 method",
    "evaluate": "evaluate a run on the test split and write its report",
    "explore": "see what each test row finds, where registers look and what they hold",
    "compare": "rank evaluated runs in one report",
    "embed": "tokens of new pictures and sentences, with a trained run",
    "search": "find the pictures or sentences that are nearest to a query",
    "export": "write a trained run as a folder to share: weights, config, model card",
    "contest": "train, evaluate and compare every method with several seeds",
    "bench": "run the benchmarks of speed and memory (needs the repository)",
}


@reports_errors
def main() -> None:
    """Entry point of `tvl-align`."""
    quiet_logs()
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print("usage: tvl-align COMMAND [OPTIONS]\n")
        print("\n".join(f"  {command:10s} {summary}" for command, summary in COMMANDS.items()))
        print("\nOptions and examples of a command: tvl-align COMMAND --help. Version: tvl-align --version.")
        return
    if name in ("-V", "--version"):
        print(f"tvl-align {__version__}")
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"unknown command {name!r}; {hint}")
    importlib.import_module(f"tvl_align.cli.{name}").run(arguments)


if __name__ == "__main__":
    main()
