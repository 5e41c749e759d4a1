"""`tvl-align explore`: what test rows find, where registers look and what they hold, as a page to click in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from tvl_align.config import parse
from tvl_align.evaluation.explore_file import Exploration
from tvl_align.report.page import FILE_ROWS, SERVED_SIDE, parts_of, render_page, write_page
from tvl_align.report.results import read_results
from tvl_align.report.server import PageServer
from tvl_align.system.bounds import between

EXAMPLES = ("tvl-align explore output_dir/mine", "tvl-align explore output_dir/mine --port 9000")


@dataclass(frozen=True)
class ExploreConfig:
    """Explore an evaluated run in a browser.

    The page is one file, report.html in the run folder, which needs no network. With more than 2,000 test rows it is served
    on this machine instead, until Ctrl-C.
    """

    run: tyro.conf.Positional[Path]
    """Run folder, evaluated by tvl-align evaluate."""
    port: int = 8765
    """Port of 127.0.0.1 where a large page is served; 0: any that is free."""
    datasets_dir: Path | None = None
    """Data folder of the pictures; default: where they were when the run was evaluated."""

    def __post_init__(self) -> None:
        between(0, 65535, self, "port")


def run(argv: Sequence[str]) -> None:
    config = parse(ExploreConfig, argv, "tvl-align explore", examples=EXAMPLES)
    read_results(config.run)  # first, since without it there is no explore.npz either
    found = Exploration.load(config.run)
    if len(found) <= FILE_ROWS:
        print(write_page(config.run, config.datasets_dir).resolve())
    else:
        serve(config, found)


def serve(config: ExploreConfig, found: Exploration) -> None:
    """Serve the page of a run until Ctrl-C."""
    parts = parts_of(config.run, found, 1, SERVED_SIDE, config.datasets_dir)
    with PageServer(render_page(config.run, found, parts, embed=False), parts, config.port) as server:
        print(f"{server.address} shows {len(found)} test rows; end it with Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
