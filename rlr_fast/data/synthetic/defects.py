"""Defects of a surface: scratch, stain, crack, hole, contamination, color shift.

Each changes the maps of a canvas (color, height, gloss) before the light falls on them, so that a
scratch glints and a hole is shaded like the rest of the picture. `Fault.severity` goes from 0 to 1
and scales the ranges written in the calls of `Fault.grow`, in units of half the shorter side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlr_fast.data.synthetic import noise
from rlr_fast.data.synthetic.canvas import Canvas, color, mix, step
from rlr_fast.data.synthetic.noise import Array, Stream
from rlr_fast.data.synthetic.product import Fault, Product

# Places tried for a defect before the best of them is taken.
_TRIES = 60


def _place(canvas: Canvas, stream: Stream, margin: float) -> tuple[float, float]:
    """Return (y, x) of a point on the product, ``margin`` or more from the picture's border."""
    rows, columns = canvas.height.shape
    limit_y = max(float(-canvas.ys[0]) - margin, 0.05)
    limit_x = max(float(-canvas.xs[0]) - margin, 0.05)
    best, best_cover = (0.0, 0.0), -1.0
    for attempt in range(_TRIES):
        y = stream.uniform(f"y{attempt}", -limit_y, limit_y)
        x = stream.uniform(f"x{attempt}", -limit_x, limit_x)
        row = min(int(y / canvas.pixel + rows / 2), rows - 1)
        column = min(int(x / canvas.pixel + columns / 2), columns - 1)
        cover = float(canvas.product[row, column])
        if cover > best_cover:
            best, best_cover = (y, x), cover
        if best_cover > 0.99:
            break
    return best


def _frame(canvas: Canvas, place: tuple[float, float], angle: float) -> tuple[Array, Array]:
    """Return (across, along): coordinates around a point, turned by ``angle`` radians."""
    y, x = canvas.y - np.float32(place[0]), canvas.x - np.float32(place[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return y * cos - x * sin, x * cos + y * sin


def _blob(canvas: Canvas, stream: Stream, radius: float, rough: float) -> Array:
    """Return an irregular spot's level: -1 in its middle, 0 at the rim, 1 at twice the radius."""
    place = _place(canvas, stream.child("place"), 1.3 * radius)
    across, along = _frame(canvas, place, stream.uniform("angle", 0, np.pi))
    stretch = stream.uniform("stretch", 1.0, 1.5)
    level = np.hypot(across * stretch, along / stretch) / radius - 1
    return level + np.float32(rough) * canvas.fractal(stream.child("rim"), 1.2 / radius, 3)


def _scratch(canvas: Canvas, product: Product, fault: Fault) -> None:
    """One to three strokes of a hard point: a bright groove with a raised lip."""
    main = fault.stream.uniform("angle", 0, np.pi)
    for stroke in range(1 + int(fault.severity * 2.99)):
        stream = fault.stream.child(stroke)
        half = 0.5 * fault.grow(0.30, 0.85) * stream.uniform("length", 0.75, 1.2)
        width = fault.grow(0.012, 0.020) * stream.uniform("width", 0.85, 1.15)
        place = _place(canvas, stream.child("place"), 0.5 * half)
        across, along = _frame(canvas, place, main + stream.uniform("turn", -0.35, 0.35))
        bend = stream.uniform("bend", -0.25, 0.25)
        across = across - bend * along**2 + 0.006 * noise.jagged(stream.child("way").key, along * 9)
        taper = np.sqrt(np.maximum(1 - (along / half) ** 2, 0))
        pressure = 0.75 + 0.25 * noise.jagged(stream.child("pressure").key, along * 14)
        groove = step(1.15, 0.55, np.abs(across) / (width * np.maximum(taper, 0.05)))
        groove = groove * (taper > 0) * canvas.product
        tint = color(product.scratch) * stream.uniform("tint", 0.85, 1.1)
        canvas.lay(groove * pressure * np.float32(fault.grow(0.45, 0.9)), tint)
        lip = np.exp(-(((np.abs(across) - 1.4 * width) / (0.6 * width)) ** 2)) * taper
        canvas.height += (0.2 * lip * canvas.product - groove) * np.float32(0.8 * width)


def _stain(canvas: Canvas, product: Product, fault: Fault) -> None:
    """A dried spill: tinted, with a darker rim, as the liquid drew its dirt outwards."""
    stream = fault.stream
    level = _blob(canvas, stream, fault.grow(0.13, 0.24), 0.16)
    film = step(0.10, -0.12, level)
    rim = np.exp(-(((level + 0.06) / 0.10) ** 2))
    patchy = 1 + 0.18 * canvas.fractal(stream.child("patches"), 5, 2)
    weight = (
        fault.grow(0.46, 0.70) * film * patchy + fault.grow(0.12, 0.25) * rim
    ) * canvas.product
    canvas.lay(np.clip(weight, 0, 0.92), color(stream.choice("colour", product.stains)))
    canvas.gloss *= 1 - 0.6 * film * canvas.product


def _crack(canvas: Canvas, product: Product, fault: Fault) -> None:
    """A jagged dark line that thins out, with up to two branches."""
    angle = fault.stream.uniform("angle", 0, np.pi)
    half = 0.5 * fault.grow(0.45, 1.05)
    width = fault.grow(0.009, 0.017)
    center = _place(canvas, fault.stream.child("place"), 0.5 * half)
    for branch in range(1 + int(fault.severity * 2.99)):
        stream = fault.stream.child(branch)
        place, turn, reach = center, angle, half
        if branch:
            start = stream.uniform("start", -0.5, 0.5) * half
            reach = half * stream.uniform("reach", 0.3, 0.5)
            turn = angle + stream.choice("side", (-1, 1)) * stream.uniform("turn", 0.5, 0.9)
            # A branch begins on the main line; its own place is its middle.
            place = (
                center[0] + start * float(np.sin(angle)) + reach * float(np.sin(turn)),
                center[1] + start * float(np.cos(angle)) + reach * float(np.cos(turn)),
            )
        across, along_line = _frame(canvas, place, turn)
        path = 0.045 * noise.jagged(stream.child("bends").key, along_line * 6)
        path = path + 0.018 * noise.jagged(stream.child("teeth").key, along_line * 21)
        taper = np.clip(1.25 * (1 - (np.abs(along_line) / reach)), 0, 1) ** 0.5
        gape = (
            width * taper * (0.75 + 0.25 * noise.jagged(stream.child("gape").key, along_line * 17))
        )
        line = step(1.25, 0.6, np.abs(across - path) / np.maximum(gape, 1e-4)) * (taper > 0)
        line = line * canvas.product
        canvas.lay(line * np.float32(fault.grow(0.7, 0.95)), color(product.inside), gloss=0.0)
        canvas.height -= line * np.float32(1.2 * width)


def _hole(canvas: Canvas, product: Product, fault: Fault) -> None:
    """A punched or broken-out spot: a frayed edge, a wall in shadow, what lies below."""
    stream = fault.stream
    radius = fault.grow(0.050, 0.125)
    level = _blob(canvas, stream, radius, 0.14)
    floor = step(0.06, -0.16, level) * canvas.product
    fray = np.exp(-((level / 0.22) ** 2)) * canvas.product
    below = color(product.inside) * (1 + 0.12 * canvas.noise(stream.child("below"), 30))[..., None]
    canvas.lay(0.35 * fray, color(product.scratch))
    canvas.lay(floor, below, gloss=0.0)
    canvas.height += np.float32(0.12 * radius) * fray - np.float32(0.5 * radius) * floor
    # The wall towards the lamp shades the floor beside it.
    depth = round(0.35 * radius / canvas.pixel)
    shaded = floor * (1 - np.roll(floor, (depth, depth), axis=(0, 1)))
    canvas.occlusion *= 1 - 0.45 * shaded


def _contamination(canvas: Canvas, product: Product, fault: Fault) -> None:
    """Foreign matter lying on the product: a fibre, or a few grains."""
    stream = fault.stream
    tint = color(stream.choice("colour", product.debris))
    if stream.uniform("form") < 0.5:
        half = 0.5 * fault.grow(0.36, 0.78)
        width = fault.grow(0.013, 0.021)
        place = _place(canvas, stream.child("place"), half)
        across, along = _frame(canvas, place, stream.uniform("angle", 0, np.pi))
        curl = stream.uniform("curl", 0.5, 1.6) * stream.choice("side", (-1, 1))
        path = curl * (along**2 - half**2 / 3) + 0.04 * np.sin(
            along * np.float32(stream.uniform("waves", 6, 12))
        )
        # Dividing by the slope keeps the fibre's width where it runs steeply.
        slope = np.gradient(path, np.float32(canvas.pixel), axis=1)
        distance = np.abs(across - path) / np.sqrt(1 + np.minimum(slope * slope, 4))
        end = step(half, half - width, np.abs(along))
        body = step(1.15, 0.75, distance / width) * end
        profile = np.sqrt(np.maximum(1 - (distance / width) ** 2, 0)) * width * end
    else:
        body = np.zeros_like(canvas.height)
        profile = np.zeros_like(canvas.height)
        spread = fault.grow(0.06, 0.16)
        place = _place(canvas, stream.child("place"), 2 * spread)
        for grain in range(3 + int(fault.severity * 5)):
            part = stream.child("grain", grain)
            radius = fault.grow(0.032, 0.048) * part.uniform("radius", 0.7, 1.25)
            spot = (
                place[0] + part.uniform("y", -spread, spread),
                place[1] + part.uniform("x", -spread, spread),
            )
            across, along = _frame(canvas, spot, part.uniform("angle", 0, np.pi))
            # Chips, not balls: a rounded box with unequal sides.
            ratio = part.uniform("ratio", 1.0, 1.6)
            level = (np.abs(across * ratio) ** 3 + np.abs(along / ratio) ** 3) / radius**3
            body = np.maximum(body, step(1.2, 0.8, level))
            profile = np.maximum(profile, np.maximum(1 - level, 0) ** 0.5 * radius * 0.8)
    tint = tint * (1 + 0.12 * canvas.noise(stream.child("grain"), 40))[..., None]
    canvas.cast_shadow(body, 0.016, 0.012, 0.5)
    canvas.lay(body * np.float32(fault.grow(0.75, 1.0)), tint, canvas.height + profile, 0.15)


def _color_shift(canvas: Canvas, product: Product, fault: Fault) -> None:
    """A patch of wrong hue: faded, heated or badly dyed, with the relief untouched."""
    del product
    stream = fault.stream
    level = _blob(canvas, stream, fault.grow(0.17, 0.30), 0.18)
    weight = step(0.15, -0.25, level) * canvas.product
    gray = canvas.albedo.mean(axis=2, keepdims=True)
    strength = fault.grow(0.44, 0.76)
    tint = np.array(
        stream.choice(
            "hue", ((1.30, 0.95, 0.66), (0.72, 0.96, 1.30), (0.82, 1.10, 0.72), (1.25, 0.78, 0.95))
        ),
        np.float32,
    )
    shifted = mix(canvas.albedo, gray, 0.35) * tint ** np.float32(2 * strength)
    canvas.lay(weight, shifted)


SURFACE_DEFECTS: dict[str, Callable[[Canvas, Product, Fault], None]] = {
    "scratch": _scratch,
    "stain": _stain,
    "crack": _crack,
    "hole": _hole,
    "contamination": _contamination,
    "colour_shift": _color_shift,
}
