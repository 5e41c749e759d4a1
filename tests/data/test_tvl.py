"""The readers of SSVTP and HCT, on files in the public format."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tvl_align.data.tvl import Tolerance, background_file, read_tvl
from tvl_align.system.console import UserError


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (90, 120, 60)).save(path)


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


def test_without_a_csv_rows_come_from_the_json_without_captions(data: Path) -> None:
    (data / "hct/data1/train.csv").unlink()
    read = read_tvl(data)
    rows = [r for r in read.train + read.val if r.name.startswith("hct/data1")]
    assert len(rows) == 6
    assert {r.caption for r in rows} == {None}


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
