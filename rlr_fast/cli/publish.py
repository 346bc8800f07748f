"""``rlr-fast publish``."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rlr_fast.cli import flags


def publish(
    run: Annotated[Path, Parameter(name="RUN", help="Folder of the run.")],
    repository: Annotated[str, Parameter(name="REPOSITORY", help="OWNER/NAME on the hub.")],
    /,
    *,
    license: str,
    results: Path | None = None,
    picture: tuple[Path, ...] = (),
    backbone_weights: str | None = None,
    private: flags.Switch = False,
    out: Path | None = None,
    config: flags.Config | None = None,
) -> int:
    """Publish a run on the Hugging Face hub: its checkpoint, calibration, and a card about it.

    Args:
        license: Of the weights, as the hub names it, such as apache-2.0.
        results: Folder of an evaluation, whose metrics stand in the card.
        picture: Pictures for the card, such as a sheet of eval --figures.
        backbone_weights: Where others get the backbone's weights: timm or package.
        private: Make the repository a private one, where it is new.
        out: Write what would be published into this folder, and publish nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    from rlr_fast.cli.common import refuse_unfinished
    from rlr_fast.data.records import read_record
    from rlr_fast.files import file_digest
    from rlr_fast.inference.evaluate import METRICS_FILE
    from rlr_fast.inference.model_card import (
        PICTURES_FOLDER,
        MeasuredMetrics,
        write_published,
    )
    from rlr_fast.models.checkpoint import WEIGHTS_FILE, check_checkpoint, hub_errors
    from rlr_fast.training.calibration import CALIBRATION_FILE

    if not run.is_dir():
        raise ValueError(f"RUN: there is no folder {str(run)!r}")
    if repository.count("/") != 1:
        raise ValueError(f"REPOSITORY must be OWNER/NAME, got {repository!r}")
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"REPOSITORY must be OWNER/NAME, got {repository!r}: {error}") from None
    if private and out is not None:
        raise ValueError("--private is of the repository: with --out nothing is uploaded")
    if not license.strip():
        raise ValueError(f"--license must name a license, got {license!r}")
    metrics = None
    if results is not None:
        path = results / METRICS_FILE
        try:
            metrics = dataclasses.asdict(read_record(MeasuredMetrics, path))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    check_checkpoint(run)
    refuse_unfinished(run)
    if metrics is not None and metrics["weights"] not in (None, file_digest(run / WEIGHTS_FILE)):
        raise ValueError(f"--results: {str(results)!r} is the evaluation of another model")
    with contextlib.ExitStack() as stack:
        folder = out
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_published(
            run,
            folder,
            repository,
            license=license,
            metrics=metrics,
            pictures=picture,
            backbone_weights=backbone_weights,
        )
        if out is not None:
            print(out)
            return 0
        api = HfApi()
        with hub_errors(f"the hub did not take {repository}"):
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="A model of rlr_fast",
                # Of an earlier model, where this one has none.
                delete_patterns=[CALIBRATION_FILE, f"{PICTURES_FOLDER}/*"],
            )
    print(f"{commit.commit_url}\nas a checkpoint: {repository}@{commit.oid}")
    return 0
