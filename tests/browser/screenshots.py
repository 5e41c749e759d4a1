"""python tests/browser/screenshots.py PAGE ... --out FOLDER: PNGs of pages as a desktop and a phone show them.

A page is an .html file, a run folder or an address; what follows a # is the row to open, such as
demo/runs/base#row=5&query=vision.
"""

import argparse
from pathlib import Path

from chromium import NAMES, WIDTHS, chromium, find_chromium, opened


def address_of(page: str) -> str:
    """The address of a page in a file or in a run folder; addresses are left alone."""
    path, hash_sign, row = page.partition("#")
    if path.startswith("http"):
        return page
    file = Path(path) / "report.html" if Path(path).is_dir() else Path(path)
    return file.resolve().as_uri() + hash_sign + row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", metavar="PAGE")
    parser.add_argument("--out", type=Path, default=Path("screenshots"))
    options = parser.parse_args()
    if find_chromium() is None:
        print(f"no screenshots: there is no {', '.join(NAMES)} on this machine; install one of them")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for i, page in enumerate(options.pages):
            for width in WIDTHS:
                file = options.out / f"{i + 1:02d}-{Path(page.partition('#')[0]).stem}-{width}.png"
                with opened(browser, address_of(page), width) as shown:
                    shown.screenshot(path=file, full_page=True)
                print(f"{file}: {page}")


if __name__ == "__main__":
    main()
