"""The resize of exported graphs: Pillow's own, to the bit."""

from __future__ import annotations

import pytest
import torch
from conftest import save_picture

from rlr_fast import RLRConfig, RLRModel
from rlr_fast.data.images import resize_image
from rlr_fast.export.export import export
from rlr_fast.export.images import comparison_images
from rlr_fast.export.resize import LanczosResize


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param((480, 640), (256, 256), id="down"),
        pytest.param((30, 50), (64, 48), id="up"),
        pytest.param((300, 20), (64, 64), id="one side down, one up"),
        pytest.param((64, 90), (64, 48), id="one side alone"),
        pytest.param((2001, 9), (200, 5), id="a strip"),
        pytest.param((1, 1), (3, 5), id="a pixel"),
    ],
)
@pytest.mark.parametrize("kind", ["noise", "black and white"])
def test_it_is_pillows_to_the_bit(source, target, kind):
    images = torch.randint(256, (2, 3, *source), dtype=torch.uint8)
    if kind == "black and white":  # the filter overshoots, and what it gives must be cut off
        images = images // 128 * 255
    found = LanczosResize(source, target)(images)
    for image, result in zip(images, found, strict=True):
        torch.testing.assert_close(
            result.to(torch.uint8), resize_image(image, target), rtol=0, atol=0
        )


def test_a_file_takes_the_images_of_a_camera(tmp_path):
    torch.manual_seed(0)
    config = RLRConfig(
        backbone="test_efficientnet",
        backbone_weights="random",
        out_indices=(2,),
        image_size=(48, 64),
        hidden=(16,),
        heads=(2,),
        windows=(3,),
        blocks=1,
    )
    model = RLRModel(config).eval()
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", i, (100, 90))
    images = comparison_images(sorted(tmp_path.glob("*.png")), (100, 90))
    out = tmp_path / "model.pt2"
    export(model, out, "torch", images, input_size=(100, 90))
    program = torch.export.load(out).module()
    small = torch.stack([resize_image(image, (48, 64)) for image in images])
    torch.testing.assert_close(program(images.permute(0, 2, 3, 1))["score"], model(small).score)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(small.permute(0, 2, 3, 1))
