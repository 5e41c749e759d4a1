"""Data as they come: one defect at a time in a small TVL data folder, which is then read and encoded.

What must come of it is written beside each defect: used (and as it should be), left out with a reason, or refused with a
sentence. Anything else, a traceback above all, is a failure.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from faults import Outcome
from PIL import Image

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.pictures import inspect_images
from tvl_align.data.samples import Samples, TextOptions, make_samples
from tvl_align.data.text import adjectives
from tvl_align.data.tvl import Tolerance, read_tvl
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.features.encode import open_or_encode
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError

PHOTO, TOUCH = "ssvtp/images_rgb/image_0_rgb.jpg", "ssvtp/images_tac/image_0_tac.jpg"
PNG = PHOTO.replace(".jpg", ".png")


@dataclass(frozen=True)
class Found:
    """What came of a data folder: its store and samples."""

    store: FeatureStore
    samples: dict[str, Samples]

    @property
    def left_out(self) -> str:
        """Every reason in the manifest."""
        told = self.store.manifest
        return " | ".join([*told["dropped"], *(fault["reason"] for split in told["skipped"].values() for fault in split)])

    def image(self, name: str) -> torch.Tensor | None:
        """The photo of a row as encoders get it."""
        for samples in self.samples.values():
            for i, row in enumerate(samples.rows):
                if row.name == name:
                    return samples[i, 0].images.get("vision")
        return None

    def says_swapped(self) -> bool:
        return bool(self.store.manifest["swapped"])

    def caption_of_row_0(self) -> list[str]:
        rows = [row for samples in self.samples.values() for row in samples.rows if row.name == PHOTO]
        return adjectives(rows[0].caption or "")

    def captions(self) -> list[str | None]:
        return [row.caption for samples in self.samples.values() for row in samples.rows]


@dataclass(frozen=True)
class Bad:
    """A defect: how to make it, what must come of it, the words of the reason, and what a used row must look like."""

    what: str
    make: Callable[[Path], None]
    end: str
    words: str = ""
    holds: Callable[[Found], bool] = lambda found: True


def look(folder: Path, stage1: Stage1, out: Path, tolerance: Tolerance) -> Found:
    data = read_tvl(folder, tolerance=tolerance)
    images = inspect_images(ImageOptions(stage1.photo_size, stage1.touch_size), data)
    samples = make_samples(data, images, TextOptions(), 0)
    return Found(open_or_encode(out, stage1, samples, 0, 1, tolerance=tolerance), samples)


def rewrite(change: Callable[[Image.Image], Image.Image], **options: object) -> Callable[[Path], None]:
    """Save the photo of row 0 again, changed, under its name."""

    def make(folder: Path) -> None:
        with Image.open(folder / PHOTO) as image:
            changed = change(image.convert("RGB"))
        changed.save(folder / PHOTO, **options)  # type: ignore[arg-type]

    return make


def replaced(content: bytes, path: str = PHOTO) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(content) and None


def cells(change: Callable[[list[list[str]]], object]) -> Callable[[Path], None]:
    """Change the rows of SSVTP's train.csv, header first."""

    def make(folder: Path) -> None:
        path = folder / "ssvtp/train.csv"
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        change(rows)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    return make


def text(change: Callable[[bytes], bytes], path: str = "ssvtp/train.csv") -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes())) and None


def added(url: str, tactile: str = "images_tac/image_0_tac.jpg", caption: str = "soft") -> Callable[[Path], None]:
    return cells(lambda rows: rows.append([url, tactile, caption]))


def grey16(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def turned(image: Image.Image) -> Image.Image:
    image = image.transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6  # to be shown turned back by 90 degrees
    return image


def huge(_: Image.Image) -> Image.Image:
    return Image.new("1", (20_000, 20_000))


def instead(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Something that is no file in the place of the photo."""

    def job(folder: Path) -> None:
        (folder / PHOTO).unlink()
        make(folder / PHOTO)

    return job


def swap_a_trajectory(folder: Path) -> None:
    press = next(p for p in sorted((folder / "hct/data1").iterdir()) if (p / "vision").is_dir())
    (press / "vision").rename(press / "other")
    (press / "tactile").rename(press / "vision")
    (press / "other").rename(press / "tactile")


def unequal(folder: Path) -> None:
    (folder / "hct/data1/train.csv").unlink()
    path = folder / "hct/data1/contact.json"
    lists = json.loads(path.read_text())
    path.write_text(json.dumps(lists | {"tactile": lists["tactile"][1:]}))


def many_bad(folder: Path) -> None:
    for path in sorted((folder / "ssvtp/images_rgb").iterdir())[:20]:
        path.write_bytes(b"no image")


def captioned(caption: str) -> Callable[[Path], None]:
    """Another caption in row 0."""
    return cells(lambda rows: rows[1].__setitem__(2, caption))


def lines(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change every line of SSVTP's train.csv but the header."""

    def make(folder: Path) -> None:
        path = folder / "ssvtp/train.csv"
        header, *rest = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join([header, *map(change, rest)]) + "\n", encoding="utf-8")

    return make


def delimited(delimiter: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / "ssvtp/train.csv"
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)

    return make


def small_data3(folder: Path) -> None:
    """A test row of HCT's data3 in a copy whose photos were made small."""
    for kind in ("vision", "tactile"):
        (folder / "hct/data3/cup-1" / kind).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(90, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "hct/data3/cup-1" / kind / "0.png")
    (folder / "hct/data3/test.csv").write_text("url,tactile,caption\ncup-1/vision/0.png,cup-1/tactile/0.png,soft\n")


def grey12(folder: Path) -> None:
    """The photo of row 0 as a camera of 12 bits writes it: values up to 4,095 in a file of 16 bits."""
    with Image.open(folder / PHOTO) as image:
        grey = np.asarray(image.convert("L")).astype(np.uint16)
    grey.flat[0] = 255
    Image.fromarray(grey * 16 + grey // 16).save(folder / PNG)
    text(lambda b: b.replace(b"image_0_rgb.jpg", b"image_0_rgb.png"))(folder)


def near(reference: torch.Tensor, most: float, name: str = PHOTO) -> Callable[[Found], bool]:
    def holds(found: Found) -> bool:
        image = found.image(name)
        return image is not None and float((image - reference).abs().mean()) < most

    return holds


def kinds(plain: Found) -> list[Bad]:
    """All defects; `plain` is what comes of the folder without one."""
    original = plain.image(PHOTO)
    assert original is not None
    grey = original.mean(0, keepdim=True).expand_as(original)
    broken, count = "corrupt or truncated", len(plain.captions())
    same_rows = lambda found: len(found.captions()) == count  # noqa: E731
    as_plain = lambda found: sorted(map(str, found.captions())) == captions  # noqa: E731
    captions = sorted(map(str, plain.captions()))
    soft_red = lambda found: found.caption_of_row_0() == ["soft", "red"] and same_rows(found)  # noqa: E731
    header = b"url,tactile,caption"
    return [
        Bad("truncated JPEG", text(lambda b: b[: len(b) // 2], PHOTO), "left out", broken),
        Bad("a JPEG of zero bytes", replaced(b""), "left out", "not an image"),
        Bad("text named .jpg", replaced(b"hello"), "left out", "not an image"),
        Bad("zeros named .jpg", replaced(bytes(4096)), "left out", "not an image"),
        Bad("JPEG header, then nothing", replaced(b"\xff\xd8\xff\xe0\x00\x10JFIF"), "left out", broken),
        Bad("truncated touch image", text(lambda b: b[: len(b) // 2], TOUCH), "left out", broken),
        Bad("a PNG named .jpg", rewrite(lambda i: i, format="PNG"), "used", holds=near(original, 0.05)),
        Bad("16-bit grey", rewrite(grey16, format="PNG"), "used", holds=near(grey, 0.4)),
        Bad("12 bits in 16-bit grey", grey12, "used", holds=near(grey, 0.4, PNG)),
        Bad("a small photo of data3", small_data3, "left out", "is not inside of the photo"),
        Bad("fractional grey (TIFF)", rewrite(lambda i: i.convert("F"), format="TIFF"), "left out", "floating-point"),
        Bad("CMYK", rewrite(lambda i: i.convert("CMYK"), format="JPEG"), "used", holds=near(original, 0.3)),
        Bad("grey", rewrite(lambda i: i.convert("L"), format="JPEG"), "used", holds=near(grey, 0.4)),
        Bad("palette with transparency", rewrite(lambda i: i.convert("P"), format="PNG"), "used", holds=near(original, 0.6)),
        Bad("EXIF says turned", _turn, "used", holds=near(original, 0.3)),
        Bad("1 x 1 pixel", rewrite(lambda i: i.resize((1, 1))), "left out", "fewer than 8 pixels"),
        Bad(
            "20,000 x 20,000 pixels",
            rewrite(lambda i: Image.new("1", (20_000, 20_000)), format="PNG"),
            "left out",
            "million",
        ),
        Bad("missing file", lambda f: (f / PHOTO).unlink(), "left out", "vision file is missing"),
        Bad("a folder for a file", instead(lambda p: p.mkdir()), "left out", "vision file is missing"),
        Bad("a symlink loop", instead(lambda p: p.symlink_to(p)), "left out", "vision file is missing"),
        Bad("a device for a file", instead(lambda p: p.symlink_to("/dev/zero")), "left out", "vision file is missing"),
        Bad("an absolute path", added("/etc/image_1_rgb.jpg"), "left out", "outside the data folder"),
        Bad("../ in a path", added("../ssvtp/images_rgb/image_1_rgb.jpg"), "left out", "outside the data folder"),
        Bad(
            "../ in a touch path",
            added("images_rgb/image_1_rgb.jpg", "../../secret.jpg"),
            "left out",
            "outside the data folder",
        ),
        Bad("a name of 5,000 letters", added(f"{'a' * 5000}/image_1_rgb.jpg"), "left out", "cannot be accessed"),
        Bad("another naming", added("images_rgb/photo1.jpg"), "left out", "not named image_<N>_rgb"),
        Bad("NUL in a path", added("images_rgb\0/image_1_rgb.jpg"), "left out", "NUL"),
        Bad("bytes that are not UTF-8", text(lambda b: b + b"\xff\xfe\x80,x,y\n"), "refused", "not a UTF-8 CSV"),
        Bad("UTF-16", text(lambda b: b.decode().encode("utf-16")), "refused", "UTF-8"),
        Bad("a byte order mark", text(lambda b: b"\xef\xbb\xbf" + b), "used", holds=same_rows),
        Bad("CRLF", text(lambda b: b.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")), "used", holds=same_rows),
        Bad("quotes in a caption", cells(lambda r: r[1].__setitem__(2, 'so "soft", hard')), "used", holds=same_rows),
        Bad(
            "commas without quotes",
            text(lambda b: b + b"images_rgb/image_1_rgb.jpg,,soft,hard\n"),
            "left out",
            "needs quotes",
        ),
        Bad("an open quote", text(lambda b: b + b'images_rgb/image_1_rgb.jpg,,"soft'), "used"),
        Bad("an empty caption", _no_caption, "used", holds=lambda f: None in f.captions() and same_rows(f)),
        Bad("a caption of commas", _only_commas, "used", holds=lambda f: None in f.captions()),
        Bad("nan for a caption", no_value("nan"), "used", holds=lambda f: f.caption_of_row_0() == [] and same_rows(f)),
        Bad("N/A for a caption", no_value("N/A"), "used", holds=lambda f: f.caption_of_row_0() == [] and same_rows(f)),
        Bad("a list for a caption", captioned("['soft', 'red']"), "used", holds=soft_red),
        Bad("full-width commas", captioned("soft\uff0cred"), "used", holds=soft_red),
        Bad("semicolons between cells", delimited(";"), "used", holds=as_plain),
        Bad("tabs between cells", delimited("\t"), "used", holds=as_plain),
        Bad("backslashes in paths", text(lambda b: b.replace(b"/", b"\\")), "used", holds=as_plain),
        Bad("a header in capitals", text(lambda b: b.replace(header, header.upper(), 1)), "used", holds=as_plain),
        Bad("a comma after every row", lines(lambda line: line + ","), "used", holds=as_plain),
        Bad(
            "two columns of one name",
            text(lambda b: b.replace(header, b"url,caption,caption", 1)),
            "refused",
            "2 columns named 'caption'",
        ),
        Bad("10,000 words", cells(lambda r: r[1].__setitem__(2, ", ".join(["soft"] * 10_000))), "used", holds=same_rows),
        Bad("a cell of 200,000 letters", cells(lambda r: r[1].__setitem__(2, "a" * 200_000)), "refused", "CSV"),
        Bad(
            "a script for a caption",
            cells(lambda r: r[1].__setitem__(2, "<script>alert(1)</script>")),
            "used",
            holds=same_rows,
        ),
        Bad("duplicate rows", cells(lambda r: r.append(list(r[1]))), "left out", "duplicate"),
        Bad("an empty CSV", replaced(b"", "ssvtp/train.csv"), "refused", "no column 'url'"),
        Bad("a wrong header", text(lambda b: b.replace(header, b"link,touch,text", 1)), "refused", "no column 'url'"),
        Bad("no header", text(lambda b: b.split(b"\n", 1)[1]), "refused", "no column 'url'"),
        Bad("columns in another order", _other_order, "used", holds=same_rows),
        Bad("a row cut short", text(lambda b: b + b"images_rgb/image_1_rgb.jpg"), "left out", "fewer cells than columns"),
        Bad("JSON lists of unequal length", unequal, "refused", "different lengths"),
        Bad("JSON cut off", _cut_json, "refused", "must contain the lists"),
        Bad(
            "vision and touch folders swapped",
            swap_a_trajectory,
            "used",
            holds=Found.says_swapped,
        ),
        Bad("labels that are not UTF-8", _odd_label, "used", holds=lambda f: None in f.captions()),
        Bad("synonyms that are a list", replaced(b"[1]", "ssvtp/synonyms.json"), "used"),
        Bad("20 broken images", many_bad, "refused", "more than 5%"),
        Bad(
            "no data at all", lambda f: [shutil.rmtree(f / d) for d in ("ssvtp", "hct")] and None, "refused", "has no ssvtp/"
        ),
        Bad("a file for a folder", _file_for_folder, "refused", "has no hct/"),
    ]


def _turn(folder: Path) -> None:
    with Image.open(folder / PHOTO) as image:
        wide = turned(image.convert("RGB"))
    wide.save(folder / PHOTO, quality=95, exif=wide.getexif())


def no_value(word: str) -> Callable[[Path], None]:
    """A word for no caption, and no label file either."""

    def make(folder: Path) -> None:
        captioned(word)(folder)
        (folder / "ssvtp/text/labels_0.txt").unlink(missing_ok=True)

    return make


_no_caption = no_value("")


def _only_commas(folder: Path) -> None:
    cells(lambda rows: rows[1].__setitem__(2, ", ,."))(folder)


def _odd_label(folder: Path) -> None:
    _no_caption(folder)
    (folder / "ssvtp/text/labels_0.txt").write_bytes(b"\xff\xfe")


def _other_order(folder: Path) -> None:
    cells(lambda rows: [row.reverse() for row in rows])(folder)


def _cut_json(folder: Path) -> None:
    (folder / "hct/data1/train.csv").unlink()
    text(lambda b: b[: len(b) // 2], "hct/data1/contact.json")(folder)


def _nothing(folder: Path) -> None:
    for name in ("ssvtp", "hct"):
        shutil.rmtree(folder / name)


def _file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder / "hct")
    (folder / "hct").write_bytes(b"")


def tried(bad: Bad, world: Path, stage1: Stage1, work: Path) -> str:
    """ "" where a defect ends as it must; else what came of it."""
    folder = work / "data"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(world, folder)
    bad.make(folder)
    try:
        found = look(folder, stage1, work / "features", Tolerance())
    except UserError as error:
        right = bad.end == "refused" and bad.words in str(error) and "\n" not in str(error)
        return "" if right else f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if bad.end == "refused":
        return f"accepted, left out: {found.left_out or 'nothing'}"
    if bad.end == "left out":
        if bad.words not in found.left_out:
            return f"left out: {found.left_out or 'nothing'}"
        try:
            look(folder, stage1, work / "strict", Tolerance(strict=True))
        except UserError:
            return ""
        return "" if "duplicate" in bad.words else "accepted by --strict"
    return "" if not found.left_out and bad.holds(found) else f"not as it should be ({found.left_out})"


def start_from(world: Path, checkpoint: Path, work: Path) -> tuple[list[Bad], Stage1]:
    stage1 = load_stage1(checkpoint)
    plain = look(world, stage1, work / "plain", Tolerance())
    return kinds(plain), stage1


def all_of_them(root: Path, checkpoint: Path) -> Outcome:
    """Every defect, tried once."""
    bad, stage1 = start_from(root / "world", checkpoint, root / "bad")
    os.environ["HF_HUB_OFFLINE"] = "1"
    ends = {case.what: tried(case, root / "world", stage1, root / "bad" / "one") for case in bad}
    wrong = {what: end for what, end in ends.items() if end}
    lost = "; ".join(f"{what}: {end}" for what, end in wrong.items())
    return Outcome("bad inputs", len(ends), f"{len(ends) - len(wrong)} used, left out or refused as they must be", lost)
