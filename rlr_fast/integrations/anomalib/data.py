"""A data module of several classes for anomalib, read as ``rlr-fast`` reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Mask

from rlr_fast.data import Sample, read_dataset
from rlr_fast.data.images import open_image, read_mask, to_rgb
from rlr_fast.inference.evaluate import check_masks
from rlr_fast.training.steps import epoch_order


class MultiCategoryDataset(AnomalibDataset):
    """Images of several classes.

    Args:
        samples: Of `rlr_fast.data`, of one split.
        split: Its name, ``train`` or ``test``.
        has_masks: Whether the data set has masks.

    Raises:
        ValueError: An image has several masks, as in MVTec LOCO.
    """

    def __init__(
        self, samples: Mapping[str, Sequence[Sample]], split: str, has_masks: bool
    ) -> None:
        super().__init__()
        rows = []
        for category, of_class in samples.items():
            for sample in of_class:
                if len(sample.mask_paths) > 1:
                    raise ValueError(f"{sample.path} has several masks, and anomalib reads one")
                index = LabelName.ABNORMAL if sample.is_anomaly else LabelName.NORMAL
                mask = str(sample.mask_paths[0]) if sample.mask_paths else ""
                about = (split, sample.defect, int(index), mask, category)
                rows.append((str(sample.path), *about))
        columns = ["image_path", "split", "label", "label_index", "mask_path", "category"]
        self.samples = pandas.DataFrame(rows, columns=columns)
        self.samples.attrs["task"] = "segmentation" if has_masks else "classification"

    def __getitem__(self, index: int) -> ImageItem:
        """Return an image with its mask, both read as ``rlr-fast`` reads them.

        Raises:
            UnreadableImageError: The file cannot be read as a picture.
        """
        row = self.samples.iloc[index]
        pixels = to_image(to_rgb(open_image(row.image_path), row.image_path))
        image, mask = to_dtype(pixels, torch.float32, scale=True), None
        if self.samples.attrs["task"] == "segmentation":
            none = np.zeros(image.shape[-2:], dtype=np.bool_)
            marked = read_mask(row.mask_path) if row.mask_path else none
            mask = Mask(torch.from_numpy(marked).to(torch.uint8))
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        return ImageItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(row.label_index),
            image_path=row.image_path,
            mask_path=row.mask_path or None,
        )


class MultiCategory(AnomalibDataModule):
    """A data module of all classes of a data set, for one model of them all.

    Args:
        root: Root folder: MVTec-AD, MPDD, VisA, BTAD or folders of images, as `rlr-fast` reads it.
        layout: Of the folder; ``auto`` finds out which it is.
        classes: Only these classes.
        train_batch_size: Images of a training step.
        eval_batch_size: Images that are scored at once.
        num_workers: Processes that decode.
        val_split_mode: See anomalib; its thresholds are set on these images.
        val_split_ratio: See anomalib.
        seed: Of the order of training images, which is that of ``rlr-fast train``, and of splits.

    Raises:
        ValueError: The folder does not follow the layout, or a class has no images to train or test
            on, or masks are missing or of another size than their images; at `setup`.
    """

    def __init__(
        self,
        root: Path | str,
        layout: str = "auto",
        classes: Sequence[str] | None = None,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size,
            eval_batch_size,
            num_workers,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.root, self.layout, self.classes = Path(root), layout, classes

    @property
    def name(self) -> str:
        """The root's folder name, below which anomalib keeps the folders of pictures it writes."""
        return self.root.resolve().name

    def _setup(self, _stage: str | None = None) -> None:
        data = read_dataset(self.root, self.layout, self.classes)
        data.require_train()
        data.require_test()
        check_masks(data)
        self.train_data = MultiCategoryDataset(data.train, "train", data.has_masks)
        self.test_data = MultiCategoryDataset(data.test, "test", data.has_masks)

    def _create_test_split(self) -> None:
        """Leave all training images to training, also where no test image is normal."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, in the order of ``rlr-fast train`` with the same seed."""
        return DataLoader(
            dataset=self.train_data,
            sampler=_Order(len(self.train_data), self.seed),
            batch_size=self.train_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )


class _Order(Sampler[int]):
    """The order of the training images, another one in each epoch."""

    def __init__(self, images: int, seed: int) -> None:
        self._images, self._seed, self._epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch; Lightning calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._images

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self._seed, 0, self._epoch, self._images).tolist())
