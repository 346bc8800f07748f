"""Training on tiles of pictures: as on files of the tiles, and scored as prediction scores them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import BRIEF, SMALL, make_tree, save_picture
from PIL import Image
from sklearn.metrics import roc_auc_score
from training_cases import run, same, weights

from rlr_fast import RLRModel, Scorer
from rlr_fast.cli import main
from rlr_fast.config import Tiles
from rlr_fast.data import images as image_files
from rlr_fast.data import iterate_images, load_image, load_sample_mask, read_dataset
from rlr_fast.data.hold_out import hold_out
from rlr_fast.data.parts import cut
from rlr_fast.inference.calibrate import calibrate
from rlr_fast.inference.evaluate import evaluate
from rlr_fast.inference.model_card import model_card
from rlr_fast.pictures.tiling import predict_tiled
from rlr_fast.prediction.image_files import find_images
from rlr_fast.prediction.predict import predict
from rlr_fast.training.calibration import read_calibration
from rlr_fast.training.decoder import train_decoder
from rlr_fast.training.run_dir import TrainingError
from rlr_fast.visualization.reconstructions import Run, check_runs

TILE, OVERLAP = (40, 56), (8, 8)
TILED = dataclasses.replace(SMALL, tile=TILE, overlap=OVERLAP)


@pytest.fixture
def pictures(tmp_path):
    """A data set of pictures of two by two tiles."""
    make_tree(tmp_path / "big", ("bolt", "cloth"))
    for i, file in enumerate(sorted((tmp_path / "big").rglob("*.png"))):
        with Image.open(file) as image:
            mask = "ground_truth" in file.parts
            image.resize((100, 70), Image.Resampling.NEAREST).save(file)
        if not mask:
            save_picture(file, i, (70, 100))
    return read_dataset(tmp_path / "big")


def test_a_run_on_tiles_is_that_on_files_of_the_tiles(pictures, tmp_path):
    for sample in (s for samples in pictures.train.values() for s in samples):
        with Image.open(sample.path) as image:
            for top in (0, 30):
                for left in (0, 44):
                    box = (left, top, left + TILE[1], top + TILE[0])
                    file = (
                        tmp_path / "cut" / sample.category / f"{sample.path.stem}-{top}-{left}.png"
                    )
                    file.parent.mkdir(parents=True, exist_ok=True)
                    image.crop(box).save(file)
    run(pictures, tmp_path / "tiles", tmp_path, config=TILED)
    run(read_dataset(tmp_path / "cut"), tmp_path / "files", tmp_path)
    assert same(weights(tmp_path / "tiles"), weights(tmp_path / "files"))
    # The features of whole pictures are others, and lie in another cache.
    run(pictures, tmp_path / "whole", tmp_path)
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "tiles"))
    run(pictures, tmp_path / "fresh", tmp_path, config=TILED, cache="none")
    assert same(weights(tmp_path / "fresh"), weights(tmp_path / "tiles"))
    digests = (tmp_path / "tiles/trained_images.txt").read_text().split()
    assert len(digests) == 10  # of pictures, which calibrate refuses


def test_the_run_scores_in_its_tiles_wherever_it_is_used(pictures, tmp_path):
    run(pictures, tmp_path / "run", tmp_path, config=TILED)
    model = RLRModel.from_pretrained(tmp_path / "run").eval()
    assert model.config.tiles == Tiles(TILE, OVERLAP)
    samples = pictures.test["bolt"]
    size = (70, 100)
    images = [load_image(s.path, size) for s in samples]
    outs = [predict_tiled(model, image, TILE, OVERLAP) for image in images]
    expected = [out.score for out in outs]
    files = find_images([s.path for s in samples])
    table = predict(model, files, tmp_path / "out", None).results.with_name("results.jsonl")
    found = [json.loads(line)["score"] for line in table.read_text().splitlines()]
    assert sorted(found) == pytest.approx(sorted(expected), rel=1e-5)
    scorer = Scorer(tmp_path / "run", maps=True)
    by_path = scorer({"path": [str(s.path) for s in samples]})
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    by_array = scorer({"image": [*arrays, np.zeros((30, 30, 3), np.uint8)]})
    assert by_path["score"] == pytest.approx(expected, rel=1e-5)
    assert by_array["score"][:-1] == pytest.approx(expected, rel=1e-5)
    assert by_array["score_map"][0].shape == size and by_array["score_map"][-1] is None
    assert "less than a tile" in by_array["failure"][-1] and np.isnan(by_array["score"][-1])
    taken, _ = calibrate(
        model, {"bolt": [s.path for s in samples]}, tmp_path / "run", None, source="test"
    )
    assert taken.classes["bolt"].image == pytest.approx(sorted(expected), rel=1e-5)
    assert taken.scoring["tile"] == [*TILE] and taken.scoring["overlap"] == [*OVERLAP]


def test_evaluation_compares_masks_at_the_scale_of_the_tiles(pictures, tmp_path):
    model = RLRModel(TILED).eval()
    height, width = SMALL.image_size
    size = round(70 * height / TILE[0]), round(100 * width / TILE[1])
    data = dataclasses.replace(pictures, train={"bolt": []}, test={"bolt": pictures.test["bolt"]})
    smaller = pictures.root / "bolt/test/good/!.png"  # comes first, and has no say
    save_picture(smaller, 0, (200, 50))
    first = dataclasses.replace(data.test["bolt"][0], path=smaller)
    result = evaluate(model, dataclasses.replace(data, test={"bolt": [first, *data.test["bolt"]]}))
    assert len(result.failures) == 1 and "less than a tile" in result.failures[0]
    assert result.classes == evaluate(model, data).classes
    result = evaluate(model, data)
    assert result.protocol["tile"] == [*TILE] and not result.failures
    maps, masks, scores, labels = [], [], [], []
    for sample in pictures.test["bolt"]:
        out = predict_tiled(model, load_image(sample.path, (70, 100)), TILE, OVERLAP)
        maps.append(
            torch.nn.functional.interpolate(
                out.score_map[None, None], size, mode="bilinear", antialias=True
            )[0, 0]
        )
        masks.append(load_sample_mask(sample, size))
        scores.append(out.score)
        labels.append(sample.is_anomaly)
    found = result.classes["bolt"]
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    pixels = torch.stack(masks).flatten().numpy(), torch.stack(maps).flatten().numpy()
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(*pixels), abs=1e-6)
    assert "tile" not in evaluate(RLRModel(SMALL).eval(), data).protocol


def test_kept_out_pictures_are_scored_in_tiles(tmp_path):
    data = read_dataset(make_tree(tmp_path / "data", ("bolt",), train=50))
    config = dataclasses.replace(SMALL, tile=(32, 32))
    recipe = dataclasses.replace(BRIEF, epochs=1, calibration_share=0.2)
    run(data, tmp_path / "run", tmp_path, config=config, recipe=recipe)
    model = RLRModel.from_pretrained(tmp_path / "run").eval()
    held = hold_out(data, 0.2, BRIEF.seed).validation["bolt"]
    images = [load_image(s.path, (48, 64)) for s in held]
    calibration = read_calibration(tmp_path / "run")
    expected = sorted(predict_tiled(model, image, 32).score for image in images)
    assert calibration.classes["bolt"].image == pytest.approx(expected, rel=1e-5)
    assert calibration.scoring["tile"] == [32, 32] and calibration.scoring["overlap"] == [4, 4]


def test_pictures_smaller_than_a_tile_are_told_before_training(tmp_path, capsys, caplog):
    data = read_dataset(make_tree(tmp_path / "data", ("bolt",), train=50))
    held = hold_out(data, 0.2, BRIEF.seed)
    small = held.train["bolt"][0].path
    for path in (small, *(sample.path for sample in held.validation["bolt"])):
        save_picture(path, 0, (39, 100))
    config = dataclasses.replace(SMALL, tile=(40, 56))
    recipe = dataclasses.replace(BRIEF, epochs=1, calibration_share=0.2)
    result = run(data, tmp_path / "run", tmp_path, config=config, recipe=recipe, quiet=False)
    told = capsys.readouterr().err
    assert "tiles of 39 images" in told
    assert "0 images not trained on" in told and "bolt (fewer than 50 images, or none as" in told
    assert f"11 images left out, such as: {result.failures[0].error}" in caplog.text
    assert len(result.failures) == 11 and read_calibration(tmp_path / "run") is None


def test_pictures_smaller_than_a_tile_are_left_out_and_told(pictures, tmp_path):
    small = pictures.train["bolt"][1].path
    save_picture(small, 0, (39, 100))
    broken = pictures.train["cloth"][2].path
    broken.write_bytes(broken.read_bytes()[:200])  # its header is whole
    result = run(pictures, tmp_path / "run", tmp_path, config=TILED)
    assert [failure.error.path for failure in result.failures] == [small, broken]
    assert "39 x 100 pixels, less than a tile of 40 x 56" in str(result.failures[0].error)
    assert len((tmp_path / "run/trained_images.txt").read_text().split()) == 8
    large = dataclasses.replace(SMALL, tile=(71, 71))
    with pytest.raises(TrainingError, match=r"no training image of bolt, cloth .* 71 x 71"):
        run(pictures, tmp_path / "large", tmp_path, config=large)


def test_the_tiles_of_a_picture_cover_it_and_it_is_decoded_once(pictures, monkeypatch):
    samples = pictures.train["bolt"]
    parts, places, failures = cut(samples, Tiles(TILE, OVERLAP))
    assert places == [i for i in range(len(samples)) for _ in range(4)] and not failures
    covered = np.zeros((70, 100), bool)
    for top, left, height, width in (part.box for part in parts[:4]):
        covered[top : top + height, left : left + width] = True
    assert covered.all() and len({part.box for part in parts}) == 4
    opened = []
    decode = image_files.open_image
    monkeypatch.setattr(image_files, "open_image", lambda p: opened.append(p) or decode(p))
    batches = list(iterate_images(parts, TILE, 3, workers=4))
    assert sorted(opened) == [s.path for s in samples]
    shown = torch.cat([batch.images for batch in batches])
    for part, image in zip(parts, shown, strict=True):
        top, left, height, width = part.box
        whole = load_image(part.path, (70, 100))
        assert torch.equal(image, whole[:, top : top + height, left : left + width])


def test_a_picture_that_became_smaller_has_no_part_any_more(pictures):
    parts, _, _ = cut(pictures.train["bolt"][:1], Tiles(TILE, OVERLAP))
    save_picture(parts[0].path, 0, (50, 50))
    [batch] = iterate_images(parts, TILE, 4)
    assert len(batch.failures) == 4 and "it was replaced" in str(batch.failures[0].error)


def test_what_shows_pictures_whole_refuses_tiles(pictures):
    model = RLRModel(TILED).eval()
    with pytest.raises(ValueError, match=r"tile must be None: a decoder .*tile=\(40, 56\)"):
        train_decoder(model, pictures, epochs=1, batch_size=2, lr=1e-3, seed=0)
    with pytest.raises(ValueError, match="tile must be None: a sheet"):
        check_runs([Run("a", model, (0.0, 1.0))], None)


@pytest.mark.parametrize("place", [0, 1])
def test_a_sheet_of_reconstructions_needs_three_components_of_its_own_level(place):
    components = (0, 2) if place else (2, 0)
    model = RLRModel(dataclasses.replace(SMALL, components=components))
    runs = [Run("a", model, (0.0, 1.0))]
    assert check_runs(runs, SMALL.out_indices[1 - place]) == 1 - place
    with pytest.raises(ValueError, match=f"got 2 at level {SMALL.out_indices[place]} of a"):
        check_runs(runs, SMALL.out_indices[place])


def test_an_overlap_that_is_the_default_is_none(pictures, tmp_path):
    assert dataclasses.replace(SMALL, tile=64, overlap=8) == dataclasses.replace(SMALL, tile=64)
    assert dataclasses.replace(SMALL, tile=64, overlap=0).tiles == Tiles((64, 64), (0, 0))
    model = RLRModel(TILED).eval()
    files = find_images([pictures.root / "bolt/test/good"])
    assert predict(model, files, tmp_path / "out", None, overlap=0).scored == len(files)


def test_a_published_card_tells_of_the_tiles(pictures, tmp_path):
    run(pictures, tmp_path / "run", tmp_path, config=TILED)
    card = model_card(tmp_path / "run", "a/b", license="mit")
    assert "cut into tiles of 40 × 56 of their pixels, of which neighbors share at least 8 × 8" in (
        card
    )
    assert "Tiles are resized to 48 × 64 pixels" in card


def test_a_file_of_single_tiles_holds_no_decisions(pictures, tmp_path, capsys, caplog):
    run(pictures, tmp_path / "run", tmp_path, config=TILED)
    argv = ["export", str(tmp_path / "run"), "--to", "torch", "--out", str(tmp_path / "m.pt2")]
    assert main([*argv, "--alpha", "0.1"]) == 2
    assert "tiles of 40 x 56 pixels" in capsys.readouterr().err
    assert main(argv) == 0 and "decisions, which are of pictures, are not in it" in caplog.text
    assert "no decisions" in capsys.readouterr().out
