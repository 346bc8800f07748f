"""Layouts of data sets: what is found where, and what is said when nothing fits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import save_picture

from rlr_fast.data.layouts import LAYOUTS, find_class, list_images, read_dataset


def touch(root: Path, *names: str) -> None:
    """Empty files: layouts are read from names alone."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_mvtec_class(folder: Path) -> None:
    touch(folder, "train/good/001.png", "train/good/000.png", "license.txt", "readme.txt")
    touch(folder, "test/good/000.png", "test/scratch/000.png", "test/scratch/001.png")
    touch(folder, "test/dent/000.png", "ground_truth/dent/000_mask.png")
    touch(folder, "ground_truth/scratch/000_mask.png", "ground_truth/scratch/001_mask.png")


def make_visa(root: Path) -> None:
    rows = ["object,split,label,image,mask"]
    for name in ("pcb1", "candle"):
        normal, anomaly = f"{name}/Data/Images/Normal", f"{name}/Data/Images/Anomaly"
        masks = f"{name}/Data/Masks/Anomaly"
        touch(root, f"{normal}/0000.JPG", f"{normal}/0001.JPG", f"{anomaly}/000.JPG")
        touch(root, f"{masks}/000.png")
        rows += [
            f"{name},train,normal,{normal}/0001.JPG,",
            f"{name},test,normal,{normal}/0000.JPG,{masks}/000.png",  # not to be used
            f"{name},test,anomaly,{anomaly}/000.JPG,{masks}/000.png",
        ]
    touch(root, "split_csv/1cls.csv", "split_csv/2cls_fewshot.csv")
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")


def make_visa_converted_class(folder: Path) -> None:
    touch(folder, "train/good/0001.JPG", "test/good/0000.JPG", "test/bad/000.JPG")
    touch(folder, "ground_truth/bad/000.png")


def make_loco_class(folder: Path) -> None:
    touch(folder, "train/good/000.png", "validation/good/000.png", "test/good/000.png")
    touch(folder, "test/logical_anomalies/000.png", "test/structural_anomalies/000.png")
    touch(folder, "ground_truth/logical_anomalies/000/001.png", "defects_config.json")
    touch(folder, "ground_truth/logical_anomalies/000/000.png")
    touch(folder, "ground_truth/structural_anomalies/000/000.png")


def make_btad(root: Path) -> None:
    touch(root, "01/train/ok/0000.bmp", "01/test/ok/0001.bmp", "01/test/ko/0000.bmp")
    touch(root, "01/ground_truth/ko/0000.png")
    touch(root, "02/train/ok/0000.png", "02/test/ok/0001.png", "02/test/ko/0000.png")
    touch(root, "02/ground_truth/ko/0000.bmp")


def make(root: Path, layout: str) -> None:
    if layout == "mvtec":
        make_mvtec_class(root / "screw")
        make_mvtec_class(root / "bottle")
    elif layout == "visa":
        make_visa(root)
    elif layout == "visa-converted":
        make_visa_converted_class(root / "1cls/candle")
        make_visa_converted_class(root / "1cls/pcb1")
    elif layout == "loco":
        make_loco_class(root / "juice_bottle")
    elif layout == "btad":
        make_btad(root)
    else:
        touch(root, "a.png", "b.JPG")


def paths(samples) -> list[str]:
    return [sample.path.name for sample in samples]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognized_and_equals_the_explicit_one(tmp_path, layout):
    make(tmp_path, layout)
    found = read_dataset(tmp_path)
    assert found.layout == layout
    assert found == read_dataset(tmp_path, layout)
    assert all(found.train[name] for name in found.classes)
    for samples in (*found.train.values(), *found.test.values(), *found.validation.values()):
        for sample in samples:
            assert sample.path.is_file()
            assert all(path.is_file() for path in sample.mask_paths)


def test_mvtec_pairs_images_with_masks_and_ignores_stray_files(tmp_path):
    make(tmp_path, "mvtec")
    touch(tmp_path, "license.txt", "bottle/test/scratch/.DS_Store", "bottle/train/good/.hidden.png")
    touch(tmp_path, "bottle/train/good/Thumbs.db", ".cache/train/good/0.png")
    data = read_dataset(tmp_path)
    assert data.classes == ("bottle", "screw")
    assert paths(data.train["bottle"]) == ["000.png", "001.png"]
    assert {sample.defect for sample in data.train["bottle"]} == {"good"}
    test = [
        (sample.defect, sample.path.name, [mask.name for mask in sample.mask_paths])
        for sample in data.test["bottle"]
    ]
    assert test == [
        ("dent", "000.png", ["000_mask.png"]),
        ("good", "000.png", []),
        ("scratch", "000.png", ["000_mask.png"]),
        ("scratch", "001.png", ["001_mask.png"]),
    ]
    assert [sample.is_anomaly for sample in data.test["bottle"]] == [True, False, True, True]
    # The mask has the same name in two folders: it has to come from the folder of its own defect.
    assert [sample.mask_paths[0].parent.name for sample in data.test["bottle"][::2]] == [
        "dent",
        "scratch",
    ]
    assert {sample.category for sample in data.test["screw"]} == {"screw"}


def test_missing_mask_is_left_empty_not_invented(tmp_path):
    make_mvtec_class(tmp_path / "bottle")
    (tmp_path / "bottle/ground_truth/scratch/001_mask.png").unlink()
    masks = [sample.mask_paths for sample in read_dataset(tmp_path).test["bottle"]]
    assert [len(found) for found in masks] == [1, 0, 1, 0]


def test_visa_takes_split_and_masks_from_its_table(tmp_path):
    make_visa(tmp_path)
    data = read_dataset(tmp_path)
    assert data.classes == ("candle", "pcb1")
    assert paths(data.train["candle"]) == ["0001.JPG"]
    anomaly, normal = data.test["candle"]
    assert (anomaly.defect, normal.defect) == ("anomaly", "good")
    assert anomaly.mask_paths == (tmp_path / "candle/Data/Masks/Anomaly/000.png",)
    assert normal.mask_paths == ()
    assert read_dataset(tmp_path, classes=["pcb1"]).classes == ("pcb1",)


def test_visa_table_with_byte_order_mark_and_windows_line_ends(tmp_path):
    make_visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    expected = read_dataset(tmp_path)
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\n", b"\r\n"))
    assert read_dataset(tmp_path) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(
            "candle,trian,normal,a.JPG,", "line 2: split must be train or test", id="split"
        ),
        pytest.param("candle,test,odd,a.JPG,", "line 2: label must be normal or ano", id="label"),
        pytest.param("candle,test,normal,,", "line 2: object and image", id="no-image"),
        pytest.param("../a,test,normal,a.JPG,", "object must be a name without", id="way-out"),
        pytest.param("..,test,normal,a.JPG,", "object must be a name without", id="parent"),
        pytest.param("a\\b,test,normal,a.JPG,", "object must be a name without", id="backslash"),
        pytest.param("a,test,normal,/etc/a.JPG,", "image must lie in the data set", id="absolute"),
        pytest.param("a,test,normal,b/../../a.JPG,", "image must lie in the data", id="outside"),
        pytest.param("a,test,anomaly,a.JPG,../m.png", "mask must lie in the data", id="mask"),
        pytest.param("x" * 200_000, r"1cls\.csv' cannot be read: field larger", id="long-field"),
        pytest.param("candle,test,normal", "line 2: object and image", id="short-row"),
        pytest.param("candle,train,anomaly,a.JPG,", "only normal images", id="defect-in-training"),
    ],
)
def test_visa_table_errors_name_the_line(tmp_path, line, message):
    touch(tmp_path, "split_csv/1cls.csv")
    (tmp_path / "split_csv/1cls.csv").write_text(f"object,split,label,image,mask\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path)


def test_visa_table_that_is_no_text_is_named(tmp_path):
    touch(tmp_path, "split_csv/1cls.csv")
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"object,split,label,image,mask\n\xff,,,,\n")
    with pytest.raises(ValueError, match=r"1cls\.csv' cannot be read: 'utf-8' codec"):
        read_dataset(tmp_path)


def test_visa_table_without_rows_or_with_an_image_twice_is_refused(tmp_path):
    make_visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    lines = table.read_text().splitlines()
    table.write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match=r"1cls\.csv' lists no image"):
        read_dataset(tmp_path)
    table.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match=r"1cls\.csv' lists .* 2 times in "):
        read_dataset(tmp_path)


def test_folders_within_folders_of_images_are_named(tmp_path):
    for name in ("a", "b"):
        save_picture(tmp_path / name / "0.png", 0)
    assert read_dataset(tmp_path).layout == "folder"
    save_picture(tmp_path / "b/maps/0.png", 0)
    with pytest.raises(ValueError, match="must have no folders in them, as has b/"):
        read_dataset(tmp_path)


def test_visa_table_without_a_column_is_refused(tmp_path):
    touch(tmp_path, "split_csv/1cls.csv")
    (tmp_path / "split_csv/1cls.csv").write_text("object,split,label,image\n")
    with pytest.raises(ValueError, match="without mask"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("inner", ["", "1cls"], ids=["folder-around-1cls", "1cls-itself"])
def test_converted_visa_finds_masks_without_suffix(tmp_path, inner):
    make(tmp_path, "visa-converted")
    data = read_dataset(tmp_path / inner)
    assert (data.layout, data.classes) == ("visa-converted", ("candle", "pcb1"))
    bad, _ = data.test["candle"]
    assert bad.mask_paths == (tmp_path / "1cls/candle/ground_truth/bad/000.png",)


def test_converted_visa_under_another_name_reads_the_same_samples(tmp_path):
    make_visa_converted_class(tmp_path / "mine/candle")
    bad, _ = read_dataset(tmp_path / "mine").test["candle"]
    assert [path.name for path in bad.mask_paths] == ["000.png"]


def test_loco_collects_every_mask_of_an_image(tmp_path):
    make_loco_class(tmp_path / "juice_bottle")
    data = read_dataset(tmp_path)
    _, logical, structural = data.test["juice_bottle"]
    assert [path.name for path in logical.mask_paths] == ["000.png", "001.png"]
    assert logical.defect == "logical_anomalies"
    assert len(structural.mask_paths) == 1
    assert paths(data.validation["juice_bottle"]) == ["000.png"]
    assert len(data.train["juice_bottle"]) == 1


def test_btad_calls_ok_good_and_takes_bmp_and_png(tmp_path):
    make_btad(tmp_path)
    data = read_dataset(tmp_path)
    assert data.classes == ("01", "02")
    for name, suffix in (("01", ".png"), ("02", ".bmp")):
        defective, normal = data.test[name]
        assert (defective.defect, normal.defect) == ("ko", "good")
        assert [path.suffix for path in defective.mask_paths] == [suffix]
        assert not data.train[name][0].is_anomaly


def test_plain_folder_is_one_class_of_training_images(tmp_path):
    touch(tmp_path, "screws/a.png", "screws/B.JPEG", "screws/c.TiFF", "screws/notes.txt")
    data = read_dataset(tmp_path / "screws")
    assert (data.layout, data.classes) == ("folder", ("screws",))
    assert paths(data.train["screws"]) == ["B.JPEG", "a.png", "c.TiFF"]
    assert data.test == {"screws": []}


def test_plain_folders_side_by_side_are_classes(tmp_path):
    touch(tmp_path, "screws/a.png", "nuts/a.png", "readme.txt")
    (tmp_path / "washers").mkdir()
    data = read_dataset(tmp_path)
    assert data.classes == ("nuts", "screws", "washers")
    with pytest.raises(ValueError, match="none for: washers"):
        data.require_train()


@pytest.mark.parametrize("split", ["test", "masks"])
@pytest.mark.parametrize("name", ["bad", "Good"])
def test_a_root_of_any_name_holds_class_folders_unless_it_is_a_split(tmp_path, name, split):
    touch(tmp_path, f"{name}/screws/a.png", f"{split}/scratch/a.png")
    assert read_dataset(tmp_path / name).classes == ("screws",)
    with pytest.raises(ValueError, match="the data's root must have a known layout"):
        read_dataset(tmp_path / split)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("good/a.png", "scratch/a.png"), id="verdicts-are-no-classes"),
        pytest.param(("Train/a.png", "other/a.png"), id="split-in-capitals"),
        pytest.param(("screws/a.png", "archive/2020/a.png"), id="deeper-folders"),
    ],
)
def test_folders_that_may_hold_defects_are_not_taken_for_classes(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match="the data's root must have a known layout"):
        read_dataset(tmp_path)


def test_images_both_here_and_below_need_an_explicit_layout(tmp_path):
    touch(tmp_path, "set/a.png", "set/b/c.png")
    with pytest.raises(ValueError, match="layout='folder' reads those here alone"):
        read_dataset(tmp_path / "set")
    assert paths(read_dataset(tmp_path / "set", "folder").train["set"]) == ["a.png"]


@pytest.mark.parametrize("layout", ["mvtec", "visa-converted", "loco", "btad"])
def test_root_that_is_one_class_is_read_as_one_class(tmp_path, layout, monkeypatch):
    make(tmp_path, layout)
    name = {"mvtec": "screw", "visa-converted": "1cls/pcb1", "loco": "juice_bottle", "btad": "01"}
    folder = tmp_path / name[layout]
    data = read_dataset(folder)
    assert data.classes == (folder.name,)
    assert data.train[folder.name]
    assert any(sample.mask_paths for sample in data.test[folder.name])
    monkeypatch.chdir(folder)
    assert read_dataset(".").classes == (folder.name,)


def test_class_without_training_or_test_images_is_kept_and_named(tmp_path):
    make_mvtec_class(tmp_path / "bottle")
    (tmp_path / "nut/train/good").mkdir(parents=True)
    touch(tmp_path, "screw/test/good/0.png")
    data = read_dataset(tmp_path)
    assert data.classes == ("bottle", "nut", "screw")
    assert data.train["nut"] == data.train["screw"] == data.test["nut"] == []
    with pytest.raises(
        ValueError, match=r"none for: nut, screw\. Expected: images in CLASS/train/g"
    ):
        data.require_train()
    with pytest.raises(ValueError, match=r"none for: nut\. .*CLASS/test/good"):
        data.require_test()
    complete = read_dataset(tmp_path, classes=["bottle"])
    complete.require_train()
    complete.require_test()


def test_unknown_class_lists_the_classes_and_suggests_one(tmp_path):
    make(tmp_path, "mvtec")
    with pytest.raises(ValueError, match=r"among bottle, screw; got unknown botle\. .*'bottle'"):
        read_dataset(tmp_path, classes=["screw", "botle"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        pytest.param("bottle", "single string", id="string-is-not-a-list"),
        pytest.param([], "at least one class", id="none-left"),
    ],
)
def test_classes_that_cannot_be_meant(tmp_path, classes, message):
    make(tmp_path, "mvtec")
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path, classes=classes)


def test_classes_are_sorted_and_taken_once(tmp_path):
    make(tmp_path, "mvtec")
    assert read_dataset(tmp_path, classes=["screw", "bottle", "screw"]).classes == (
        "bottle",
        "screw",
    )


def test_unknown_layout_lists_the_layouts(tmp_path):
    with pytest.raises(ValueError, match="'auto' or one of mvtec, visa, visa-converted, loco"):
        read_dataset(tmp_path, "mvtech")


def test_explicit_layout_that_does_not_fit_says_which_does(tmp_path):
    make(tmp_path, "mvtec")
    with pytest.raises(ValueError, match="it looks like layout 'mvtec'") as error:
        read_dataset(tmp_path, "btad")
    assert "CLASS/train/ok" in str(error.value)
    assert "split_csv" not in str(error.value)
    with pytest.raises(ValueError, match=r"split_csv/1cls\.csv"):
        read_dataset(tmp_path, "visa")


def test_nothing_fits_says_what_was_looked_for_and_found(tmp_path):
    touch(tmp_path, "bottle/images/0.png", "notes.txt")
    with pytest.raises(ValueError, match="known layout") as error:
        read_dataset(tmp_path)
    for expected in (*LAYOUTS, "CLASS/train/good", "bottle/", "notes.txt", str(tmp_path)):
        assert expected in str(error.value)


def test_empty_folder_says_so(tmp_path):
    with pytest.raises(ValueError, match="found: an empty folder"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        pytest.param("", "mvtec_anomaly_detection", id="one-too-high"),
        pytest.param("mvtec_anomaly_detection/bottle/train", "bottle", id="one-too-low"),
    ],
)
def test_neighboring_folder_is_suggested(tmp_path, given, meant):
    make_mvtec_class(tmp_path / "mvtec_anomaly_detection/bottle")
    with pytest.raises(ValueError, match=f"did you mean '.*{meant}'"):
        read_dataset(tmp_path / given)


def test_root_that_is_no_folder(tmp_path):
    touch(tmp_path, "set.zip")
    with pytest.raises(ValueError, match=r"existing folder.*set\.zip.*a file"):
        read_dataset(tmp_path / "set.zip")
    with pytest.raises(ValueError, match="nothing there"):
        read_dataset(tmp_path / "set")


def test_links_to_folders_and_files_are_followed(tmp_path):
    make_mvtec_class(tmp_path / "store/a1b2")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/bottle").symlink_to(tmp_path / "store/a1b2", target_is_directory=True)
    (tmp_path / "store/a1b2/train/good/002.png").symlink_to(
        tmp_path / "store/a1b2/train/good/000.png"
    )
    data = read_dataset(tmp_path / "set")
    assert data.classes == ("bottle",)
    assert paths(data.train["bottle"]) == ["000.png", "001.png", "002.png"]
    (tmp_path / "linked").symlink_to(tmp_path / "store/a1b2", target_is_directory=True)
    assert read_dataset(tmp_path / "linked").classes == ("linked",)


def test_link_that_leads_to_itself_is_listed_and_hides_nothing(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "a.png").touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "loop.png"]


def test_link_that_leads_nowhere_is_listed_so_that_it_is_noticed(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert paths(read_dataset(tmp_path).train[tmp_path.name]) == ["a.png"]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    make(tmp_path, "mvtec")
    expected = read_dataset(tmp_path)
    assert paths(expected.train["bottle"]) == sorted(paths(expected.train["bottle"]))
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    found = read_dataset(tmp_path)
    assert found == expected
    assert list(found.train) == list(expected.train)


def test_list_images_takes_every_suffix_in_any_case(tmp_path):
    names = ["a.png", "b.jpg", "c.JPEG", "d.Bmp", "e.tif", "f.TIFF", "g.webp", "h.gif"]
    touch(tmp_path, *names, "i.txt", "png", ".j.png", "folder.png/k.png")
    assert [path.name for path in list_images(tmp_path)] == names


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("set/bolt/test/good/0.png", "bolt"),
        ("bolt/0.png", "bolt"),
        ("set/bolt/test/cloth/0.png", "bolt"),  # a kind of defect
        ("set/other/0.png", None),
        ("bolt.png", None),
        ("set/bolt/more/bolt/0.png", "bolt"),
    ],
)
def test_the_class_of_a_file_is_that_of_its_folder(path, expected):
    assert find_class(Path(path), ["bolt", "cloth"]) == expected


def test_a_file_in_folders_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="lies in folders of two classes, bolt and cloth"):
        find_class(Path("bolt/cloth/0.png"), ["bolt", "cloth"])
