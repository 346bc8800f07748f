"""Options of how and where the work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlr_fast.config.rules import check_types, require, require_choice

Backend = Literal["auto", "triton", "tiled", "dense"]
Precision = Literal["fp32", "bf16", "fp16"]
Cache = Literal["auto", "gpu", "ram", "disk", "none"]


@dataclass(frozen=True)
class ExecutionConfig:
    """Where and how the work is done; a result depends on it by rounding alone.

    Attributes:
        device: Where to work: auto (CUDA, else Apple's MPS, else the CPU), cpu, cuda, cuda:1 or
            mps.
        backend: Path of the attention operators; auto takes the fastest that runs on the device.
        compile: Compile the network, with CUDA graphs on a GPU: a minute or more at first, faster
            then.
        workers: Threads that decode images; by default one for each processor.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    device: str = "auto"
    backend: Backend = "auto"
    compile: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require_choice("backend", self.backend, Backend)
        require(self.workers is None or self.workers > 0, "workers", "positive", self.workers)


@dataclass(frozen=True)
class TrainExecution(ExecutionConfig):
    """Where and how a model is trained.

    Attributes:
        cache: Where the backbone's features lie while training; none makes them again from the
            files in every epoch.
        cache_dir: Folder of the feature caches (default: ~/.cache/rlr_fast).
        grad_checkpointing: Compute each block again in the backward pass: less memory, a third more
            time, the same result.
        micro_batch_size: Images of a step whose activations lie in memory at once: less memory, the
            same result to rounding; by default all of them, and half where a GPU's memory is full.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    cache: Cache = "auto"
    cache_dir: Path | None = None
    grad_checkpointing: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("cache", self.cache, Cache)
        size = self.micro_batch_size
        require(size is None or size > 0, "micro_batch_size", "positive", size)


@dataclass(frozen=True)
class InferenceExecution(ExecutionConfig):
    """Where and how a trained model scores images.

    Attributes:
        batch_size: Images, or tiles of one picture, scored at once.
        precision: Precision of backbone and reconstructors; fp16 needs a GPU. Score maps are
            fp32.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    batch_size: int = 8
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        require_choice("precision", self.precision, Precision)
