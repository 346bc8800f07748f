"""One assembled circuit board: a fixed layout of traces, pads and parts under solder mask."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rlr_fast.data.synthetic.canvas import Canvas, color, mix, step
from rlr_fast.data.synthetic.noise import Array, Stream
from rlr_fast.data.synthetic.product import Fault, Product, kinds_but


@dataclass(frozen=True)
class _Part:
    """A part's place on the board, half sizes along x and y, and how it is drawn."""

    kind: str
    x: float
    y: float
    half_x: float
    half_y: float


_PARTS = (
    _Part("chip", -0.34, -0.30, 0.20, 0.20),
    _Part("chip", 0.38, 0.16, 0.17, 0.12),
    _Part("can", 0.52, -0.52, 0.15, 0.15),
    _Part("crystal", 0.12, -0.58, 0.13, 0.06),
    _Part("resistor", 0.08, -0.30, 0.050, 0.090),
    _Part("resistor", 0.25, -0.30, 0.050, 0.090),
    _Part("resistor", -0.66, 0.06, 0.090, 0.050),
    _Part("resistor", -0.66, 0.24, 0.090, 0.050),
    _Part("capacitor", -0.10, 0.14, 0.090, 0.055),
    _Part("capacitor", -0.10, 0.33, 0.090, 0.055),
    _Part("capacitor", 0.66, -0.20, 0.055, 0.090),
    _Part("diode", -0.38, 0.22, 0.100, 0.060),
    _Part("header", -0.14, 0.66, 0.42, 0.075),
    _Part("led", 0.56, 0.64, 0.075, 0.075),
)
# Corner points of the copper traces, (x, y) in board coordinates.
_TRACES = (
    ((-0.72, -0.62), (-0.50, -0.62), (-0.42, -0.54)),
    ((-0.08, -0.42), (0.04, -0.42), (0.08, -0.38)),
    ((-0.08, -0.30), (-0.02, -0.30), (0.06, -0.22), (0.25, -0.22)),
    ((-0.08, -0.20), (0.04, -0.08), (0.30, -0.08), (0.30, 0.00)),
    ((-0.44, -0.06), (-0.44, 0.06), (-0.48, 0.06), (-0.58, 0.06)),
    ((-0.34, -0.06), (-0.34, 0.06), (-0.26, 0.14), (-0.18, 0.16)),
    ((-0.60, 0.24), (-0.50, 0.24), (-0.44, 0.20)),
    ((-0.02, 0.16), (0.10, 0.16), (0.16, 0.12)),
    ((-0.02, 0.32), (0.12, 0.32), (0.20, 0.24)),
    ((0.30, 0.30), (0.30, 0.46), (0.10, 0.58)),
    ((0.46, 0.30), (0.46, 0.44), (0.56, 0.54)),
    ((0.60, 0.10), (0.70, 0.00), (0.70, -0.10), (0.66, -0.14)),
    ((0.25, -0.58), (0.34, -0.54)),
    ((0.22, -0.36), (0.30, -0.44), (0.36, -0.50)),
    ((-0.48, 0.58), (-0.60, 0.46), (-0.74, 0.40), (-0.74, 0.10)),
    ((-0.30, 0.58), (-0.30, 0.40), (-0.16, 0.34)),
    ((0.02, 0.58), (0.02, 0.46), (0.08, 0.40)),
    ((-0.74, -0.10), (-0.64, -0.20), (-0.60, -0.22)),
    ((-0.74, -0.34), (-0.60, -0.34)),
)
_VIAS = (
    (-0.72, -0.62), (-0.02, -0.42), (0.30, -0.08), (-0.74, -0.10), (-0.74, -0.34), (0.08, 0.40),
    (0.70, 0.36), (0.70, 0.46), (-0.08, -0.70), (-0.74, 0.44), (0.26, -0.44), (0.78, 0.00),
)  # fmt: skip
_HOLES = ((-0.74, -0.76), (0.74, -0.76), (-0.76, 0.76), (0.76, 0.76))


def _box(v: Array, u: Array, half_u: float, half_v: float, corner: float = 0.0) -> Array:
    """Return the signed distance to a box with rounded corners."""
    du, dv = np.abs(u) - (half_u - corner), np.abs(v) - (half_v - corner)
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - corner


class _Bench:
    """The canvas and the posed board's coordinates, to draw parts in small windows."""

    def __init__(self, canvas: Canvas, v: Array, u: Array, grain: Array) -> None:
        self.canvas, self.v, self.u, self.grain = canvas, v, u, grain
        # Where a board point lands in the picture, from the pose's affine map.
        rows, columns = v.shape
        self.origin = (rows // 2, columns // 2)
        y, x = float(canvas.ys[self.origin[0]]), float(canvas.xs[self.origin[1]])
        v0, u0 = float(v[self.origin]), float(u[self.origin])
        p = canvas.pixel
        below, right = (self.origin[0] + 1, self.origin[1]), (self.origin[0], self.origin[1] + 1)
        slope = np.array(
            [
                [(float(v[below]) - v0) / p, (float(v[right]) - v0) / p],
                [(float(u[below]) - u0) / p, (float(u[right]) - u0) / p],
            ]
        )
        self.inverse = np.linalg.inv(slope)
        self.here = np.array([y, x]) - self.inverse @ np.array([v0, u0])

    def window(self, x: float, y: float, reach: float) -> tuple[tuple[slice, slice], Array, Array]:
        """Return a window around a board point, and (v, u) from that point inside it."""
        row, column = self.here + self.inverse @ np.array([y, x])
        at = self.canvas.window(float(row), float(column), reach + 0.02)
        return at, self.v[at] - np.float32(y), self.u[at] - np.float32(x)


def _pads(part: _Part) -> list[tuple[float, float, float, float]]:
    """Return the solder pads of a part: center (x, y) and half sizes, from the part's center."""
    hx, hy = part.half_x, part.half_y
    if part.kind == "chip":
        sides = []
        for k in range(5):
            offset = (k - 2) * 0.36
            sides += [
                (-hx - 0.03, offset * hy, 0.045, 0.020),
                (hx + 0.03, offset * hy, 0.045, 0.020),
            ]
            if hx == hy:
                sides += [
                    (offset * hx, -hy - 0.03, 0.020, 0.045),
                    (offset * hx, hy + 0.03, 0.020, 0.045),
                ]
        return sides
    if part.kind == "header":
        return [((k - 2.5) * 0.135, 0.0, 0.038, 0.038) for k in range(6)]
    if part.kind in ("can", "led"):
        return [(-0.55 * hx, 0.0, 0.04, 0.05), (0.55 * hx, 0.0, 0.04, 0.05)]
    if hx > hy:
        return [(-0.85 * hx, 0.0, 0.035, 0.9 * hy), (0.85 * hx, 0.0, 0.035, 0.9 * hy)]
    return [(0.0, -0.85 * hy, 0.9 * hx, 0.035), (0.0, 0.85 * hy, 0.9 * hx, 0.035)]


def _shadow(canvas: Canvas, at: tuple[slice, slice], cover: Array, shift: float) -> None:
    """Darken the board to the lower right of a part, inside its window."""
    steps = max(round(shift / canvas.pixel), 1)
    dark = np.zeros_like(cover)
    dark[steps:, steps:] = cover[:-steps, :-steps]
    canvas.occlusion[at] *= 1 - 0.5 * dark * (1 - cover)


def _mount(bench: _Bench, part: _Part, stream: Stream, fault: Fault | None) -> None:
    """Draw one part on its pads, with the placement tolerance of a pick-and-place machine."""
    canvas = bench.canvas
    x = part.x + stream.uniform("x", -0.005, 0.005)
    y = part.y + stream.uniform("y", -0.005, 0.005)
    angle = stream.uniform("angle", -0.02, 0.02)
    if fault:
        small = min(part.half_x, part.half_y) < 0.1
        turn = fault.grow(0.50, 1.10) if small else fault.grow(0.16, 0.38)
        angle += turn * fault.stream.choice("side", (-1, 1))
        down, right = fault.shift(0.035, 0.075)
        x, y = x + right, y + down
    hx, hy = part.half_x, part.half_y
    at, v, u = bench.window(x, y, float(np.hypot(hx, hy)) + 0.06)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    v, u = v * cos - u * sin, u * cos + v * sin
    long, short = (u / hx, v / hy) if hx >= hy else (v / hy, u / hx)
    tone = 1 + stream.uniform("tone", -0.06, 0.06) + 0.05 * bench.grain[at]
    box = _box(v, u, hx, hy, 0.012)
    cover = canvas.inside(box)
    round_cover = canvas.inside(np.hypot(v, u) - hx)
    rise = 0.02 * step(0, 0.02, -box)

    def shaded(code: str) -> Array:
        return color(code) * tone[..., None]

    if part.kind == "chip":
        for pad_x, pad_y, pad_hx, pad_hy in _pads(part):
            here, dv, du = bench.window(
                x + pad_x * cos - pad_y * sin, y + pad_x * sin + pad_y * cos, 0.06
            )
            dv, du = dv * cos - du * sin, du * cos + dv * sin
            leg = canvas.inside(_box(dv, du, pad_hx - 0.008, pad_hy - 0.004))
            canvas.lay(leg, color("c9cbce"), 0.02, 0.8, here)
        _shadow(canvas, at, cover, 0.03)
        canvas.lay(cover, shaded("26272a"), 0.05 + rise, 0.25, at)
        dot = canvas.inside(np.hypot(v + 0.62 * hy, u + 0.62 * hx) - 0.024)
        canvas.lay(dot, shaded("4b4c50"), 0.04, 0.1, at)
        # Two rows of laser marking, as strokes.
        rows = np.abs(np.abs(v) - 0.25 * hy) - 0.022
        strokes = step(-0.2, 0.3, np.sin(u * 95) + 0.6 * np.sin(u * 41 + 3 * np.sign(v)))
        mark = step(0.006, -0.006, rows) * step(0.5, 0.46, np.abs(u / hx)) * strokes
        canvas.lay(0.45 * mark, shaded("a9aaa8"), at=at)
    elif part.kind == "can":
        _shadow(canvas, at, round_cover, 0.05)
        radius = np.hypot(v, u)
        top = 0.12 * step(0, 0.03, hx - radius) - 0.03 * step(0.0, 0.02, radius - 0.8 * hx)
        canvas.lay(round_cover, shaded("b9bcc0"), top, 0.8, at)
        stripe = step(-0.50, -0.54, u / hx) * round_cover * step(0.9, 0.86, radius / hx)
        canvas.lay(stripe, shaded("26292f"), at=at)
        groove = (np.exp(-((v / 0.006) ** 2)) + np.exp(-((u / 0.006) ** 2))) * (radius < 0.7 * hx)
        canvas.height[at] -= 0.006 * np.clip(groove, 0, 1)
    elif part.kind == "crystal":
        shape = _box(v, u, hx, hy, hy * 0.98)
        cover = canvas.inside(shape)
        _shadow(canvas, at, cover, 0.03)
        canvas.lay(cover, shaded("c4c6c8"), 0.05 * step(0, 0.035, -shape), 0.9, at)
    elif part.kind == "header":
        _shadow(canvas, at, cover, 0.04)
        canvas.lay(cover, shaded("232326"), 0.06 + rise, 0.2, at)
        for pad_x, _, _, _ in _pads(part):
            here, dv, du = bench.window(x + pad_x * cos, y + pad_x * sin, 0.05)
            pin = _box(dv * cos - du * sin, du * cos + dv * sin, 0.026, 0.026)
            top = 0.05 + 0.5 * step(0, 0.02, -pin)
            canvas.lay(canvas.inside(pin), color("d9b65c"), top, 0.9, here)
    elif part.kind == "led":
        _shadow(canvas, at, cover, 0.02)
        canvas.lay(cover, shaded("e6e2d6"), 0.03 + rise, 0.4, at)
        lens = np.hypot(v, u) - 0.7 * hx
        canvas.lay(
            canvas.inside(lens), shaded("d9c24a"), 0.04 + 0.5 * np.maximum(-lens, 0), 1.2, at
        )
    else:
        body = {"resistor": "1f2024", "capacitor": "a98a62", "diode": "2b2b2e"}[part.kind]
        _shadow(canvas, at, cover, 0.015)
        canvas.lay(cover, shaded("cfd2d4"), 0.02 + rise, 0.8, at)
        middle = cover * step(0.72, 0.68, np.abs(long))
        canvas.lay(middle, shaded(body), 0.024 + rise, 0.3, at)
        if part.kind == "diode":
            band = middle * step(0.12, 0.08, np.abs(long - 0.45))
            canvas.lay(band, shaded("d8d8d4"), at=at)
        if part.kind == "resistor":
            mark = middle * step(0.40, 0.34, np.abs(long)) * step(0.5, 0.42, np.abs(short))
            canvas.lay(0.4 * mark, shaded("d8d8d4"), at=at)


def _circuit_board(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Green board on a dark carrier, aligned by its edges."""
    sheet = canvas.fractal(stream.child("carrier"), 20, 2, 0.8)
    canvas.albedo[:] = color("33353a") * (1 + 0.06 * sheet)[..., None]
    v, u = canvas.pose(stream.child("pose"), 0.010, 0.7, 0.004)
    bench = _Bench(canvas, v, u, canvas.noise(stream.child("grain"), 45))
    outline = _box(v, u, 0.88, 0.88, 0.04)
    for x, y in _HOLES:
        at, dv, du = bench.window(x, y, 0.1)
        outline[at] = np.maximum(outline[at], 0.05 - np.hypot(dv, du))
    cover = canvas.inside(outline)
    canvas.cast_shadow(cover, 0.03, 0.02, 0.6)
    weave = canvas.noise(stream.child("glass"), 36)
    tone = 1 + 0.03 * weave + 0.05 * canvas.noise(stream.child("tone"), 0.9)
    canvas.lay(cover, color("1f5a3a") * tone[..., None], 0.02 + 0.00025 * weave, 0.5)
    canvas.product[:] = cover

    copper = np.full_like(u, 1.0)
    for trace in _TRACES:
        for (x0, y0), (x1, y1) in pairwise(trace):
            length = float(np.hypot(x1 - x0, y1 - y0))
            at, dv, du = bench.window((x0 + x1) / 2, (y0 + y1) / 2, length / 2 + 0.05)
            cos, sin = (x1 - x0) / length, (y1 - y0) / length
            along = np.maximum(np.abs(du * cos + dv * sin) - length / 2, 0)
            copper[at] = np.minimum(copper[at], np.hypot(along, dv * cos - du * sin) - 0.015)
    trace_cover = step(0.006, -0.006, copper) * cover
    canvas.lay(trace_cover, color("3f9060") * tone[..., None])
    canvas.height += 0.004 * trace_cover
    for x, y in _VIAS:
        at, dv, du = bench.window(x, y, 0.06)
        radius = np.hypot(dv, du)
        canvas.lay(canvas.inside(radius - 0.032), color("c9a85a"), 0.026, 0.9, at)
        canvas.lay(canvas.inside(radius - 0.014), color("14161a"), 0.0, 0.0, at)
    # Silk-screen: outlines of the larger parts and polarity ticks.
    slack = stream.child("silk")
    silk_x, silk_y = slack.uniform("x", -0.006, 0.006), slack.uniform("y", -0.006, 0.006)
    for part in _PARTS:
        grow = 0.085 if part.kind == "chip" else 0.03
        reach = max(part.half_x, part.half_y) + grow + 0.02
        at, v_here, u_here = bench.window(part.x + silk_x, part.y + silk_y, reach)
        frame = np.abs(_box(v_here, u_here, part.half_x + grow, part.half_y + grow)) - 0.007
        canvas.lay(0.8 * canvas.inside(frame) * cover[at], color("d9ddd6"), at=at)
        for x, y, half_x, half_y in _pads(part):
            here, v_pad, u_pad = bench.window(part.x + x, part.y + y, max(half_x, half_y))
            pad = canvas.inside(_box(v_pad, u_pad, half_x, half_y, 0.008))
            solder = color("b4b8bb") * (1 + 0.04 * weave[here])[..., None]
            canvas.lay(pad, solder, 0.026, 0.8, here)

    chosen = fault.stream.integer("part", 0, len(_PARTS) - 1) if fault else -1
    for index, part in enumerate(_PARTS):
        if fault and index == chosen and fault.kind == "missing_part":
            continue
        moved = fault if fault and index == chosen and fault.kind == "misplaced_part" else None
        _mount(bench, part, stream.child("part", index), moved)
    dust = step(2.4, 3.0, canvas.noise(stream.child("dust"), 26)) * cover
    canvas.albedo[:] = mix(canvas.albedo, color("b5b5ad"), (0.2 * dust)[..., None])
    canvas.shininess = 24.0


BOARDS = (
    Product(
        "circuit_board",
        _circuit_board,
        kinds_but("crack"),
        scratch="c9a36a",
        inside="120d09",
        stains=("4a2f14", "8a8460", "1a1714"),
        debris=("f0e9d2", "d8b23a", "c9442e"),
    ),
)
