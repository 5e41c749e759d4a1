"""The readers of SSVTP and HCT, on files in the public format."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tvl_align.data.text import adjectives
from tvl_align.data.tvl import Tolerance, background_file, read_tvl
from tvl_align.system.console import UserError


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(hashlib.sha256(str(path).encode()).digest()[:3])  # no two files are equal
    Image.new("RGB", (32, 24), colour).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve SSVTP rows, two HCT folders of three trajectories, test splits, not-in-contact rows."""
    root = tmp_path / "datasets"
    lines = ["url,tactile,caption"]
    for n in range(12):
        image(root / f"ssvtp/images_rgb/image_{n}_rgb.jpg")
        image(root / f"ssvtp/images_tac/image_{n}_tac.jpg")
        if n < 10:
            lines.append(f'images_rgb/image_{n}_rgb.jpg,images_tac/image_{n}_tac.jpg,"soft, word{n}."')
    (root / "ssvtp/train.csv").write_text("\n".join(lines))
    (root / "ssvtp/test.csv").write_text('url,caption\nimages_rgb/image_10_rgb.jpg,"hard"\nimages_rgb/image_11_rgb.jpg,')
    (root / "ssvtp/text").mkdir()
    (root / "ssvtp/text/labels_11.txt").write_text("rough, stony\nsecond line")
    for sub in ("data1", "data3"):
        folder = root / "hct" / sub
        rows = {"contact": [], "not_contact": [], "test": []}
        for press in range(3):
            for kind in rows:
                for frame in range(2):
                    name = f"cup-170000000{press}/vision/{kind}{frame}-0.1.jpg"
                    for path in (name, name.replace("vision", "tactile")):
                        image(folder / path)
                    rows[kind].append(name)
            image(folder / f"cup-170000000{press}/tactile_bg_latent.jpg")
        header = "url,tactile,tactile_background,caption"
        for split, kind in (("train", "contact"), ("test", "test")):
            body = [
                f'{n},{n.replace("vision", "tactile")},{n.split("/")[0]}/tactile_bg_latent.jpg,"smooth, cup"'
                for n in rows[kind]
            ]
            (folder / f"{split}.csv").write_text("\n".join([header, *body]))
        for kind in ("contact", "not_contact"):
            lists = {"vision": rows[kind], "tactile": [n.replace("vision", "tactile") for n in rows[kind]]}
            lists["background"] = [f"{n.split('/')[0]}/tactile_bg_latent.jpg" for n in rows[kind]]
            (folder / f"{kind}.json").write_text(json.dumps(lists))
    return root


def test_rows_have_the_paths_captions_and_groups_of_the_files(data: Path) -> None:
    read = read_tvl(data)
    assert len(read.train) + len(read.val) == 10 + 12
    assert len(read.test) == 2 + 12
    row = next(r for r in read.train if r.dataset == "ssvtp")
    number = row.group.split("/")[1]
    assert row.tactile == f"ssvtp/images_tac/image_{number}_tac.jpg"
    assert row.caption == f"soft, word{number}."
    hct = next(r for r in read.train if r.dataset == "hct")
    assert hct.group.startswith("hct/data")
    assert hct.background is not None
    assert not read.dropped


def test_ssvtp_test_rows_get_derived_touch_paths_and_captions_of_label_files(data: Path) -> None:
    rows = {r.vision: r for r in read_tvl(data).test if r.dataset == "ssvtp"}
    assert rows["ssvtp/images_rgb/image_10_rgb.jpg"].tactile == "ssvtp/images_tac/image_10_tac.jpg"
    assert rows["ssvtp/images_rgb/image_11_rgb.jpg"].caption == "rough, stony"


def test_no_validation_or_test_row_is_a_training_row(data: Path) -> None:
    """The split is by trajectory and image id, before not-in-contact rows are added."""
    plain, more = read_tvl(data), read_tvl(data, use_not_contact=True, percent_not_contact=0.5)
    for read in (plain, more):
        assert not {r.group for r in read.val} & {r.group for r in read.train if r.contact}
        assert not {r.name for r in read.test} & {r.name for r in read.train + read.val}
        assert all(r.contact for r in read.val + read.test)
    assert plain.val == more.val
    added = [r for r in more.train if not r.contact]
    assert len(added) == min(12, int(0.5 * len(plain.train)))
    assert {r.caption for r in added} == {"background"}


def test_columns_are_found_by_the_header(data: Path) -> None:
    path = data / "ssvtp/train.csv"
    path.write_text(
        'caption,tactile,url\n"soft",images_tac/image_1_tac.jpg,images_rgb/image_0_rgb.jpg\r\n', encoding="utf-8-sig"
    )
    (row,) = [r for r in read_tvl(data, ["ssvtp"]).train + read_tvl(data, ["ssvtp"]).val]
    assert (row.vision, row.tactile) == ("ssvtp/images_rgb/image_0_rgb.jpg", "ssvtp/images_tac/image_1_tac.jpg")
    path.write_text("link,tactile\nx,y")
    with pytest.raises(UserError, match=r"train\.csv has no column 'url' \(its header: link, tactile\)"):
        read_tvl(data)


def tabs(text: str) -> str:
    return "\n".join("\t".join(cells) for cells in csv.reader(io.StringIO(text)))


def every_line(change: Callable[[int, str], str]) -> Callable[[str], str]:
    return lambda text: "\n".join(change(i, line) for i, line in enumerate(text.splitlines()))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: re.sub(r",(?=i|t|c|\")", ";", text),  # captions keep their commas
        lambda text: text.replace(",", ";"),
        tabs,
        every_line(lambda i, line: f"{i - 1 if i else ''},{line}"),
        every_line(lambda i, line: line + ("," if i else "")),
        lambda text: text.replace("images_rgb/", "images_rgb\\").replace("images_tac/", "images_tac\\"),
        lambda text: text.replace("url,tactile,caption", "URL, Tactile,CAPTION"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: re.sub(r"soft, (\w+)\.", r"['soft', '\1']", text),
        lambda text: text.replace("soft, ", "soft\uff0c"),
    ],
    ids=[
        *("semicolons", "semicolons in captions", "tabs", "pandas index", "trailing commas", "backslashes", "capitals"),
        *("CR", "blank lines", "lists", "full-width commas"),
    ],
)
def test_tables_of_other_systems_have_the_same_rows(data: Path, change: Callable[[str], str]) -> None:
    def rows() -> list[tuple[str | None, str | None, list[str], str]]:
        read = read_tvl(data, ["ssvtp"])
        assert not read.dropped
        return [(r.vision, r.tactile, adjectives(r.caption or ""), r.group) for r in read.train + read.val]

    path, before = data / "ssvtp/train.csv", rows()
    assert before[0][2][0] == "soft"
    path.write_bytes(change(path.read_text()).encode())
    assert rows() == before


def test_a_column_that_is_there_twice_is_refused(data: Path) -> None:
    path = data / "ssvtp/train.csv"
    path.write_text(path.read_text().replace("url,tactile,caption", "url,Caption,caption"))
    with pytest.raises(UserError, match=r"train\.csv has 2 columns named 'caption'; keep one of them"):
        read_tvl(data)


def test_cells_that_say_no_value_have_none(data: Path) -> None:
    """The touch path is absent, and the caption comes from the label file."""
    path = data / "ssvtp/train.csv"
    (data / "ssvtp/text/labels_3.txt").write_text("rough")
    (data / "ssvtp/text/labels_4.txt").write_text("None")
    text = path.read_text().replace('"soft, word3."', "NaN").replace('"soft, word4."', "N/A").replace('"soft, word5."', "-")
    path.write_text(text.replace("images_tac/image_6_tac.jpg", "null"))
    lists = json.loads((data / "hct/data1/contact.json").read_text())
    (data / "hct/data1/train.csv").unlink()
    (data / "hct/data1/contact.json").write_text(json.dumps(lists | {"background": [None] * 6}))
    read = read_tvl(data)
    rows = {r.group: r for r in read.train + read.val if r.dataset == "ssvtp"}
    assert [rows[f"ssvtp/{n}"].caption for n in (3, 4, 5)] == ["rough", None, None]
    assert rows["ssvtp/6"].tactile is None and rows["ssvtp/6"].caption == "soft, word6."
    assert {r.background for r in read.train + read.val if r.name.startswith("hct/data1")} == {None}


def test_names_that_are_not_ascii_are_the_same_in_any_locale(data: Path, tmp_path: Path) -> None:
    folder = data / "hct/d\u00e4ta1"
    (data / "hct/data1").rename(folder)
    (folder / "cup-1700000000").rename(folder / "gr\u00f6\u00dfe-1")
    for name in ("train.csv", "test.csv"):
        text = (folder / name).read_text(encoding="utf-8").replace("cup-1700000000", "gr\u00f6\u00dfe-1")
        (folder / name).write_text(text, encoding="utf-8")
    moved = data.rename(tmp_path / "\u00fcber")
    script = "import sys; from pathlib import Path; from tvl_align.data.tvl import read_tvl; " + (
        "d = read_tvl(Path(sys.argv[1])); print(d.dropped, ascii(sorted(map(str, d.train + d.val + d.test))))"
    )
    found = []
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONUTF8": "1"}):
        command = [sys.executable, "-c", script, str(moved)]
        found.append(subprocess.run(command, capture_output=True, env=os.environ | locale, check=True).stdout)
    assert found[0] == found[1] and rb"hct/d\xe4ta1/gr\xf6\xdfe-1/vision" in found[0] and b"Counter()" in found[0]


def test_without_a_csv_rows_come_from_the_json_without_captions(data: Path) -> None:
    (data / "hct/data1/train.csv").unlink()
    read = read_tvl(data)
    rows = [r for r in read.train + read.val if r.name.startswith("hct/data1")]
    assert len(rows) == 6
    assert {r.caption for r in rows} == {None}


def test_a_folder_may_have_test_rows_only(data: Path) -> None:
    (data / "hct/data1/train.csv").unlink()
    (data / "hct/data1/contact.json").unlink()
    read = read_tvl(data)
    assert len(read.train) + len(read.val) == 10 + 6 and len(read.test) == 2 + 12


def test_unusable_rows_are_dropped_with_a_reason(data: Path) -> None:
    (data / "ssvtp/images_tac/image_3_tac.jpg").unlink()
    (data / "ssvtp/images_rgb/image_4_rgb.jpg").unlink()
    outside = "\nimages_rgb/../../secret_rgb.jpg,,x\n/etc/image_1_rgb.jpg,/etc/passwd,x\n../image_2_rgb.jpg,../x.jpg,x"
    again = '\nimages_rgb/image_5_rgb.jpg,images_tac/image_5_tac.jpg,"soft, word5."\nimages_rgb/image_6_rgb.jpg,,'
    with (data / "ssvtp/train.csv").open("a") as file:
        file.write(outside + again)
    (data / "ssvtp/text/labels_6.txt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"6 of \d+ rows are bad, more than 5%"):
        read_tvl(data)
    with pytest.raises(UserError, match="--strict allows no bad row"):
        read_tvl(data, tolerance=Tolerance(strict=True, max_skipped=1.0))
    read = read_tvl(data, tolerance=Tolerance(max_skipped=0.5))
    assert dict(read.dropped) == {
        "tactile file is missing": 1,
        "vision file is missing": 1,
        "SSVTP photo is not named image_<N>_rgb": 1,
        "vision path is outside the data folder": 2,
        "duplicate of another row": 1,
        "fewer than two modalities": 1,
    }
    assert len(read.train) + len(read.val) == 22 - 2


def test_folder_names_above_the_data_do_not_matter(data: Path, tmp_path: Path) -> None:
    """For example "data3" or "rgb"."""
    moved = tmp_path / "data3_rgb" / "images_rgb" / "hct"
    moved.parent.mkdir(parents=True)
    shutil.move(data, moved)
    read = read_tvl(moved)
    assert {r.tactile for r in read.test if r.dataset == "ssvtp"} == {
        f"ssvtp/images_tac/image_{n}_tac.jpg" for n in (10, 11)
    }
    assert not read.dropped


def test_data_one_level_too_deep_are_found(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = [r.name for r in read_tvl(data).train]
    inner = data / "ssvtp" / "ssvtp"
    inner.mkdir()
    for child in list((data / "ssvtp").iterdir()):
        if child != inner:
            shutil.move(child, inner)
    assert [r.name.replace("ssvtp/ssvtp/", "ssvtp/") for r in read_tvl(data).train] == expected
    assert "one level deeper" in caplog.text
    caplog.clear()
    above = tmp_path / "above"
    above.mkdir()
    shutil.move(data, above / "unpacked")
    assert len(read_tvl(above).train) == len(expected)
    assert "one level deeper" in caplog.text


def test_missing_folders_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_tvl(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no ssvtp/ or hct/ \(found: nothing\)"):
        read_tvl(tmp_path / "empty")
    shutil.rmtree(data / "hct")
    with pytest.raises(UserError, match="has no hct/; add the folder or leave hct out of --datasets"):
        read_tvl(data)
    with pytest.raises(UserError, match="unknown data set 'imagenet'"):
        read_tvl(data, ["imagenet"])


def test_lists_that_are_not_parallel_are_an_error(data: Path) -> None:
    path = data / "hct/data1/not_contact.json"
    path.write_text(json.dumps({"vision": ["a"], "tactile": ["b", "c"]}))
    with pytest.raises(UserError, match="different lengths"):
        read_tvl(data, use_not_contact=True)
    path.write_text("{}")
    with pytest.raises(UserError, match="must contain the lists vision and tactile"):
        read_tvl(data, use_not_contact=True)


def test_background_of_a_row(data: Path) -> None:
    read = read_tvl(data)
    row = next(r for r in read.train if r.dataset == "hct")
    assert background_file(data, row) == data / row.background
    (data / row.background).unlink()
    assert background_file(data, row) is None
    image(data / "hct/digit_background.png")
    assert background_file(data, row) == data / "hct/digit_background.png"


def test_trajectories_with_the_same_picture_are_one_group(data: Path) -> None:
    """A copy of a photo under another name keeps its trajectory on the side of the other one, for any seed."""
    one, other = (data / f"hct/data1/cup-170000000{press}/vision/contact0-0.1.jpg" for press in (0, 2))
    other.write_bytes(one.read_bytes())
    image_3, image_7 = (data / f"ssvtp/images_tac/image_{n}_tac.jpg" for n in (3, 7))
    image_7.write_bytes(image_3.read_bytes())
    for seed in range(5):
        read = read_tvl(data, seed=seed)
        groups = {row.group for row in read.train + read.val}
        assert {"hct/data1/cup-1700000000", "ssvtp/3"} <= groups
        assert not {"hct/data1/cup-1700000002", "ssvtp/7"} & groups
        assert len(groups) == 10 + 6 - 2
        assert not {row.group for row in read.val} & {row.group for row in read.train}
