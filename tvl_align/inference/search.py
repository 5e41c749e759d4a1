"""Search over embeddings: the rows of a gallery that are most similar to a query, by cosine similarity.

    index = Index.build(out.pooled["vision"], names, made_by=registers.key, modality="vision")
    index.save("photos.index")
    found = Index.load("photos.index", made_by=registers.key).search(queries, k=5)

A saved index is a folder. Its manifest is written last and names the content by its hash, so a reader sees the old index or
the new one, never a mixture:

    manifest.json         format, rows, width, modality, made_by, and the SHA-256 of the content and of approximate.faiss
    <hash>/               vectors.memmap (N, D) float32; names.memmap, the names one after the other in UTF-8;
                          name_ends.memmap (N,) int64; approximate.faiss, if it was asked for

Vectors are float32 on disk too: a loaded index then gives the very scores that it gave before it was saved, and its memory
map is multiplied as it is. Half precision would save 2 bytes a number, change the order of similar rows, and need a copy.

Shapes: N rows of the gallery, D their width, Q queries, k results of a query.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.features.tables import RowNames, open_memmap, release_if_mapped
from tvl_align.system.console import UserError
from tvl_align.system.files import atomic_file, lock_folder, write_atomically

FORMAT = 1
PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ROWS = 16384  # rows of the gallery that are compared at a time
QUERIES = 256  # queries that are compared at a time
GROUP = 64  # rows; in blocks of whole groups, a matrix product adds up a score in the same order wherever its row lies
ROW_BITS = 32  # of a key; a gallery has fewer than 2**32 rows
FILES = ("vectors.memmap", "name_ends.memmap", "names.memmap")
POINTS_PER_LIST = 39  # fewer rows than this per list are too few for k-means, says faiss
READ_LISTS = 16  # an approximate search reads one of so many lists


@dataclass(frozen=True)
class Found:
    """The k most similar rows of every query, best first; rows of equal score in the order of the gallery. On the CPU.

    scores (Q, k): cosine similarities, float32. rows (Q, k): int64 rows of the gallery. names: Q lists of k names.
    """

    scores: Tensor
    rows: Tensor
    names: list[list[str]]


@dataclass
class Index:
    """A gallery of one modality. Make one with `build` or `load`.

    vectors (N, D): float32 of unit norm, on the CPU or memory-mapped. names: what the N rows are, such as paths. made_by:
    identity of the registers that made the vectors; vectors of other registers cannot be compared with them.
    """

    vectors: Tensor
    names: Sequence[str]
    made_by: str
    modality: str

    def __post_init__(self) -> None:
        self._approximate: Any = None  # faiss index of the vectors, or the file that holds it

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def build(cls, vectors: Tensor | Iterable[Tensor], names: Sequence[str | Path], made_by: str, modality: str) -> "Index":
        """An index of vectors (N, D) of any norm but 0, or of chunks of them, with the names of the N rows.

        Raises UserError if there are no rows, if vectors and names differ in number, and for vectors that are zero or have
        NaN or inf.
        """
        return cls(_unit_rows(vectors, names), [str(name) for name in names], made_by, modality)

    def add(self, vectors: Tensor | Iterable[Tensor], names: Sequence[str | Path]) -> None:
        """Add rows at the end. Arguments and errors are those of `build`. A saved index changes with the next `save`."""
        new = _unit_rows(vectors, names, self.vectors.shape[1])
        self.vectors = torch.cat([_plain(self.vectors), new])
        self.names = [*self.names, *map(str, names)]
        self._approximate = None

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, approximate: bool = False) -> Found:
        """The k rows with the highest cosine similarity to each query (Q, D); all N rows if k is larger.

        Every row is compared, in blocks, on the device of the queries. Memory beyond the vectors, queries and results grows
        neither with N nor with Q.

        approximate: compare only with the rows of the clusters nearest to the query, about 1/16 of a large gallery, by faiss
        (extra `search`), on the CPU. Of a million rows around 10,000 random centres this finds 87% of the 5 nearest; without
        clusters it finds fewer. Unless the index was saved with `approximate`, the first such search clusters the gallery,
        which takes longer than an exact search.

        Raises UserError for k < 1, for queries of another width, and for queries that are zero or have NaN or inf.
        """
        if k < 1:
            raise UserError(f"k is {k}; ask for 1 result or more.")
        k = min(k, len(self))
        if len(queries):
            _check_shape(queries, self.vectors.shape[1], "queries")
            queries = _unit(queries, lambda i: f"query {i}")
        else:
            queries = torch.empty(0, self.vectors.shape[1])
        best = (self._nearest_clusters if approximate else self._nearest)(queries, k)
        scores, rows = _scores_and_rows(best.cpu())
        return Found(scores, rows, [[self.names[row] for row in of] for of in rows.tolist()])

    def save(self, folder: Path | str, approximate: bool = False) -> None:
        """Write the index to a folder, in place of an index that it has. A killed `save` leaves the old one.

        approximate: also write what an approximate search needs. Raises UserError if the folder has a manifest of something
        else.
        """
        folder = Path(folder)
        with lock_folder(folder, wait=True, why="writes"):
            old = _read_manifest(folder) if (folder / "manifest.json").exists() else None
            new = folder / "new.tmp"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            try:
                digest = _write_files(new, self.vectors, self.names)
                kept = old.approximate if old is not None and old.content == digest else ""
                approximate_digest = self._write_approximate(new) if approximate else kept
                content = folder / digest[:16]
                content.mkdir(exist_ok=True)
                for file in new.iterdir():
                    os.replace(file, content / file.name)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            rows, width = self.vectors.shape
            manifest = _Manifest(FORMAT, rows, width, self.modality, self.made_by, digest, approximate_digest)
            write_atomically(folder / "manifest.json", json.dumps(asdict(manifest), indent=1))
            if old is not None and old.content != digest:
                shutil.rmtree(folder / old.content[:16], ignore_errors=True)

    @classmethod
    def load(cls, folder: Path | str, made_by: str | None = None) -> "Index":
        """Open a saved index; its vectors are memory-mapped and read once to check their hash.

        made_by: the registers that make the queries; None: any. Raises UserError if the index is of other registers, and
        for a folder that is no index or is damaged.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if made_by is not None and manifest.made_by != made_by:
            raise UserError(
                f"{folder} was made by registers {manifest.made_by}, not by {made_by}; build the index again with these, or "
                "search it with those."
            )
        content = folder / manifest.content[:16]
        _check_digest([content / file for file in FILES], manifest.content)
        vectors = open_memmap(content / "vectors.memmap", torch.float32, (manifest.rows, manifest.width))
        index = cls(vectors, RowNames(content, manifest.rows), manifest.made_by, manifest.modality)
        if manifest.approximate:
            _check_digest([content / "approximate.faiss"], manifest.approximate)
            index._approximate = content / "approximate.faiss"
        return index

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        """Keys (Q, k) of the k most similar rows of all, best first."""
        best = _keys(queries.new_full((len(queries), k), -torch.inf), queries.new_zeros(k, dtype=torch.int64))
        for start in range(0, len(self), ROWS):
            mapped = self.vectors[start : start + ROWS]
            block = _plain(mapped).to(queries.device)
            missing = -len(block) % GROUP
            block = F.pad(block, (0, 0, 0, missing)) if missing else block
            firsts = torch.arange(start, start + len(block), GROUP, device=queries.device)  # row of each group
            for part, of_part in zip(queries.split(QUERIES), best.split(QUERIES), strict=True):
                scores = part @ block.T
                scores[:, len(block) - missing :] = -torch.inf
                scores = scores.view(len(part), len(firsts), GROUP)
                # The k best rows lie in the k groups with the best rows, so only these groups are sorted.
                groups = _keys(scores.amax(2), firsts).topk(min(k, len(firsts)), dim=1).indices
                of_groups = scores.gather(1, groups[:, :, None].expand(-1, -1, GROUP))
                rows = start + GROUP * groups[:, :, None] + torch.arange(GROUP, device=queries.device)
                candidates = torch.cat([of_part, _keys(of_groups, rows).flatten(1)], dim=1)
                of_part.copy_(candidates.topk(k, dim=1).values)
            release_if_mapped(mapped)
        return best

    def _nearest_clusters(self, queries: Tensor, k: int) -> Tensor:
        """Keys (Q, k) of the k most similar rows in the clusters nearest to each query; of all rows where these are few."""
        faiss = _import_faiss()
        if self._approximate is None:
            self._approximate = _clustered(faiss, self.vectors)
        elif isinstance(self._approximate, Path):
            self._approximate = _read_clustered(faiss, self._approximate, self.vectors)
        scores, rows = map(torch.from_numpy, self._approximate.search(queries.cpu().numpy(), k))
        best = _keys(scores, rows).sort(dim=1, descending=True).values
        few = (rows < 0).any(1)
        if few.any():
            best[few] = self._nearest(queries[few.to(queries.device)], k).cpu()
        return best

    def _write_approximate(self, folder: Path) -> str:
        """Write approximate.faiss of the vectors and return its SHA-256."""
        faiss = _import_faiss()
        path = folder / "approximate.faiss"
        faiss.write_index(_clustered(faiss, self.vectors), str(path))
        return _digest([path])


def find_pictures(folder: Path | str, of_any_kind: bool = False) -> list[Path]:
    """The picture files in a folder and its sub-folders, sorted by path, each as `folder / name`.

    Pictures are known by their suffix (PICTURE_SUFFIXES, in either case). of_any_kind: all files, as of modalities that are
    no pictures. Hidden files and folders are left out, and links to folders are not followed. Raises UserError if there is
    none.
    """
    folder, what = Path(folder), "files" if of_any_kind else "pictures"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of {what}.")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent) / name for name in files if not name.startswith(".")]
        found += [path for path in paths if of_any_kind or path.suffix.lower() in PICTURE_SUFFIXES]
    if not found and of_any_kind:
        raise UserError(f"{folder} has no files; give a folder that has some.")
    if not found:
        raise UserError(f"{folder} has no pictures; give a folder with {', '.join(sorted(PICTURE_SUFFIXES))} files.")
    return sorted(found)


def _plain(vectors: Tensor) -> Tensor:
    """A memory-mapped tensor as an ordinary one, of the same memory."""
    return vectors.as_subclass(Tensor)


def _unit_rows(vectors: Tensor | Iterable[Tensor], names: Sequence[str | Path], width: int | None = None) -> Tensor:
    """Vectors (N, D) or chunks of them -> (N, D) float32 of unit norm, on the CPU."""
    if not len(names):
        raise UserError("an index needs rows; give one vector and one name or more.")
    chunks: Iterator[Tensor] = iter([vectors] if isinstance(vectors, Tensor) else vectors)
    result, filled = torch.empty(0), 0
    for chunk in chunks:
        _check_shape(chunk, width, "vectors")
        if not filled:
            width = chunk.shape[1]
            result = torch.empty(len(names), width)
        if filled + len(chunk) <= len(names):
            for part, out in zip(chunk.split(ROWS), result[filled : filled + len(chunk)].split(ROWS), strict=True):
                first = filled
                out.copy_(_unit(part, lambda i, first=first: f"the vector of {names[first + i]}"))
                filled += len(part)
        else:
            filled += len(chunk)
    if filled != len(names):
        raise UserError(f"{filled} vectors have {len(names)} names; give one name to each vector.")
    return result


def _check_shape(x: Tensor, width: int | None, what: str) -> None:
    if x.ndim != 2 or x.shape[1] != (width or max(1, x.shape[1])):
        expected = f"(rows, {width})" if width else "(rows, width)"
        raise UserError(
            f"{what} have shape {tuple(x.shape)}, not {expected}; give embeddings of the registers of this index."
        )


def _unit(x: Tensor, name: Any) -> Tensor:
    """Rows (B, D) -> the same with unit norm, float32. name: row -> what it is, for the error."""
    x = x.detach().double()  # squares of large float32 numbers overflow
    norm = x.norm(dim=1, keepdim=True)
    bad = (~(norm.isfinite() & (norm > 0))).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        found = "is zero" if float(norm[row]) == 0 else "has numbers that are not finite"
        raise UserError(f"{name(row)} {found}; leave it out, or embed it again.")
    return (x / norm).float()


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """Scores float32 and rows int64 -> int64 that sort as the scores, and in equal scores as the rows backwards."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats sort as their bits, negative ones backwards
    return (ordered.long() << ROW_BITS) | (2**ROW_BITS - 1 - rows)


def _scores_and_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_keys`."""
    ordered = (keys >> ROW_BITS).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), 2**ROW_BITS - 1 - (keys & (2**ROW_BITS - 1))


@dataclass(frozen=True)
class _Manifest:
    format: int
    rows: int
    width: int
    modality: str
    made_by: str
    content: str
    approximate: str


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a search index (no manifest.json); build one, or give another folder.")
    try:
        manifest = _Manifest(**json.loads(path.read_text(encoding="utf-8")))
        for field in fields(manifest):
            if type(getattr(manifest, field.name)) is not field.type:
                raise ValueError(f"{field.name} is {getattr(manifest, field.name)!r}")
        if manifest.format != FORMAT:
            raise ValueError(f"its format is {manifest.format}, not {FORMAT}")
        if manifest.rows < 1 or manifest.width < 1:
            raise ValueError(f"it has {manifest.rows} rows of width {manifest.width}")
        for digest in (manifest.content, manifest.approximate or manifest.content):
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"{digest[:80]!r} is no SHA-256")
    except (ValueError, TypeError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not that of a search index ({reason}); build the index again in another folder."
        ) from error
    return manifest


def _write_files(folder: Path, vectors: Tensor, names: Sequence[str]) -> str:
    """Write vectors and names to FILES of a folder and return their SHA-256."""
    encoded = [name.encode(errors="backslashreplace") for name in names]
    with atomic_file(folder / "vectors.memmap") as file:
        for block in vectors.split(ROWS):
            file.write(_plain(block).numpy().data)
            release_if_mapped(block)
    with atomic_file(folder / "name_ends.memmap") as file:
        file.write(np.cumsum([len(name) for name in encoded], dtype=np.int64).data)
    with atomic_file(folder / "names.memmap") as file:
        file.writelines(encoded)
    return _digest([folder / file for file in FILES])


def _digest(paths: Sequence[Path]) -> str:
    """SHA-256 of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _check_digest(paths: Sequence[Path], expected: str) -> None:
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing} is missing; the index is damaged, build it again.")
    if _digest(paths) != expected:
        raise UserError(f"{paths[0].parent} has changed since it was written; the index is damaged, build it again.")


def _import_faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError(
            "approximate search needs faiss; run pip install 'tvl-align[search]', or search exactly, without approximate."
        ) from error
    return faiss


def _clustered(faiss: Any, vectors: Tensor) -> Any:
    """A faiss index that holds the vectors in about sqrt(N) lists, one around each centre of k-means (IVF)."""
    lists = max(1, min(round(math.sqrt(len(vectors))), len(vectors) // POINTS_PER_LIST))
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 2 * POINTS_PER_LIST
    index.nprobe = max(8, lists // READ_LISTS)  # lists that a search reads
    index.train(_plain(vectors).numpy())
    for block in vectors.split(ROWS):
        index.add(_plain(block).numpy())
        release_if_mapped(block)
    return index


def _read_clustered(faiss: Any, path: Path, vectors: Tensor) -> Any:
    """The memory-mapped faiss index in a file. Raises UserError unless it holds as many vectors, of the same width."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        if (index.ntotal, index.d) != tuple(vectors.shape):
            raise ValueError(f"it holds {index.ntotal} vectors of width {index.d}")
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit its index ({reason}); save the index again with approximate.") from error
    return index
