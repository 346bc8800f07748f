"""A surface under a camera: what it is made of, how light falls on it, what the sensor reads.

Lengths are in units of half the shorter picture side: the shorter side runs from -1 to 1, x to the
right and y down, whatever the number of pixels.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from rlr_fast.data.synthetic import noise
from rlr_fast.data.synthetic.noise import Array, Stream

# Render pixels per side of a picture pixel: enough against stairs, as edges are soft already.
SUPERSAMPLE = 2
# Steeper slopes are vertical walls; without a limit their brightness would grow with the size.
_STEEPEST = 2.5


def color(code: str) -> Array:
    """Return the linear RGB of a ``"rrggbb"`` code, (3,) float32."""
    return (np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255) ** 2.2


def step(low: float, high: float, value: Array) -> Array:
    """Return 0 below ``low``, 1 above ``high``, a smooth cubic between (``low > high`` flips)."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array | float, b: Array | float, weight: Array | float) -> Array:
    """Return ``a`` where ``weight`` is 0 and ``b`` where it is 1."""
    return np.asarray(a + (b - a) * weight)


class Canvas:
    """Maps of one scene, (h, w) or (h, w, 3) float32 at the supersampled size.

    Attributes:
        y, x: (h, w) coordinates.
        pixel: side of a render pixel.
        albedo: (h, w, 3) linear color.
        height: (h, w) towards the camera.
        gloss: (h, w) strength of the highlight.
        occlusion: (h, w) share of the light that arrives.
        product: (h, w) share of the pixel that shows the product, where surface defects may lie.
        shininess: exponent of the highlight.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        rows, columns = (side * SUPERSAMPLE for side in size)
        self.pixel = 2.0 / min(rows, columns)
        self.ys = ((np.arange(rows) + 0.5 - rows / 2) * self.pixel).astype(np.float32)
        self.xs = ((np.arange(columns) + 0.5 - columns / 2) * self.pixel).astype(np.float32)
        shape = (rows, columns)
        self.y = np.broadcast_to(self.ys[:, None], shape)
        self.x = np.broadcast_to(self.xs[None, :], shape)
        self.albedo = np.zeros((*shape, 3), np.float32)
        self.height = np.zeros(shape, np.float32)
        self.gloss = np.zeros(shape, np.float32)
        self.occlusion = np.ones(shape, np.float32)
        self.product = np.ones(shape, np.float32)
        self.shininess = 20.0

    def noise(self, stream: Stream, rows: float, columns: float | None = None) -> Array:
        """Return smooth noise with so many bumps per unit of length; (h, w), deviation about 1.

        Bumps finer than a render pixel average out, as they would on a sensor.
        """
        columns = rows if columns is None else columns
        seen = float(np.clip(2 - 2 * max(rows, columns) * self.pixel, 0, 1))
        if seen == 0:
            return np.zeros_like(self.height)
        field = noise.smooth(stream.key, self.ys * rows, self.xs * columns)
        return field if seen == 1 else field * np.float32(seen)

    def fractal(self, stream: Stream, frequency: float, octaves: int, gain: float = 0.5) -> Array:
        """Return a sum of noise at doubling frequencies; (h, w), deviation about 1."""
        total = np.zeros_like(self.height)
        for octave in range(octaves):
            total += self.noise(stream.child(octave), frequency * 2**octave) * gain**octave
        return total / sum(gain ** (2 * octave) for octave in range(octaves)) ** 0.5

    def pose(
        self, stream: Stream, shift: float, degrees: float, scale: float = 0.0
    ) -> tuple[Array, Array]:
        """Return the coordinates (v, u), each (h, w), of a part laid down by hand or fixture."""
        angle = np.deg2rad(stream.uniform("turn", -degrees, degrees))
        size = 1 + stream.uniform("scale", -scale, scale)
        x = self.x - stream.uniform("right", -shift, shift)
        y = self.y - stream.uniform("down", -shift, shift)
        cos, sin = np.float32(np.cos(angle) / size), np.float32(np.sin(angle) / size)
        return y * cos - x * sin, x * cos + y * sin

    def inside(self, distance: Array) -> Array:
        """Return the share of a pixel inside a shape, from its signed distance."""
        return np.clip(0.5 - distance / np.float32(self.pixel), 0, 1)

    def blur(self, field: Array, sigma: float) -> Array:
        """Return ``field`` after a Gaussian of ``sigma`` units of length."""
        return ndimage.gaussian_filter(field, sigma / self.pixel, mode="nearest", truncate=2.5)

    def lay(
        self,
        cover: Array,
        tint: Array | None = None,
        height: Array | float | None = None,
        gloss: Array | float | None = None,
        at: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> None:
        """Cover the surface by a material where ``cover`` is 1, inside the window ``at``."""
        if tint is not None:
            self.albedo[at] += (tint - self.albedo[at]) * cover[..., None]
        if height is not None:
            self.height[at] += (height - self.height[at]) * cover
        if gloss is not None:
            self.gloss[at] += (gloss - self.gloss[at]) * cover

    def cast_shadow(self, cover: Array, shift: float, softness: float, strength: float) -> None:
        """Darken what lies to the lower right of ``cover``; what it covers lies in the light."""
        moved = ndimage.shift(cover, shift / self.pixel, order=1, mode="constant")
        self.occlusion *= 1 - np.float32(strength) * self.blur(moved, softness)
        self.occlusion += (1 - self.occlusion) * cover

    def window(self, row: float, column: float, reach: float) -> tuple[slice, slice]:
        """Return the slices of the render pixels within ``reach`` of a point."""

        def part(axis: Array, center: float) -> slice:
            low, high = np.searchsorted(axis, [center - reach, center + reach])
            return slice(int(low), int(high))

        return part(self.ys, row), part(self.xs, column)


def photograph(canvas: Canvas, stream: Stream) -> Array:
    """Light a surface and expose it, without the sensor's noise.

    Lambert's law plus a Blinn-Phong highlight under one distant lamp; lamp, exposure and white
    balance vary a little from picture to picture.

    Args:
        canvas: the surface.
        stream: of the picture's light.

    Returns:
        (H, W, 3) float32 in [0, 1], gamma-encoded, at the picture's size.
    """
    azimuth = np.deg2rad(stream.uniform("azimuth", 218, 242))
    elevation = np.deg2rad(stream.uniform("elevation", 48, 56))
    lamp = np.array(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation)], np.float32
    )
    up = np.float32(np.sin(elevation))
    slope_y, slope_x = np.gradient(canvas.height, np.float32(canvas.pixel))
    np.clip(slope_y, -_STEEPEST, _STEEPEST, out=slope_y)
    np.clip(slope_x, -_STEEPEST, _STEEPEST, out=slope_x)
    unit = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    toward = -slope_x * lamp[0] - slope_y * lamp[1]
    diffuse = np.maximum((toward + up) * unit, 0) / up
    half = np.float32(1 / np.sqrt(2 + 2 * up))
    facing = np.maximum((toward + up + 1) * unit * half, 0)
    # The highlight of a flat surface is part of its albedo: only what tilts towards the lamp gains.
    flat = np.float32((1 + up) * half) ** canvas.shininess
    highlight = canvas.gloss * np.maximum(facing**canvas.shininess - flat, 0)

    tilt = np.deg2rad(stream.uniform("gradient_direction", 0, 360))
    field = 1 + np.float32(stream.uniform("gradient", 0.0, 0.13)) * (
        canvas.x * np.float32(np.cos(tilt)) + canvas.y * np.float32(np.sin(tilt))
    )
    field *= 1 - np.float32(0.07) * (canvas.x**2 + canvas.y**2)
    ambient = np.float32(0.42)
    light = field * canvas.occlusion * (ambient + (1 - ambient) * diffuse)
    radiance = canvas.albedo * light[..., None] + (highlight * field * canvas.occlusion)[..., None]

    shares = [
        radiance[top::SUPERSAMPLE, left::SUPERSAMPLE]
        for top in range(SUPERSAMPLE)
        for left in range(SUPERSAMPLE)
    ]
    radiance = sum(shares[1:], start=shares[0]) / np.float32(len(shares))
    gain = np.array(
        [1 + stream.uniform(channel, -0.025, 0.025) for channel in ("red", "green", "blue")],
        np.float32,
    ) * np.float32(1 + stream.uniform("exposure", -0.10, 0.10))
    # A shoulder instead of a hard clip, so that highlights keep some drawing.
    radiance = 1 - np.exp(-1.25 * radiance * gain)
    return np.clip(radiance / np.float32(1 - np.exp(-1.25)), 0, 1) ** np.float32(1 / 2.2)


def expose(picture: Array, stream: Stream) -> Array:
    """Return the 8-bit reading of a picture with sensor noise.

    Args:
        picture: (H, W, 3) in [0, 1].
        stream: of the sensor; the same stream gives the same noise pattern.

    Returns:
        (H, W, 3) uint8.
    """
    pattern = stream.generator().standard_normal(picture.shape, dtype=np.float32)
    noisy = picture + np.float32(0.009) * pattern
    return np.clip(np.rint(noisy * 255), 0, 255).astype(np.uint8)
