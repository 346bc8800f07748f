"""The check of a data set: each kind of problem, its severity, and the report as text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlr_fast.data.check import check_dataset, format_report


class Pictures:
    """Writes pictures that differ from each other."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def image(self, path: Path, shape: tuple[int, ...] = (16, 16, 3)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        return path

    def mask(self, path: Path, shape: tuple[int, int] = (16, 16), marked: int = 64) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros(shape, dtype=np.uint8)
        pixels.flat[:marked] = 1
        Image.fromarray(pixels).save(path)
        return path

    def mvtec_class(self, folder: Path) -> None:
        for index in range(3):
            self.image(folder / f"train/good/{index}.png")
            self.image(folder / f"test/dent/{index}.png")
            self.mask(folder / f"ground_truth/dent/{index}_mask.png")
        self.image(folder / "test/good/0.png")
        (folder / "readme.txt").write_text("not an image")


@pytest.fixture
def pictures():
    return Pictures()


@pytest.fixture
def root(tmp_path, pictures):
    """A sound set of two classes."""
    for name in ("bottle", "nut"):
        pictures.mvtec_class(tmp_path / "set" / name)
    return tmp_path / "set"


def kinds(report) -> list[tuple[str, str, str, str | None]]:
    return [
        (found.severity, found.kind, found.category, found.path and found.path.name)
        for found in report.problems
    ]


def test_sound_set_has_no_problems(root):
    report = check_dataset(root, size=(8, 8))
    assert report.problems == []
    assert report.ok
    nut = report.classes["nut"]
    assert (nut.train, nut.validation, nut.test_good, nut.masks) == (3, 0, 1, 3)
    assert nut.test_defects == {"dent": 3}
    assert nut.image_sizes == {(16, 16): 7}
    lines = format_report(report).splitlines()
    assert lines[-1] == "ok: 2 classes, 14 images and 6 masks can be read"
    assert lines[2].split()[:4] == ["class", "train", "good", "defective"]
    assert lines[3] == "bottle      3     1          3  16 x 16            0  dent 3"


def test_every_file_is_decoded_to_its_end(root):
    for name in ("train/good/1.png", "test/dent/2.png", "ground_truth/dent/0_mask.png"):
        path = root / "nut" / name
        path.write_bytes(path.read_bytes()[:-30])
    assert kinds(check_dataset(root)) == [
        ("error", "unreadable", "nut", "1.png"),
        ("error", "unreadable", "nut", "0_mask.png"),
        ("error", "unreadable", "nut", "2.png"),
    ]


def test_pixels_that_a_run_would_refuse_are_an_error(root):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(root / "nut/train/good/9.tif")
    assert kinds(check_dataset(root)) == [("error", "unreadable", "nut", "9.tif")]


def test_link_that_leads_nowhere_is_missing(root):
    (root / "nut/train/good/9.png").symlink_to(root / "gone.png")
    report = check_dataset(root)
    assert kinds(report) == [("error", "missing", "nut", "9.png")]
    assert not report.ok


def test_file_that_only_the_table_of_visa_knows_is_missing(tmp_path, pictures):
    folder = tmp_path / "candle/Data"
    pictures.image(folder / "Images/Normal/0.JPG")
    pictures.image(folder / "Images/Normal/1.JPG")
    pictures.image(folder / "Images/Anomaly/0.JPG")
    pictures.image(folder / "Images/Anomaly/1.JPG")
    pictures.mask(folder / "Masks/Anomaly/0.png")
    pictures.mask(folder / "Masks/Anomaly/1.png")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text(
        "object,split,label,image,mask\n"
        "candle,train,normal,candle/Data/Images/Normal/0.JPG,\n"
        "candle,train,normal,candle/Data/Images/Normal/7.JPG,\n"
        "candle,test,normal,candle/Data/Images/Normal/1.JPG,\n"
        "candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png\n"
    )
    assert kinds(check_dataset(tmp_path)) == [
        ("error", "missing", "candle", "7.JPG"),
        ("warning", "not-read", "candle", "Anomaly"),
        ("warning", "orphan-mask", "candle", "1.png"),
    ]


def test_class_of_visas_table_that_has_no_folder_is_missing(tmp_path):
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text(
        "object,split,label,image,mask\ncandle,train,normal,candle/Data/Images/Normal/0.JPG,\n"
    )
    report = check_dataset(tmp_path)
    assert ("error", "missing", "candle", "0.JPG") in kinds(report)


def test_mask_of_another_size_is_an_error(root, pictures):
    pictures.mask(root / "nut/ground_truth/dent/1_mask.png", (16, 12))
    report = check_dataset(root, size=(8, 8))
    assert kinds(report) == [("error", "mask-size", "nut", "1_mask.png")]
    assert "16 x 12" in report.problems[0].message
    assert "16 x 16" in report.problems[0].message


def test_masks_of_one_image_that_differ_in_size(tmp_path, pictures):
    # LOCO: several masks an image; their union must not be tried.
    folder = tmp_path / "box"
    for split in ("train", "validation", "test"):
        pictures.image(folder / split / "good/0.png")
    pictures.image(folder / "test/logical_anomalies/0.png")
    pictures.mask(folder / "ground_truth/logical_anomalies/0/0.png")
    pictures.mask(folder / "ground_truth/logical_anomalies/0/1.png", (12, 16))
    report = check_dataset(tmp_path, size=(8, 8))
    assert report.layout == "loco"
    assert kinds(report) == [("error", "mask-size", "box", "1.png")]
    assert report.classes["box"].validation == 1
    assert "validation" in format_report(report)


def test_defect_without_mask_is_an_error_where_others_have_one(root):
    (root / "nut/ground_truth/dent/1_mask.png").unlink()
    assert kinds(check_dataset(root)) == [("error", "no-mask", "nut", "1.png")]


def test_class_without_masks_is_an_error_where_another_has_them(root):
    shutil.rmtree(root / "nut/ground_truth")
    assert {entry[:3] for entry in kinds(check_dataset(root))} == {("error", "no-mask", "nut")}


def test_set_without_any_mask_is_one_warning(root):
    for name in ("bottle", "nut"):
        shutil.rmtree(root / name / "ground_truth")
    report = check_dataset(root)
    assert kinds(report) == [("warning", "no-truth", "", root.name)]
    assert report.ok


def test_empty_mask_is_a_warning(root, pictures):
    pictures.mask(root / "nut/ground_truth/dent/1_mask.png", marked=0)
    assert kinds(check_dataset(root)) == [("warning", "empty-mask", "nut", "1_mask.png")]


def test_mask_that_vanishes_at_the_size_of_a_run_is_a_warning(root, pictures):
    pictures.mask(root / "nut/ground_truth/dent/1_mask.png", marked=1)
    assert check_dataset(root).problems == []
    assert check_dataset(root, size=(16, 16)).problems == []
    report = check_dataset(root, size=(4, 4))
    assert kinds(report) == [("warning", "empty-mask", "nut", "1_mask.png")]
    assert "1 marked pixels vanish when resized to 4 x 4" in report.problems[0].message


def test_jpeg_mask_is_a_warning(root, pictures):
    (root / "nut/ground_truth/dent/1_mask.png").unlink()
    pictures.mask(root / "nut/ground_truth/dent/1_mask.jpg", marked=128)
    assert ("warning", "lossy-mask", "nut", "1_mask.jpg") in kinds(check_dataset(root))


def test_orphan_masks_and_unread_images_are_warnings(root, pictures):
    pictures.mask(root / "nut/ground_truth/dent/7_mask.png")
    pictures.mask(root / "nut/ground_truth/crack/0_mask.png")
    pictures.image(root / "nut/train/bad/0.png")
    pictures.image(root / "nut/train/bad/1.png")
    report = check_dataset(root)
    assert sorted(kinds(report)) == [
        ("warning", "not-read", "nut", "bad"),
        ("warning", "orphan-mask", "nut", "0_mask.png"),
        ("warning", "orphan-mask", "nut", "7_mask.png"),
    ]
    assert "2 images" in next(p.message for p in report.problems if p.kind == "not-read")


def test_pictures_of_a_kind_that_is_not_read_are_counted(root):
    for name in ("a.heic", "b.JP2", ".c.jp2", "notes.txt"):
        (root / "nut/train/good" / name).write_bytes(b"picture")
    report = check_dataset(root)
    assert kinds(report) == [("warning", "not-read", "nut", "good")]
    assert report.problems[0].message == "2 files of .heic, .jp2 in it, which are not read"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("train/goood", "train/good"), ("trian/good", "train/good"), ("test/Good", "test/good")],
)
def test_a_misspelled_folder_is_told_what_it_may_be(root, wrong, right):
    (root / "nut" / wrong).parent.mkdir(exist_ok=True)
    (root / "nut" / right).rename(root / "nut" / wrong)
    messages = [problem.message for problem in check_dataset(root).problems]
    part = next(w for w, r in zip(wrong.split("/"), right.split("/"), strict=True) if w != r)
    meant = next(r for w, r in zip(wrong.split("/"), right.split("/"), strict=True) if w != r)
    assert any(f"is {part!r} meant to be {meant!r}?" in message for message in messages)


def test_a_folder_of_normal_images_is_told_what_it_is_enough_for(tmp_path, pictures):
    pictures.image(tmp_path / "0.png")
    assert "enough for train and predict, not for eval" in format_report(check_dataset(tmp_path))


def test_empty_masks_of_normal_images_are_no_orphans(root, pictures):
    pictures.mask(root / "nut/ground_truth/good/0_mask.png", marked=0)
    assert check_dataset(root).problems == []


def test_folders_linked_in_a_circle_end(root):
    (root / "nut/again").symlink_to(root / "nut", target_is_directory=True)
    assert check_dataset(root).problems == []


def test_class_without_training_images_is_an_error(root):
    shutil.rmtree(root / "nut/train")
    assert kinds(check_dataset(root)) == [("error", "no-train", "nut", None)]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        pytest.param(("test", "ground_truth"), "no image to test on", id="no-test"),
        pytest.param(("test/good",), "no normal image", id="no-normal"),
        pytest.param(("test/dent", "ground_truth"), "no defective image", id="no-defect"),
    ],
)
def test_class_without_test_images_is_a_warning(root, removed, message):
    for name in removed:
        shutil.rmtree(root / "nut" / name)
    report = check_dataset(root)
    assert kinds(report) == [("warning", "no-test", "nut", None)]
    assert message in report.problems[0].message


def test_plain_folder_is_not_blamed_for_having_no_test(tmp_path, pictures):
    pictures.image(tmp_path / "screws/a.png")
    report = check_dataset(tmp_path / "screws")
    assert report.problems == []
    assert report.classes["screws"].train == 1


def test_images_beside_the_classes_are_told(root, pictures):
    pictures.image(root / "washer/Train/good/0.png")
    pictures.image(root / "washer/Test/dent/0.png")
    pictures.image(root / "photos/0.png")
    pictures.image(root / "loose.png")
    (root / "notes").mkdir()
    report = check_dataset(root)
    assert kinds(report) == [
        ("warning", "not-read", "", name) for name in (root.name, "photos", "washer")
    ]
    told = [problem.message for problem in report.problems]
    assert told[0] == "layout mvtec has no use for 1 image right in it"
    assert told[1].endswith("it is no class, without train or test")
    assert "the images in it; is 'Test' meant to be 'test'?" in told[2]
    assert kinds(check_dataset(root, classes=["nut"])) == []  # the others are left out on purpose
    assert kinds(check_dataset(root / "nut")) == []


def test_an_image_that_a_table_has_in_two_splits_is_told_once(tmp_path, pictures):
    rows = ["object,split,label,image,mask"]
    for split in ("train", "test"):
        name = f"nut/Data/Images/Normal/{split}.JPG"
        pictures.image(tmp_path / name)
        rows.append(f"nut,{split},normal,{name},")
    rows.append(rows[1].replace("train,", "test,"))
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(rows))
    found = [kind for _, kind, *_ in kinds(check_dataset(tmp_path))]
    assert found.count("leak") == 1


def test_same_file_to_train_and_to_test_on_is_a_leak_across_classes(root, tmp_path, pictures):
    shutil.copy(root / "bottle/train/good/0.png", root / "nut/test/good/5.png")
    # Of the same length, but another picture: not a leak.
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    for name in ("bottle/train/good/8.bmp", "nut/test/good/8.bmp"):
        pixels += 1
        Image.fromarray(pixels).save(root / name)
    report = check_dataset(root)
    assert kinds(report) == [("warning", "leak", "nut", "5.png")]
    assert str(root / "bottle/train/good/0.png") in report.problems[0].message


def test_same_file_to_validate_and_to_test_on_is_a_leak(root, pictures):
    path = pictures.image(root / "nut/validation/good/0.png")
    shutil.copy(path, root / "nut/test/good/5.png")
    assert kinds(check_dataset(root)) == [("warning", "leak", "nut", "5.png")]


def test_same_file_to_train_and_to_validate_on_is_a_leak(root, pictures):
    path = pictures.image(root / "nut/validation/good/0.png")
    shutil.copy(path, root / "nut/train/good/5.png")
    shutil.copy(path, root / "nut/validation/good/1.png")
    report = check_dataset(root)
    assert kinds(report) == [("warning", "leak", "nut", name) for name in ("0.png", "1.png")]
    assert report.problems[0].message == f"the same file as {root / 'nut/train/good/5.png'}, " + (
        "which is not to be calibrated on"
    )


@pytest.mark.parametrize(("peak", "dark"), [(4095, True), (65535, False)], ids=["12-bit", "16-bit"])
def test_12_bit_pictures_in_16_bits_are_told(root, peak, dark):
    for index in range(2):
        pixels = np.full((16, 16), 100 + index, dtype=np.uint16)
        pixels[0, 0] = peak if index else 50
        Image.fromarray(pixels).save(root / f"nut/train/good/deep{index}.png")
    expected = [("warning", "dark", "nut", "nut")] if dark else []
    assert kinds(check_dataset(root)) == expected


def test_only_the_classes_asked_for_are_checked(root):
    shutil.rmtree(root / "nut/train")
    assert check_dataset(root, classes=["bottle"]).ok


def test_folder_without_a_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="known layout"):
        check_dataset(tmp_path)


def test_size_is_checked_even_without_masks(root):
    with pytest.raises(ValueError, match="size must be"):
        check_dataset(root, size=(0, 8))


def test_report_counts_what_it_does_not_show(root, pictures):
    for index in range(9):
        (root / f"nut/train/good/b{index}.png").write_bytes(b"")
    pictures.image(root / "nut/test/good/1.png", (8, 20))
    shutil.copy(root / "nut/test/good/1.png", root / "nut/train/good/1.png")
    text = format_report(check_dataset(root))
    lines = text.splitlines()
    assert lines[-1] == "9 problems would stop a run or cost it files, 1 warning"
    assert sum(line.startswith("error in nut [unreadable]") for line in lines) == 6
    assert "error in nut [unreadable] and 4 more like these" in lines
    assert sum(line.startswith("warning in nut [leak]") for line in lines) == 1
    assert "8 x 16 to 16 x 20" in text


def test_single_problem_is_said_in_the_singular(root):
    shutil.rmtree(root / "nut/train")
    report = check_dataset(root)
    assert format_report(report).splitlines()[-1] == "1 problem would stop a run or cost it files"


def test_number_of_threads_does_not_change_the_report(root):
    (root / "nut/train/good/1.png").write_bytes(b"")
    (root / "nut/ground_truth/dent/1_mask.png").unlink()
    assert check_dataset(root, workers=1) == check_dataset(root, workers=8)
