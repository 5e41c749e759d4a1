"""The `tvl-align` command. A command's module is imported when it is called, so that --help and --version start at once."""

import difflib
import importlib
import sys

from tvl_align import __version__
from tvl_align.system.console import UserError, quiet_logs, reports_errors

COMMANDS = {
    "demo": "the whole pipeline on synthetic data, in minutes",
    "world": "write a synthetic data set in the TVL format",
    "pretrain": "train small Stage-1 encoders on a data set in the TVL format",
    "encode": "compute the frozen features once (the flags of train)",
    "features": "feature stores: import features of your own",
    "train": "train Stage 2",
    "evaluate": "measure a run on the test split and write its page",
    "compare": "rank measured runs on one page",
    "contest": "train, measure and compare every method with several seeds",
    "bench": "measure speed and memory, as ratios (needs the repository)",
}


@reports_errors
def main() -> None:
    """Entry point of `tvl-align`."""
    quiet_logs()
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print("usage: tvl-align COMMAND [OPTIONS]\n")
        print("\n".join(f"  {command:10s} {what}" for command, what in COMMANDS.items()))
        print("\nOptions and examples of a command: tvl-align COMMAND --help. Version: tvl-align --version.")
        return
    if name in ("-V", "--version"):
        print(f"tvl-align {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}."
        raise UserError(f"unknown command {name!r}; {hint}")
    importlib.import_module(f"tvl_align.cli.{name}").run(arguments)


if __name__ == "__main__":
    main()
