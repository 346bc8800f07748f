"""Five flat materials that fill the picture: cloth, brushed metal, wood, tiles, leather."""

from __future__ import annotations

import numpy as np

from rlr_fast.data.synthetic import noise
from rlr_fast.data.synthetic.canvas import Canvas, color, mix, step
from rlr_fast.data.synthetic.noise import Stream
from rlr_fast.data.synthetic.product import DEFECT_KINDS, Fault, Product, kinds_but


def _cloth(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Twill of two yarns: each thread passes over two and under two."""
    per_unit = 11.0
    v, u = canvas.pose(stream.child("pose"), 0.5, 1.5)
    u = u * per_unit + 0.20 * canvas.noise(stream.child("warp drift"), 1.1)
    v = v * per_unit + 0.20 * canvas.noise(stream.child("weft drift"), 1.1)
    u += 0.05 * canvas.noise(stream.child("warp jitter"), 7)
    v += 0.05 * canvas.noise(stream.child("weft jitter"), 7)
    thread = span = center = 0.0
    if fault:
        thread = float(fault.stream.integer("thread", -6, 6))
        center = fault.stream.uniform("along", -0.5, 0.5) * per_unit
        span = fault.grow(2.5, 7.0) if fault.kind == "missing_part" else fault.grow(2.0, 3.5)
    if fault and fault.kind == "misplaced_part":
        # A pulled thread drags its neighbors along.
        across = np.exp(-(((v - thread) / fault.grow(1.0, 1.5)) ** 2))
        along = np.exp(-(((u - center) / span) ** 2))
        v = v + fault.grow(1.0, 1.8) * across * along
    column, row = np.floor(u), np.floor(v)
    warp_width = 0.45 + 0.03 * noise.of_index(stream.child("warp width").key, column)
    weft_width = 0.45 + 0.03 * noise.of_index(stream.child("weft width").key, row)
    warp = 1 - ((u - column - 0.5) / warp_width) ** 2
    weft = 1 - ((v - row - 0.5) / weft_width) ** 2
    # Over where (column + row) mod 4 < 2; the cosine lets the yarn rise and dive between.
    warp_height = 0.5 * warp + 0.5 * np.cos(np.pi / 2 * (column + v - 1))
    weft_height = 0.5 * weft - 0.5 * np.cos(np.pi / 2 * (u + row - 1))
    warp_height = np.where(warp > 0, warp_height, -1)
    weft_height = np.where(weft > 0, weft_height, -1)
    if fault and fault.kind == "missing_part":
        last = thread + (1 if fault.severity > 0.5 else 0)
        gone = (row >= thread) & (row <= last) & (np.abs(u - center) < span)
        weft_height = np.where(gone, -1, weft_height)
    fibre = (
        1
        + 0.10 * canvas.noise(stream.child("fibre"), 70)
        + 0.06 * canvas.noise(stream.child("fuzz"), 18)
    )
    warp_tint = fibre * (1 + 0.07 * noise.of_index(stream.child("warp tint").key, column))
    weft_tint = fibre * (1 + 0.07 * noise.of_index(stream.child("weft tint").key, row))
    top = np.maximum(warp_height, weft_height)
    canvas.albedo[:] = np.where(
        (warp_height > weft_height)[..., None],
        color("7f93a8") * warp_tint[..., None],
        color("b9b7ad") * weft_tint[..., None],
    )
    canvas.albedo *= mix(0.28, 1.0, step(-1, 0.45, top))[..., None]
    canvas.height[:] = np.maximum(top, -0.6) * (0.32 / per_unit)


def _brushed_metal(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Stainless sheet, brushed along x, with the broad band of light that brushing makes."""
    del fault
    lines = (
        0.6 * canvas.noise(stream.child("coarse"), 26, 0.7)
        + 0.8 * canvas.noise(stream.child("middle"), 60, 1.5)
        + 0.8 * canvas.noise(stream.child("fine"), 115, 3.0)
    )
    band = stream.uniform("band", -0.6, 0.6)
    sheen = np.exp(-(((canvas.y - band + 0.08 * canvas.x) / 0.8) ** 2))
    cloudy = canvas.fractal(stream.child("cloud"), 0.8, 2)
    value = 0.20 + 0.15 * sheen + 0.020 * cloudy + 0.036 * lines
    canvas.albedo[:] = np.maximum(value, 0.02)[..., None] * np.array([1.0, 1.0, 1.02], np.float32)
    canvas.height[:] = 0.0005 * lines
    canvas.gloss[:] = 0.5


def _wood(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Planed softwood, grain along y: year rings cut lengthwise, fibres and pores."""
    del fault
    v, u = canvas.pose(stream.child("pose"), 0.0, 2.0)
    wander = 0.55 * canvas.noise(stream.child("wander"), 0.45, 0.9)
    ring = 4.6 * u + wander + 0.10 * canvas.noise(stream.child("ripple"), 1.5, 4)
    ring = ring + stream.uniform("phase") + 0.25 * v
    year = ring - np.floor(ring)
    late = step(0.25, 0.9, year) * step(1.0, 0.93, year)
    late *= 0.75 + 0.2 * noise.of_index(stream.child("year").key, np.floor(ring))
    fibres = canvas.noise(stream.child("fibre"), 5, 75) + 0.7 * canvas.noise(
        stream.child("strand"), 2, 30
    )
    pores = step(1.5, 2.4, canvas.noise(stream.child("pore"), 7, 60))
    shade = 1 + 0.05 * fibres + 0.05 * canvas.noise(stream.child("tone"), 0.7)
    shade = shade * (1 + stream.uniform("board", -0.10, 0.10))
    base = mix(color("d9b384"), color("a9743f"), np.clip(late, 0, 1)[..., None])
    canvas.albedo[:] = base * shade[..., None]
    canvas.albedo *= (1 - 0.35 * pores)[..., None]
    canvas.height[:] = 0.0012 * fibres - 0.004 * pores + 0.004 * late
    canvas.gloss[:] = 0.10


def _tile(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Glazed mosaic in gray grout; tiles differ a little in place, turn and glaze."""
    per_unit = 2.0
    v, u = canvas.pose(stream.child("pose"), 0.03, 0.8)
    u, v = u * per_unit, v * per_unit
    column, row = np.floor(u), np.floor(v)
    index = column * 64 + row

    def of_tile(name: str, spread: float) -> np.ndarray:
        return spread * noise.of_index(stream.child(name).key, index)

    du = u - column - 0.5 - of_tile("right", 0.010)
    dv = v - row - 0.5 - of_tile("down", 0.010)
    turn = of_tile("turn", 0.012)
    chosen = np.zeros_like(u, dtype=bool)
    if fault and fault.kind in ("missing_part", "misplaced_part"):
        chosen = (column == fault.stream.integer("column", -2, 1)) & (
            row == fault.stream.integer("row", -2, 1)
        )
        if fault.kind == "misplaced_part":
            side = fault.stream.choice("side", (-1.0, 1.0))
            turn = turn + chosen * (side * fault.grow(0.05, 0.16))
            du = du - chosen * (fault.grow(0.03, 0.06) * fault.stream.choice("way", (-1, 1)))
    du, dv = du + turn * dv, dv - turn * du
    wobble = 0.006 * canvas.noise(stream.child("edge"), 9)
    corner = 0.06
    qu, qv = np.abs(du) - 0.452 + corner, np.abs(dv) - 0.452 + corner
    distance = np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0)
    distance = (distance - corner + wobble) / per_unit

    grit = canvas.fractal(stream.child("grit"), 24, 3, 0.7)
    canvas.lay(np.ones_like(u), color("a5a097") * (1 + 0.09 * grit)[..., None], 0.003 * grit)
    cover = canvas.inside(distance)
    if fault and fault.kind == "missing_part":
        # Behind a fallen tile: adhesive with the marks of the notched trowel.
        comb = np.sin(2 * np.pi * 9 * (du + 0.25 * dv) + 0.5 * grit)
        bed = color("8d857a") * (0.85 + 0.10 * comb + 0.08 * grit)[..., None]
        canvas.lay(cover * chosen, bed, -0.03 + 0.008 * comb + 0.003 * grit)
        cover = cover * ~chosen
    mottle = canvas.fractal(stream.child("mottle"), 3, 3)
    speck = step(1.7, 2.3, canvas.noise(stream.child("speck"), 34))
    glaze = color("4f7f86") * (1 + of_tile("tint", 0.10) + 0.05 * mottle)[..., None]
    glaze = mix(glaze, color("2f4f58"), 0.5 * speck[..., None])
    dome = 0.035 * step(0, 0.05, -distance) + 0.0015 * mottle
    lean = 0.02 * (of_tile("lean right", 1) * du + of_tile("lean down", 1) * dv)
    canvas.lay(cover, glaze, dome + lean, 0.9)
    canvas.shininess = 30.0


def _leather(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Dyed leather: rounded pebbles of Worley cells between creases, with pores."""
    del fault
    per_unit = 10.0
    bend = stream.child("bend")
    u = canvas.x * per_unit + 0.35 * canvas.noise(bend.child("x"), 5)
    v = (canvas.y * per_unit + 0.35 * canvas.noise(bend.child("y"), 5)) * 1.15
    column, row = np.floor(u).astype(int), np.floor(v).astype(int)
    first = (int(row.min()) - 1, int(column.min()) - 1)
    shape = (int(row.max()) + 2 - first[0], int(column.max()) + 2 - first[1])
    offset_u = (0.5 + 0.42 * noise.nodes(stream.child("cell x").key, first, shape)).ravel()
    offset_v = (0.5 + 0.42 * noise.nodes(stream.child("cell y").key, first, shape)).ravel()
    nearest = np.full(u.shape, 9.0, np.float32)
    second = nearest.copy()
    base = (row - first[0]) * shape[1] + (column - first[1])
    fu, fv = u - column, v - row
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            cell = base + (dr * shape[1] + dc)
            du, dv = offset_u[cell] + np.float32(dc) - fu, offset_v[cell] + np.float32(dr) - fv
            reach = (du * du + dv * dv).astype(np.float32)
            second = np.minimum(second, np.maximum(nearest, reach))
            nearest = np.minimum(nearest, reach)
    crease = np.sqrt(second) - np.sqrt(nearest)
    pebble = step(0.02, 0.36, crease)
    fine = canvas.fractal(stream.child("fine"), 30, 2)
    tone = 1 + 0.05 * canvas.noise(stream.child("tone"), 1.2) + 0.04 * fine
    pores = step(1.9, 2.5, canvas.noise(stream.child("pore"), 22))
    tint = mix(color("3a2015"), color("71422a"), (0.35 + 0.65 * pebble)[..., None])
    canvas.albedo[:] = tint * (tone * (1 - 0.3 * pores))[..., None]
    canvas.height[:] = 0.013 * pebble + 0.0015 * fine - 0.006 * pores
    canvas.gloss[:] = 0.35 * pebble
    canvas.shininess = 14.0


TEXTURES = (
    Product(
        "cloth",
        _cloth,
        kinds_but("scratch", "crack"),
        scratch="d8d6d0",
        inside="14161a",
        stains=("4a3a28", "6b5a2c", "2c3038"),
        debris=("d9d2c0", "7a2f2a", "25272b"),
    ),
    Product(
        "brushed_metal",
        _brushed_metal,
        kinds_but("missing_part", "misplaced_part"),
        scratch="eef0f2",
        inside="17181a",
        stains=("7a4a22", "6d7150", "4c4f55"),
        debris=("b58b54", "2a2a2c", "a83a2e"),
    ),
    Product(
        "wood",
        _wood,
        kinds_but("missing_part", "misplaced_part"),
        scratch="efd9b4",
        inside="2b190c",
        stains=("3a2a20", "5b2b22", "3f4650"),
        debris=("f0ead8", "3c3c40", "51703a"),
    ),
    Product(
        "tile",
        _tile,
        DEFECT_KINDS,
        scratch="c9d4d3",
        inside="c2b8a6",
        stains=("6b5138", "2f2c28", "7d7f45"),
        debris=("e3ddcf", "6f4a2a", "24262a"),
    ),
    Product(
        "leather",
        _leather,
        kinds_but("missing_part", "misplaced_part"),
        scratch="c08a5e",
        inside="140a06",
        stains=("1d1512", "b8a58a", "2a3140"),
        debris=("e6dfd2", "38506e", "2a2c2e"),
    ),
)
