"""Four single parts on a plain background: lock washer, hex bolt, capsule, bottle cap."""

from __future__ import annotations

import numpy as np

from rlr_fast.data.synthetic import noise
from rlr_fast.data.synthetic.canvas import Canvas, color, mix, step
from rlr_fast.data.synthetic.noise import Array, Stream
from rlr_fast.data.synthetic.product import Fault, Product, kinds_but


def _background(canvas: Canvas, stream: Stream, code: str, grain: float) -> None:
    """Fill the picture with a matte sheet; the product region starts empty."""
    mottle = canvas.fractal(stream.child("sheet"), 1.5, 2) * 0.02
    fine = canvas.fractal(stream.child("grain"), 30, 2, 0.8) * grain
    canvas.albedo[:] = color(code) * (1 + mottle + fine)[..., None]
    canvas.height[:] = 0.02 * fine
    canvas.product[:] = 0


def _wrapped(angle: Array, center: float) -> Array:
    """Return the distance of angles from ``center``, in 0..pi."""
    return np.abs((angle - np.float32(center) + np.pi) % (2 * np.pi) - np.pi)


def _washer(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Toothed lock washer of turned steel, free to turn."""
    teeth = 14
    _background(canvas, stream.child("background"), "3d4650", 0.06)
    v, u = canvas.pose(stream.child("pose"), 0.03, 180, 0.015)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    turn = angle * (teeth / (2 * np.pi))
    tooth = np.floor(turn)
    within = turn - tooth - 0.5
    reach = 0.165 + 0.010 * noise.of_index(stream.child("teeth").key, tooth % teeth)
    if fault and fault.kind == "missing_part":
        count = 1 + int(fault.severity * 1.99)
        first = fault.stream.integer("tooth", 0, teeth - 1)
        gone = ((tooth - first) % teeth) < count
        reach = np.where(gone, fault.grow(0.07, 0.0), reach)
    profile = step(0.40, 0.24, np.abs(within))
    outer = 0.685 + reach * profile
    hole_v, hole_u = v, u
    if fault and fault.kind == "misplaced_part":
        down, right = fault.shift(0.045, 0.11)
        hole_v, hole_u = v - down, u - right
    bore = np.hypot(hole_u, hole_v)
    edge = np.maximum(0.6 * (radius - outer), 0.37 - bore)
    cover = canvas.inside(edge)
    canvas.cast_shadow(cover, 0.03, 0.025, 0.55)
    lathe = noise.smooth_at(stream.child("lathe").key, radius * 70, 0.8 * np.sin(angle))
    seen = float(np.clip(2 - 140 * canvas.pixel, 0, 1))
    # Turned metal shows two bright fans at right angles to the light.
    fan = np.cos(2 * (np.arctan2(canvas.y, canvas.x) + np.float32(0.75))) ** 4
    stain = canvas.fractal(stream.child("tone"), 2.2, 2)
    value = 0.17 + 0.17 * fan + 0.020 * seen * lathe + 0.012 * stain
    steel = value[..., None] * np.array([1.0, 0.985, 0.94], np.float32)
    chamfer = 0.035 * step(0, 0.05, -edge)
    twist = 0.10 * within * profile * step(0.70, 0.80, radius)
    canvas.lay(cover, steel, 0.03 + chamfer + twist, 0.9)
    canvas.product[:] = cover


def _hex_bolt(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Zinc-plated flange bolt lying in a fixture, head up, seen from the side."""
    _background(canvas, stream.child("background"), "b4b8ba", 0.03)
    v, u = canvas.pose(stream.child("pose"), 0.025, 2.5, 0.012)
    plate = 1 + 0.04 * canvas.fractal(stream.child("plating"), 3, 4)
    patina = canvas.noise(stream.child("patina"), 1.2)[..., None]
    zinc = mix(color("87867f"), color("97885c"), np.clip(0.45 + 0.18 * patina, 0, 1))
    zinc = zinc * plate[..., None]

    # Shank and thread: a cylinder whose radius follows the helix.
    pitch, start, end = 0.082, -0.10, 0.86
    phase = (v + 0.5 * pitch * u / 0.2) / pitch + stream.uniform("phase")
    wave = np.abs((phase - np.floor(phase)) * 2 - 1)
    threaded = step(start, start + 0.05, v)
    if fault and fault.kind == "missing_part":
        middle = fault.stream.uniform("middle", 0.1, 0.6)
        bare = np.abs(v - middle) - fault.grow(0.055, 0.15)
        threaded = threaded * step(-0.01, 0.03, bare)
    shank_radius = np.float32(0.205) - threaded * (0.012 + 0.040 * wave)
    shank_radius = np.minimum(shank_radius, 0.205 - 0.9 * np.maximum(v - end + 0.06, 0))
    shank = np.maximum(np.abs(u) - shank_radius, np.maximum(v - end, -0.45 - v))
    shank_cover = canvas.inside(shank)

    head_u, head_v = u, v
    if fault and fault.kind == "misplaced_part":
        side = fault.stream.choice("side", (-1, 1))
        lean = side * fault.grow(0.05, 0.13)
        head_u = u - side * fault.grow(0.040, 0.085) + lean * (v + 0.4)
        head_v = v - lean * u
    flange = np.maximum(np.abs(head_u) - 0.43, np.abs(head_v + 0.375) - 0.045)
    top = -0.80 + 0.10 * np.abs(head_u / 0.36) ** 2.5
    head = np.maximum(np.abs(head_u) - 0.36, np.maximum(top - head_v, head_v + 0.41))
    cover = np.maximum(shank_cover, canvas.inside(np.minimum(flange, head)))
    canvas.cast_shadow(cover, 0.035, 0.03, 0.5)

    round_height = np.sqrt(np.maximum(shank_radius**2 - u * u, 1e-4))
    thread_dark = 1 - 0.35 * threaded * wave
    canvas.lay(shank_cover, zinc * thread_dark[..., None], 0.75 * round_height, 1.0)
    ring_height = np.sqrt(np.maximum(0.44**2 - head_u**2, 1e-4)) * 0.35
    barrel = 0.03 * np.maximum(1 - ((head_v + 0.375) / 0.045) ** 2, 0) ** 0.5
    canvas.lay(canvas.inside(flange), 0.95 * zinc, ring_height + barrel, 1.0)
    # Three visible faces of the hexagon, the outer two turned away by 60 degrees.
    face = 0.26 - 0.9 * np.maximum(np.abs(head_u) - 0.18, 0)
    chamfer = 0.05 * step(0.07, 0.0, head_v - top)
    tint = zinc * (1 - 0.10 * step(0.17, 0.19, np.abs(head_u)))[..., None]
    canvas.lay(canvas.inside(head), tint, face - chamfer, 1.0)
    canvas.occlusion *= 1 - 0.45 * shank_cover * step(-0.22, -0.32, v) * (flange > 0)
    canvas.product[:] = cover
    canvas.shininess = 16.0


def _capsule(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Two-piece gelatin capsule lying in a groove, with a printed ring mark on each half."""
    _background(canvas, stream.child("background"), "d3d6d4", 0.02)
    v, u = canvas.pose(stream.child("pose"), 0.03, 4, 0.012)
    groove = step(0.50, 0.30, np.abs(canvas.y)) * 0.03
    canvas.height -= groove
    length, body_radius, cap_radius = 0.78, 0.285, 0.305
    cap_v = v
    no_cap = no_print = False
    slip = slant = 0.0
    if fault and fault.kind == "misplaced_part":
        side = fault.stream.choice("side", (-1, 1))
        if fault.stream.uniform("form") < 0.3:
            lean = side * fault.grow(0.05, 0.13)
            cap_v = v - lean * (u + 0.05) - side * 0.01
        else:
            # The printing wheel missed its place.
            slip, slant = side * fault.grow(0.06, 0.14), fault.grow(0.15, 0.7)
    if fault and fault.kind == "missing_part":
        no_cap = fault.severity > 0.75
        no_print = not no_cap

    def rod(across: Array, along: Array, radius: float) -> Array:
        """Distance to a rod with round ends."""
        over = np.maximum(np.abs(along) - (length - radius), 0)
        return np.hypot(across, over) - radius

    seam = 0.05
    # The body ends inside the cap; only a missing cap shows where.
    body = np.maximum(rod(v, u, body_radius), seam - 0.18 - u)
    cap = np.maximum(rod(cap_v, u, cap_radius), u - seam)
    body_cover, cap_cover = canvas.inside(body), canvas.inside(cap) * (not no_cap)
    cover = np.maximum(body_cover, cap_cover)
    canvas.cast_shadow(cover, 0.05, 0.05, 0.5)
    swirl = 1 + 0.025 * canvas.fractal(stream.child("gelatin"), 2.5, 3)
    canvas.shininess = 40.0

    def half(
        across: Array,
        printed: Array,
        radius: float,
        shape: Array,
        code: str,
        marks: tuple[tuple[float, float], ...],
    ) -> None:
        over = np.maximum(np.abs(u) - (length - radius), 0)
        roundness = np.sqrt(np.maximum(radius**2 - across**2 - over**2, 0.0008))
        # Gelatin lets light through: its edge is deeper in color than its middle.
        depth = (0.78 + 0.22 * np.clip(roundness / radius, 0, 1)) * swirl
        tint = color(code) * depth[..., None]
        for position, width in marks:
            ink = step(0.006, -0.006, np.abs(printed - position) - width)
            ink = ink * step(0.7, 0.62, np.abs(across / radius))
            ink = ink * (0.85 + 0.1 * canvas.noise(stream.child("ink"), 30))
            tint = mix(tint, color("2b2a33"), (0.85 * ink)[..., None])
        canvas.lay(shape, tint, roundness * 0.9, 1.6)

    drift = stream.uniform("print drift", -0.012, 0.012)
    body_marks: tuple[tuple[float, float], ...] = ((0.34 + drift, 0.012), (0.42 + drift, 0.030))
    if no_print:
        lost = fault.stream.integer("mark", 0, 1) if fault and fault.severity < 0.4 else -1
        body_marks = tuple(m for i, m in enumerate(body_marks) if lost >= 0 and i != lost)
    half(v, u - slip - slant * v, body_radius, body_cover, "d9c9a3", body_marks)
    if no_cap:
        mouth = np.hypot((u - seam + 0.17) / 0.35, v) - body_radius * 0.93
        canvas.lay(canvas.inside(mouth), color("6d6047"), 0.0, 0.0)
    half(cap_v, u, cap_radius, cap_cover, "9c3f2e", ((-0.30 - drift, 0.014),))
    lip = np.exp(-(((u - seam + 0.012) / 0.008) ** 2)) * cap_cover
    canvas.albedo *= (1 - 0.18 * lip)[..., None]
    canvas.product[:] = cover


def _bottle_cap(canvas: Canvas, stream: Stream, fault: Fault | None) -> None:
    """Crown cap from above, free to turn: 21 flutes, a printed ring and a star of five points."""
    flutes = 21
    _background(canvas, stream.child("background"), "8b9187", 0.05)
    pose = stream.child("pose")
    v, u = canvas.pose(pose, 0.025, 180, 0.012)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    turn = angle * (flutes / (2 * np.pi))
    flute = np.floor(turn)
    depth = 1 + 0.12 * noise.of_index(stream.child("flutes").key, flute % flutes)
    flat = np.zeros_like(radius)
    if fault and fault.kind == "missing_part" and fault.severity > 0.5:
        # A run of flutes that the press did not form.
        center = fault.stream.uniform("centre", -np.pi, np.pi)
        reach = fault.grow(0.20, 0.55)
        flat = step(reach + 0.12, reach, _wrapped(angle, center))
    wave = np.cos(2 * np.pi * (turn - flute - 0.5)) * depth * (1 - flat)
    edge = radius - (0.80 + 0.032 * wave)
    cover = canvas.inside(edge)
    canvas.cast_shadow(cover, 0.04, 0.035, 0.55)
    skirt = step(0.60, 0.78, radius)
    height = 0.16 - 0.13 * skirt + 0.030 * wave * skirt
    height += 0.012 * step(0.56, 0.50, radius)

    print_v, print_u = v, u
    slack = stream.child("print slack")
    print_v = print_v - slack.uniform("y", -0.010, 0.010)
    print_u = print_u - slack.uniform("x", -0.010, 0.010)
    if fault and fault.kind == "misplaced_part":
        down, right = fault.shift(0.055, 0.13)
        print_v, print_u = print_v - down, print_u - right
    ring_radius, ring_angle = np.hypot(print_u, print_v), np.arctan2(print_v, print_u)
    fifth = (ring_angle * np.float32(5 / (2 * np.pi))) % 1 - 0.5
    star = ring_radius * (1 + 0.95 * np.abs(fifth) * 2) - 0.36
    ring = np.abs(ring_radius - 0.43) - 0.028
    ink = np.maximum(step(0.008, -0.008, star), step(0.008, -0.008, ring))
    ink = ink * step(-0.008, 0.008, ring_radius - 0.085)
    if fault and fault.kind == "missing_part" and fault.severity <= 0.5:
        center = fault.stream.uniform("centre", -np.pi, np.pi)
        reach = 0.22 + 0.9 * fault.severity
        ink = ink * step(reach, reach + 0.05, _wrapped(ring_angle, center))
    lacquer = 1 + 0.03 * canvas.fractal(stream.child("lacquer"), 4, 3)
    wear = 1 - 0.10 * step(1.6, 2.6, canvas.noise(stream.child("wear"), 16))
    tint = color("b02a25") * lacquer[..., None]
    tint = mix(tint, color("e8dfc4") * (lacquer * wear)[..., None], (0.95 * ink)[..., None])
    # Along the flutes the lacquer is stretched thin and the tinplate shines through.
    bare = skirt * step(0.35, 1.0, wave)
    tint = mix(tint, color("b9a9a2"), (0.30 * bare)[..., None])
    canvas.lay(cover, tint, height, 1.0)
    canvas.occlusion *= 1 - 0.30 * skirt * step(0.2, -0.9, wave) * (1 - flat) * cover
    canvas.product[:] = cover
    canvas.shininess = 26.0


OBJECTS = (
    Product(
        "washer",
        _washer,
        kinds_but("hole"),
        scratch="f2f0ea",
        inside="131416",
        stains=("7a3d18", "5d2f1a", "3a3a30"),
        debris=("c9a15a", "b0392c", "20242c"),
    ),
    Product(
        "hex_bolt",
        _hex_bolt,
        kinds_but("hole"),
        scratch="f4f4f0",
        inside="1b1a18",
        stains=("8a3d12", "6b2a12", "1f1d1c"),
        debris=("3a5a86", "2a2624", "b8442e"),
    ),
    Product(
        "capsule",
        _capsule,
        kinds_but("colour_shift"),
        scratch="f3e6d6",
        inside="2a1510",
        stains=("5b4a33", "3a2a24", "6a6f3c"),
        debris=("f0ede4", "2e3440", "6b4a2c"),
    ),
    Product(
        "bottle_cap",
        _bottle_cap,
        kinds_but("crack"),
        scratch="d8d4cf",
        inside="1a1412",
        stains=("4a2a18", "2c2a2a", "8a8a60"),
        debris=("e8e4d8", "2a3038", "4a6a38"),
    ),
)
