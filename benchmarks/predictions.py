"""Predicted speed of a launch on an H100, from the machine code Triton compiles without a GPU.

Every figure here is a prediction from counts of instructions and bytes; nothing is measured.

The time predicted for a kernel on sm_90 is the largest of

    memory   bytes of all its tensors, each moved once, over 3.0 TB/s;
    tensor   products of the padded scores, over 800 TFLOP/s;
    a pipe   padded scores / 32 · clocks of the loop that computes them for 32 scores, over
             132 SMs · 4 schedulers · 1.755 GHz, for the pipe of `sass.bound` that limits each loop,
             and the issue slots of the code outside these loops,

and the limit it is set beside has no padding, one exp a score at 3.7e12 a second, and the fewest
bytes. Latency, atomics, cache traffic, the last round of programs and the small PyTorch operations
around the kernels (zeroing, casts, sums of partials) are in neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks import sass
from benchmarks.launches import HEADS, Shape
from rlr_fast.kernels._launch import Launch

# What an H100 moves and computes a second.
BYTES = 3.0e12
_FLOPS = 800e12
CLOCKS = 132 * 4 * 1.755e9
_EXPS = 132 * 16 * 1.755e9


@dataclass(frozen=True)
class Loop:
    """An innermost loop that computes exponentials, for 32 scores.

    Attributes:
        name: ``plain`` or ``windowed`` by whether it tests for windows, after ``online`` where it
            keeps a running maximum; ``halo`` for the walk over the batch.
        ex2: Exponentials by the MUFU, in instructions of a warp.
        issue: Issue slots.
        clocks: Predicted clocks of a scheduler.
        limit: The pipe that sets them.
        hgmma: Matrix instructions by warp groups in one turn of the loop, not for 32 scores.
        mma: Those by single warps.
        tcgen05: Those of sm_100's tensor memory.
        local: Loads and stores of spilled registers in one turn.
    """

    name: str
    ex2: float
    issue: float
    clocks: float
    limit: str
    hgmma: int
    mma: int
    tcgen05: int
    local: int


@dataclass(frozen=True)
class Prediction:
    """Microseconds on sm_90, a prediction from counts and not a measurement.

    Attributes:
        time: The largest of ``by``.
        bound: Its name.
        by: Microseconds of memory, tensor cores, and the pipe that limits most of the loops' time.
        outside: Microseconds of ``by`` that the code outside the loops takes.
        moved: Bytes of all tensors.
        atomics: Bytes of all atomic additions, which meet in the L2 cache and are in no time.
        scores: Scores computed, padding included.
    """

    time: float
    bound: str
    by: Mapping[str, float]
    outside: float
    moved: int
    atomics: int
    scores: int


def predict(launch: Launch, shape: Shape, found: Sequence[Loop], slots: int) -> Prediction:
    """The time of a launch on sm_90 from its counts, see the module's equation.

    ``slots`` are those of `slots_outside`.
    """
    outside = slots / CLOCKS
    by = {"memory": moved(launch) / BYTES, "issue": outside}
    scores = 0
    if found:
        by_name = {loop.name: loop for loop in found}
        slowest = max(found, key=lambda loop: loop.clocks)
        pipes: dict[str, float] = {}
        for name, count in turns(launch, shape).items():
            # Without the certificate (float16) only the online loops exist; a grid so small that
            # the compiler merges or unrolls loops leaves others.
            loop = by_name.get(name) or by_name.get(f"online {name}") or slowest
            part = count * tile_scores(launch)
            scores += part
            pipe = "exp" if loop.limit == "mufu" else loop.limit
            pipes[pipe] = pipes.get(pipe, 0.0) + part / 32 * loop.clocks / CLOCKS
        # The loops run one after the other: their times add up, the largest part gives the name.
        largest = max(pipes, key=pipes.__getitem__)
        del by["issue"]
        by[largest] = sum(pipes.values()) + outside
        by["tensor"] = scores * _products(launch) / _FLOPS
    bound = max(by, key=by.__getitem__)
    micro = {name: round(1e6 * seconds, 2) for name, seconds in by.items()}
    added = atomics(launch, shape)
    around = round(1e6 * outside, 2)
    return Prediction(micro[bound], bound, micro, around, moved(launch), added, scores)


def limits(shape: Shape, operator: str, backward: bool, itemsize: int) -> dict[str, float]:
    """Microseconds that an H100 needs at the least, by what limits it.

    Args:
        shape: Grid, widths and batch.
        operator: ``"mlka"`` or ``"lca"``.
        backward: Whether of the backward pass.
        itemsize: Bytes an element.
    """
    geometry, rows = shape.geometry, HEADS * shape.geometry.tokens

    def near(size: int, radius: int) -> int:
        return sum(min(i + radius, size - 1) - max(i - radius, 0) + 1 for i in range(size))

    pairs = near(geometry.height, geometry.radius_y) * near(geometry.width, geometry.radius_x)
    if operator == "mlka":
        pairs = geometry.tokens**2 - pairs
    scores = HEADS * shape.batch * pairs
    row = rows * shape.width * itemsize
    # Backward in float32: the gradients of what the batch shares.
    if operator == "mlka":
        lse = 4 * rows * shape.batch
        traffic = row + shape.batch * row * 3 + lse
        if backward:
            traffic = row + rows * shape.width * 4 + shape.batch * row * 6 + 2 * lse
    else:
        traffic = 2 * row + shape.batch * row * 2
        if backward:
            traffic = 2 * row + 2 * rows * shape.width * 4 + shape.batch * row * 3
    return {
        "memory": 1e6 * traffic / BYTES,
        "tensor": 1e6 * scores * (10 if backward else 4) * shape.width / _FLOPS,
        "exp": 1e6 * scores / _EXPS,
    }


def loops(code: Sequence[sass.Instruction], launch: Launch, arch: str) -> list[Loop]:
    """The loops of a kernel that compute scores, by name.

    Only a running maximum takes more exponentials than one a score, and only the test of the
    windows more instructions, so the order by both tells which loop is which. On a grid so small
    that the compiler merges or unrolls loops they are numbered, and a loop's counts may be those of
    several turns.
    """
    scores = tile_scores(launch)
    if not scores:
        return []
    elements = scores / (32 * launch.options["num_warps"])
    counted = [sass.count(loop.instructions) for loop in sass.loops(code) if loop.innermost]
    counted = sorted((n for n in counted if n["ex2"]), key=lambda n: (n["ex2"], n.issue))
    # LCA's forward kernel has a second loop, with the maximum of a row, behind its first.
    names = ["halo", "online halo"] if launch.constants.get("TRY_WITHOUT_MAXIMUM") else ["halo"]
    if "INSIDE" in launch.constants:
        one = launch.constants["INSIDE"] or launch.constants.get("DQ") == "store"
        names = ["windowed"] if one else ["plain", "windowed"]
        if "CERTIFIED" in launch.constants:
            online = [f"online {name}" for name in names]
            names = names + online if launch.constants["CERTIFIED"] else online
    if len(names) != len(counted):
        names = [f"loop {i}" for i in range(len(counted))]
    found = []
    for name, n in zip(names, counted, strict=True):
        bound = sass.bound(n, elements, arch=int(arch))
        found.append(
            Loop(
                name,
                round(n["ex2"] / elements, 3),
                round(n.issue / elements, 3),
                round(bound.clocks, 3),
                bound.limit,
                n["hgmma"],
                n["mma"],
                n["tcgen05"],
                sum(count for kind, count in n.kinds.items() if kind.startswith(("ldl", "stl"))),
            )
        )
    return found


def slots_outside(code: Sequence[sass.Instruction], launch: Launch, shape: Shape) -> int:
    """Issue slots that a launch takes outside its loops over scores, counted by warps.

    Both ways of a condition count. Code is met once in a program, but for that of the loop over
    images around MLKA's loops, once in each image.
    """
    found = sass.loops(code)
    scores = {
        i.address
        for loop in found
        if loop.innermost and sass.count(loop.instructions)["ex2"]
        for i in loop.instructions
    }
    walk = {i.address for loop in found if not loop.innermost for i in loop.instructions} - scores
    once = sass.count([i for i in code if i.address not in scores | walk]).issue
    often = sass.count([i for i in code if i.address in walk]).issue
    turns = launch.programs
    if "BLOCKS" in launch.constants:
        keys = launch.constants["BLOCK_N"] * launch.constants["BLOCKS"]
        turns = -(-shape.geometry.tokens // keys) * HEADS * shape.batch
    return (once * launch.programs + often * turns) * launch.options["num_warps"]


def tile_scores(launch: Launch) -> int:
    """Scores that one turn of the loop computes in a program; 0 for a kernel that has none."""
    c = launch.constants
    if "IMAGES" in c:
        return c["IMAGES"] * c["PH"] * c["PW"] * (c["HALO_A"] + c["HALO_B"])
    if "BLOCK_M" in c and "BLOCK_N" in c:
        return c["BLOCK_M"] * c["BLOCK_N"] * c.get("BLOCKS", 1)
    return 0


def turns(launch: Launch, shape: Shape) -> dict[str, int]:
    """Turns of each loop over all programs of a launch, from the geometry alone."""
    c, geometry = launch.constants, shape.geometry
    if "IMAGES" in c:
        places = -(-geometry.height // c["PH"]) * -(-geometry.width // c["PW"])
        return {"halo": HEADS * places * -(-shape.batch // c["IMAGES"])}
    keys = "BLOCKS" in c
    size, step = (
        (c["BLOCK_N"] * c["BLOCKS"], c["BLOCK_M"]) if keys else (c["BLOCK_M"], c["BLOCK_N"])
    )
    tokens = geometry.tokens
    windowed = plain = 0
    for first in range(0, tokens, size):
        # As `window_range` of the kernels.
        last = min(first + size, tokens) - 1
        lo = max(first // geometry.width - geometry.radius_y, 0) * geometry.width
        hi = min(last // geometry.width + geometry.radius_y + 1, geometry.height) * geometry.width
        near = -(-hi // step) - lo // step
        windowed += near
        plain += -(-tokens // step) - near
    images = HEADS * shape.batch
    return {"windowed": windowed * images} | ({} if c["INSIDE"] else {"plain": plain * images})


def moved(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each once; a buffer of atomic sums is read and written."""
    total = sum(
        tensor.numel() * tensor.element_size()
        for tensor in launch.arguments
        if isinstance(tensor, Tensor)
    )
    for name in _atomic_sums(launch):
        tensor = launch.arguments[launch.kernel.arg_names.index(name)]
        total += tensor.numel() * tensor.element_size()
    return total


def atomics(launch: Launch, shape: Shape) -> int:
    """Bytes that a launch adds atomically."""
    c = launch.constants
    if c.get("ATOMIC"):
        return launch.programs * 2 * (c["HALO_A"] + c["HALO_B"]) * c["D"] * 4
    if c.get("DQ") != "add":
        return 0
    blocks = -(-shape.geometry.tokens // (c["BLOCK_N"] * c["BLOCKS"]))
    return blocks * shape.batch * HEADS * shape.geometry.tokens * c["D"] * 4


def _atomic_sums(launch: Launch) -> tuple[str, ...]:
    if launch.constants.get("DQ") == "add":
        return ("dq",)
    return ("dk", "dv") if launch.constants.get("ATOMIC") else ()


def _products(launch: Launch) -> float:
    """Floating-point operations of the matrix products for one score."""
    c = launch.constants
    stem = launch.kernel.__name__
    count = {"forward_kernel": 2, "backward_query_kernel": 3, "backward_kernel": 5}.get(stem)
    if count is None:
        count = 4 if c["DQ"] == "separate" else 5
    return 2 * (count * c["D"] + c.get("P", 0))
