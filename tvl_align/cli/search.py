"""`tvl-align search`: the pictures or sentences of a gallery that are nearest to a query of another modality."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tvl_align.config import parse
from tvl_align.encoders.names import by_modality
from tvl_align.inference.files import with_background
from tvl_align.inference.registers import Registers, load
from tvl_align.inference.search import Index, find_pictures
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError

EXAMPLES = (
    "tvl-align search output_dir/mine --tactile t.png --gallery photos --top 5",
    "tvl-align search output_dir/mine --text 'soft, woven' --gallery photos --index photos.index --json",
    "tvl-align search output_dir/mine --tactile t.png --gallery captions.txt --gallery_modality text",
    "tvl-align search output_dir/mine --more depth=d.png --gallery photos",
)


@dataclass(frozen=True)
class SearchConfig:
    """Search a gallery of one modality with queries of another."""

    run: tyro.conf.Positional[str]
    """Run folder, folder written by `tvl-align export`, or model id of a hub."""
    gallery: Path | None = None
    """Folder of pictures, or a text file with a caption per line; default: the saved --index."""
    gallery_modality: str = "vision"
    """Modality of the gallery: vision, tactile, text, or a further one of the run."""
    vision: tuple[Path, ...] = ()
    """Photos to search with."""
    tactile: tuple[Path, ...] = ()
    """Touch images to search with."""
    text: tuple[str, ...] = ()
    """Captions of adjectives to search with, 'soft, woven'."""
    more: tuple[str, ...] = ()
    """Files of a further modality to search with: depth=a.png depth=b.png."""
    top: int = 5
    """Number of results per query."""
    index: Path | None = None
    """Folder that keeps the vectors of the gallery, so that it is embedded once; it is made if it does not exist."""
    approximate: bool = False
    """Search with faiss (extra `search`), faster in millions of rows and not exact."""
    touch_background: Path | None = None
    """The touch image without contact, of a run that subtracts it from touch images."""
    dataset: str | None = None
    """Data set of TVL in whose way photos are cropped: ssvtp, hct or hct/data3; default: by their place, else ssvtp."""
    stage1_checkpoint: Path | None = None
    """The Stage-1 checkpoint of the run; default: where the run found it."""
    method: str | None = None
    """A method of your own, as for train; default: that of the run."""
    device: str | None = None
    """cuda or cpu; default: cuda if available, else cpu."""
    json: bool = False
    """Print the results as JSON."""

    def __post_init__(self) -> None:
        at_least(1, self, "top")
        if len(self.queries) != 1 or self.gallery_modality in self.queries:
            raise UserError(
                f"the gallery is of {self.gallery_modality}; give queries of one other modality (--vision, --tactile, "
                "--text or --more), or another --gallery_modality."
            )
        if self.gallery is None and self.index is None:
            raise UserError("there is nothing to search in; give --gallery FOLDER, or an --index that was saved.")

    @property
    def queries(self) -> dict[str, Any]:
        """{modality: what to search with}."""
        given: dict[str, Any] = {"vision": self.vision, "tactile": self.tactile, "text": self.text}
        given |= by_modality("more", self.more)
        return {m: list(items) for m, items in given.items() if items}


def run(argv: Sequence[str]) -> None:
    config = parse(SearchConfig, argv, "tvl-align search", examples=EXAMPLES)
    registers = load(config.run, stage1_checkpoint=config.stage1_checkpoint, method=config.method, device=config.device)
    index = _open_index(config, registers)
    (modality,), queries = config.queries, config.queries
    given = with_background(queries, config.touch_background, registers)
    out = registers.embed(**given, dataset=config.dataset, quiet=False)
    found = index.search(out.pooled[modality], config.top, approximate=config.approximate)
    results: list[dict[str, Any]] = [
        {"query": str(query), "found": [{"name": n, "score": round(s, 6)} for n, s in zip(names, scores, strict=True)]}
        for query, names, scores in zip(queries[modality], found.names, found.scores.tolist(), strict=True)
    ]
    if config.json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["query"])
        for hit in result["found"]:
            print(f"  {hit['score']:6.3f}  {hit['name']}")


def _open_index(config: SearchConfig, registers: Registers) -> Index:
    """The saved index of the gallery, or a new one, which is saved where --index says."""
    if config.index is not None and config.index.is_dir() and any(config.index.iterdir()):
        index = Index.load(config.index, made_by=registers.key)
        if index.modality != config.gallery_modality:
            raise UserError(f"{config.index} is an index of {index.modality}; give --gallery_modality {index.modality}.")
        if config.gallery is not None and list(index.names) != _gallery(config, config.gallery, registers)[0]:
            raise UserError(f"{config.index} is an index of another gallery than {config.gallery}; give another --index.")
        return index
    if config.gallery is None:
        raise UserError(f"there is no index {config.index}; give --gallery FOLDER to make it.")
    names, items = _gallery(config, config.gallery, registers)
    gallery = with_background({config.gallery_modality: items}, config.touch_background, registers)
    out = registers.embed(**gallery, dataset=config.dataset, quiet=False)
    index = Index.build(out.pooled[config.gallery_modality], names, made_by=registers.key, modality=config.gallery_modality)
    if config.index is not None:
        index.save(config.index, approximate=config.approximate)
    return index


def _gallery(config: SearchConfig, path: Path, registers: Registers) -> tuple[list[str], list[Any]]:
    if config.gallery_modality not in registers.modalities:
        known = ", ".join(registers.modalities)
        raise UserError(f"this run has no modality {config.gallery_modality!r}; give --gallery_modality one of {known}.")
    if config.gallery_modality == "text":
        if not path.is_file():
            raise UserError(f"{path} is no text file; give --gallery a file with a caption per line.")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return lines, lines
    pictures = find_pictures(path, of_any_kind=not registers.takes_pictures(config.gallery_modality))
    return [str(picture) for picture in pictures], list(pictures)
