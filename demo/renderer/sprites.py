"""Pictures of the things that appear in a rendered clip: household objects and cloths.

A sprite is drawn once per clip, at twice the size it is shown at, and then only moved, turned and scaled.
Solids follow one orthographic camera that looks down on the table at `elevation` radians: a point at
width X, depth Y (towards the viewer) and height Z appears at (X, Y sin(elevation) - Z cos(elevation)).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

SUPERSAMPLING = 2  # sprite pixels per picture pixel

COLORS: dict[str, tuple[int, int, int]] = {  # RGB
    "red": (188, 44, 40),
    "blue": (44, 84, 176),
    "green": (52, 134, 70),
    "yellow": (222, 186, 54),
    "orange": (222, 120, 40),
    "purple": (118, 66, 148),
    "pink": (222, 128, 160),
    "white": (228, 226, 220),
    "black": (44, 44, 48),
    "brown": (120, 78, 48),
    "grey": (136, 138, 142),
    "light blue": (126, 178, 214),
}


@dataclass(frozen=True)
class Kind:
    """What sort of object: its outline (`form`), size in pixels of a 240-pixel-high picture, and bounciness.

    `width`, `depth`, `height` are those of the solid; `restitution` is the speed kept at a bounce.
    """

    form: str
    width: float
    depth: float
    height: float
    restitution: float
    colors: tuple[str, ...] = tuple(COLORS)
    profile: tuple[float, ...] = (1.0, 1.0)  # radii from bottom to top, as shares of width / 2


_FRUIT = dict(form="ball", depth=36, restitution=0.25)
KINDS: dict[str, Kind] = {
    "box": Kind("box", 64, 50, 50, 0.15, ("brown", "red", "blue", "white", "green", "yellow")),
    "block": Kind("box", 56, 50, 52, 0.2, ("red", "blue", "green", "yellow", "orange", "brown")),
    "book": Kind("box", 84, 60, 18, 0.1, ("red", "blue", "green", "black", "orange", "purple")),
    "phone": Kind("box", 50, 76, 8, 0.12, ("black", "white", "grey")),
    "sponge": Kind("box", 66, 48, 28, 0.3, ("yellow", "green", "pink", "orange", "blue")),
    "eraser": Kind("box", 58, 38, 26, 0.3, ("white", "pink", "blue")),
    "matchbox": Kind("box", 60, 42, 24, 0.15, ("red", "yellow", "blue", "green")),
    "cup": Kind("cup", 56, 56, 58, 0.15, profile=(0.8, 0.95, 1.0, 1.0)),
    "can": Kind("can", 48, 48, 70, 0.2, ("red", "green", "blue", "grey", "orange"), (0.92, 1, 1, 1, 0.92)),
    "candle": Kind("can", 44, 44, 56, 0.1, ("white", "red", "yellow", "purple", "pink"), (1.0, 1.0)),
    "bottle": Kind(
        "can",
        44,
        44,
        98,
        0.15,
        ("green", "blue", "brown", "light blue", "white"),
        (0.96, 1, 1, 1, 1, 0.95, 0.6, 0.4, 0.36, 0.4),
    ),
    "jar": Kind("can", 54, 54, 62, 0.15, ("light blue", "green", "brown", "orange"), (0.95, 1, 1, 1, 0.98, 0.85, 0.85)),
    "ball": Kind("ball", 58, 58, 58, 0.5, ("red", "blue", "green", "yellow", "orange", "white", "purple")),
    "apple": Kind(width=52, height=49, colors=("red", "green"), **_FRUIT),
    "lemon": Kind(width=58, height=43, colors=("yellow",), **_FRUIT),
    "tomato": Kind(width=54, height=46, colors=("red",), **_FRUIT),
    "bowl": Kind("open", 104, 104, 46, 0.1, ("white", "blue", "red", "green", "brown"), (0.45, 0.7, 0.86, 0.95, 1.0)),
    "pot": Kind("open", 100, 100, 52, 0.1, ("grey", "black", "red", "blue"), (0.92, 1, 1, 1, 1.0)),
    "basket": Kind("open", 108, 108, 48, 0.1, ("brown", "yellow", "white"), (0.8, 0.86, 0.92, 0.96, 1.0)),
    "paper": Kind("sheet", 74, 60, 3, 0.0, ("white", "yellow", "pink", "light blue")),
    "leaf": Kind("leaf", 74, 38, 3, 0.0, ("green", "brown", "orange", "yellow")),
    "feather": Kind("leaf", 84, 28, 3, 0.0, ("white", "grey", "blue")),
    "napkin": Kind("sheet", 66, 58, 3, 0.0, ("white", "red", "blue", "green")),
    "cloth": Kind("drape", 118, 80, 70, 0.0, ("red", "blue", "green", "white", "purple", "grey", "pink")),
    "towel": Kind("drape", 124, 84, 70, 0.0, ("white", "blue", "yellow", "orange", "light blue", "green")),
    "scarf": Kind("drape", 116, 76, 68, 0.0, ("red", "purple", "black", "orange", "green", "pink")),
}


@dataclass(frozen=True)
class ObjectSpec:
    """One object of one clip, before it is drawn: kind, color (RGB), relative size, detail seed, words."""

    kind_name: str
    color: tuple[int, int, int]
    size: float
    detail_seed: int
    phrase: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.kind_name]

    @property
    def width(self) -> float:
        return self.kind.width * self.size

    @property
    def depth(self) -> float:
        return self.kind.depth * self.size

    @property
    def height(self) -> float:
        return self.kind.height * self.size


@dataclass
class Sprite:
    """A drawn object: `image` (height, width, 4) uint8 RGBA with color premultiplied by alpha.

    `anchor` is the sprite pixel that stands on the table (for a hand: the point that grips).
    `pivot_height` is how many picture pixels above the anchor the object turns.
    `front` is the part of an open container that hides what lies inside; None for all others.
    """

    image: np.ndarray
    anchor: tuple[float, float]
    pivot_height: float = 0.0
    front: np.ndarray | None = None
    shadow: np.ndarray = field(init=False)  # alpha at a quarter of the sprite's size, blurred

    def __post_init__(self) -> None:
        alpha = np.ascontiguousarray(self.image[:, :, 3])
        small = cv2.resize(alpha, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        small = cv2.copyMakeBorder(small, 8, 8, 8, 8, cv2.BORDER_CONSTANT)
        self.shadow = cv2.GaussianBlur(small, (0, 0), 1.6)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float, stretch: float = 1.0) -> np.ndarray:
    """Band-limited noise, float32 (height, width), mean about 0 and deviation about 1.

    `cell` is the vertical distance in pixels between independent values; horizontally it is cell * stretch.
    """
    rows = max(3, int(height / cell) + 3)
    columns = max(3, int(width / (cell * stretch)) + 3)
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    return 1.4 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def finish(color: np.ndarray, alpha: np.ndarray, softness: float = 0.7) -> np.ndarray:
    """Joins float RGB (0..255) and alpha (0..1) into one premultiplied, slightly softened RGBA image."""
    rgba = np.empty((*alpha.shape, 4), np.uint8)
    rgba[:, :, :3] = np.clip(color, 0, 255) * alpha[:, :, None]
    rgba[:, :, 3] = alpha * 255
    return cv2.GaussianBlur(rgba, (5, 5), softness)


def _grid(width: float, above: float, below: float) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Picture coordinates (x, y) of every sprite pixel, in picture pixels from the anchor, and the anchor."""
    half = int(np.ceil((width / 2 + 4) * SUPERSAMPLING))
    top = int(np.ceil((above + 4) * SUPERSAMPLING))
    bottom = int(np.ceil((below + 4) * SUPERSAMPLING))
    y, x = np.mgrid[-top:bottom, -half:half].astype(np.float32)
    return x / SUPERSAMPLING, y / SUPERSAMPLING, (float(half), float(top))


def coverage(signed_distance: np.ndarray) -> np.ndarray:
    """Anti-aliased coverage (0..1) from a distance in picture pixels, positive inside."""
    return np.clip(signed_distance * SUPERSAMPLING + 0.5, 0, 1)


def _polygon(shape: tuple[int, int], anchor: tuple[float, float], points: np.ndarray) -> np.ndarray:
    """Anti-aliased coverage (0..1) of a polygon given in picture pixels from the anchor."""
    mask = np.zeros(shape, np.uint8)
    pixels = (np.asarray(points) * SUPERSAMPLING + np.asarray(anchor)) * 16
    cv2.fillPoly(mask, [np.round(pixels).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def draw_object(spec: ObjectSpec, elevation: float, light_x: float) -> Sprite:
    """Draws an object seen from `elevation` radians above the table, lit from the left if light_x < 0.

    Everything follows from the spec, its seed included.
    """
    draw = {
        "box": _draw_box,
        "cup": _draw_round,
        "can": _draw_round,
        "open": _draw_round,
        "ball": _draw_ball,
        "sheet": _draw_sheet,
        "leaf": _draw_sheet,
        "drape": _draw_drape,
    }[spec.kind.form]
    return draw(spec, elevation, light_x, np.random.default_rng(spec.detail_seed))


def _draw_box(spec: ObjectSpec, elevation: float, light_x: float, rng: np.random.Generator) -> Sprite:
    """A cuboid turned a little about the vertical, with the kind's label, page edges or screen."""
    turn = rng.uniform(-0.35, 0.35)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (spec.width / 2, spec.depth / 2)
    corners = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    base = corners * (1, np.sin(elevation))
    top = base - (0, spec.height * np.cos(elevation))
    extent = 2 * np.abs(base[:, 0]).max()
    x, y, anchor = _grid(extent, -top[:, 1].min(), base[:, 1].max())
    color = np.zeros((*x.shape, 3), np.float32)
    alpha = np.zeros(x.shape, np.float32)
    grain = 1 + 0.025 * smooth_noise(rng, *x.shape, 24)

    def paint(points: np.ndarray, rgb: np.ndarray, brightness: float) -> None:
        mask = _polygon(x.shape, anchor, points)
        shade = brightness * grain * (1 + 0.12 * light_x * x / extent)
        color[:] = color * (1 - mask[:, :, None]) + mask[:, :, None] * shade[:, :, None] * rgb
        np.maximum(alpha, mask, out=alpha)

    def patch(origin: np.ndarray, across: np.ndarray, along: np.ndarray, inset: tuple[float, ...]) -> np.ndarray:
        left, right, low, high = inset
        return np.array(
            [origin + a * across + b * along for a, b in ((left, low), (right, low), (right, high), (left, high))]
        )

    body = np.array(spec.color, np.float32)
    pages = np.array((226, 220, 204), np.float32)
    side = (1, 2) if turn > 0 else (3, 0)  # which narrow face looks at the camera
    for (i, j), brightness in ((side, 0.62 + 0.14 * light_x * np.sign(turn)), ((2, 3), 0.78)):
        face = np.array([base[i], base[j], top[j], top[i]])
        paint(face, pages if spec.kind_name == "book" else body, brightness)
        if spec.kind_name == "book":
            paint(patch(base[i], base[j] - base[i], top[i] - base[i], (0, 1, 0, 0.16)), body, brightness)
            paint(patch(base[i], base[j] - base[i], top[i] - base[i], (0, 1, 0.84, 1)), body, brightness)
    if spec.kind_name in ("box", "matchbox", "eraser"):
        label = COLORS[("white", "yellow", "light blue", "black")[rng.integers(4)]]
        low, high = (0.0, 1.0) if spec.kind_name == "eraser" else (0.25, 0.75)
        left, right = sorted(rng.uniform((0.08, 0.6), (0.35, 0.95)))
        paint(patch(base[3], base[2] - base[3], top[3] - base[3], (left, right, low, high)), np.array(label), 0.78)
    paint(top, body, 1.0)
    across, along = top[1] - top[0], top[3] - top[0]
    if spec.kind_name == "phone":
        paint(patch(top[0], across, along, (0.07, 0.93, 0.08, 0.92)), np.array((30, 36, 52)), 1.0)
        paint(patch(top[0], across, along, (0.12, 0.5, 0.12, 0.5)), np.array((92, 108, 132)), 0.9)
    elif spec.kind_name == "book":
        paint(patch(top[0], across, along, (0.18, 0.82, 0.2, 0.38)), body * 0.4 + 140, 1.0)
        paint(patch(top[0], across, along, (0.3, 0.7, 0.55, 0.8)), body * 0.55, 1.0)
    elif spec.kind_name == "box":
        paint(patch(top[0], across, along, (0, 1, 0.42, 0.58)), body * 0.45 + 110, 1.0)
    for i in range(4):  # the edge that catches the light
        a, b = (top[i] * SUPERSAMPLING + anchor), (top[(i + 1) % 4] * SUPERSAMPLING + anchor)
        shine = np.zeros(x.shape, np.uint8)
        cv2.line(shine, *[tuple(int(v * 16) for v in p) for p in (a, b)], 255, 1, cv2.LINE_AA, 4)
        color += shine[:, :, None] * 0.12
    return Sprite(finish(color, alpha), anchor, spec.height / 2)


def _draw_round(spec: ObjectSpec, elevation: float, light_x: float, rng: np.random.Generator) -> Sprite:
    """A body of revolution (cup, can, bottle, bowl, ...) from its profile, with rim, handle, label or lid."""
    flat, upright = np.sin(elevation), np.cos(elevation)
    radius_max, height = spec.width / 2, spec.height
    levels = np.linspace(0, 1, len(spec.kind.profile))
    handle_room = radius_max * 1.1 if spec.kind_name in ("cup", "pot") else 0
    x, y, anchor = _grid(spec.width + 2 * handle_room, height * upright + radius_max * flat, radius_max * flat)
    shape = x.shape
    body_mask = np.zeros(shape, np.uint8)
    local_radius = np.full(shape[0], radius_max, np.float32)
    for level in np.linspace(0, 1, int(height * 2)):
        radius = radius_max * np.interp(level, levels, spec.kind.profile)
        center = (anchor[0], anchor[1] - level * height * upright * SUPERSAMPLING)
        axes = (radius * SUPERSAMPLING, radius * flat * SUPERSAMPLING)
        cv2.ellipse(
            body_mask,
            tuple(int(v * 16) for v in center),
            tuple(int(v * 16) for v in axes),
            0,
            0,
            360,
            255,
            -1,
            cv2.LINE_AA,
            4,
        )
    rows = -y[:, 0] / (height * upright)
    local_radius = radius_max * np.interp(rows, levels, spec.kind.profile)
    across = np.clip(x / np.maximum(local_radius, 1)[:, None], -1, 1)
    facing = 0.55 * light_x * across + np.sqrt(1 - 0.8 * across**2)
    shade = 0.38 + 0.62 * np.clip(facing, 0, 1.2)
    body = np.array(spec.color, np.float32)
    color = shade[:, :, None] * np.broadcast_to(body, (*shape, 3))
    alpha = body_mask.astype(np.float32) / 255

    if spec.kind_name in ("can", "bottle", "jar", "cup"):  # a label or stripe follows the curve of the body
        low, high = sorted(rng.uniform((0.12, 0.45), (0.3, 0.62)))
        curve = y + flat * np.sqrt(np.maximum(radius_max**2 - x**2, 0)) * -1
        band = coverage(np.minimum(-curve - low * height * upright, high * height * upright + curve))
        label = np.array(COLORS[("white", "yellow", "light blue", "red")[rng.integers(4)]], np.float32)
        color += (band * shade * (0.85 if spec.kind_name != "cup" else 0.5))[:, :, None] * (label - body)
    if spec.kind_name == "basket":
        weave = np.sin(np.arcsin(across) * 16) * np.sin(y * 1.1)
        color *= (1 + 0.16 * weave)[:, :, None]

    radius_top = radius_max * spec.kind.profile[-1]
    center_y = -height * upright
    rim = 1 - np.sqrt((x / radius_top) ** 2 + ((y - center_y) / (radius_top * flat)) ** 2)
    outer = coverage(rim * radius_top * flat)
    front = None
    if spec.kind.form in ("cup", "open"):
        inner = coverage((rim - 0.09) * radius_top * flat)
        inside = body * (0.35 + 0.3 * np.clip((y - center_y) / (radius_top * flat) + 0.3, 0, 1))[:, :, None]
        color = color * (1 - outer[:, :, None]) + outer[:, :, None] * np.minimum(body * 1.12 + 12, 255)
        color = color * (1 - inner[:, :, None]) + inner[:, :, None] * inside
        front = inner
    else:
        lid = np.minimum(body * 0.9 + 30, 255) if spec.kind_name != "can" else np.array((190, 192, 196))
        color = color * (1 - outer[:, :, None]) + outer[:, :, None] * lid
    if handle_room:
        _add_handle(color, alpha, x, y, spec, upright, body * 0.85)
    if spec.kind_name == "candle":
        wick = coverage(np.minimum(1.2 - np.abs(x), np.minimum(y - center_y + 9, center_y - y)))
        color, alpha = color * (1 - wick[:, :, None]) + 40 * wick[:, :, None], np.maximum(alpha, wick)
    gloss = np.exp(-(((across - 0.45 * light_x) / 0.13) ** 2)) * np.clip(alpha - outer, 0, 1)
    color = color + 60 * gloss[:, :, None]
    image = finish(color, alpha)
    if front is not None:
        behind_rim = (y < center_y).astype(np.float32) * alpha
        front = finish(color, np.clip(alpha - np.maximum(front, behind_rim), 0, 1))
    return Sprite(image, anchor, height / 2, front)


def _add_handle(
    color: np.ndarray,
    alpha: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    spec: ObjectSpec,
    upright: float,
    rgb: np.ndarray,
) -> None:
    """Adds the handle of a cup (one loop) or a pot (two short grips) beside the body, in place."""
    if spec.kind_name == "cup":
        centers = ((np.sign(spec.detail_seed % 2 - 0.5) * spec.width * 0.52, -0.5 * spec.height * upright),)
        loop = (spec.width * 0.22, spec.height * 0.26, 3.2)
    else:
        centers = tuple((s * spec.width * 0.52, -0.72 * spec.height * upright) for s in (-1, 1))
        loop = (spec.width * 0.1, spec.height * 0.1, 3.0)
    for cx, cy in centers:
        ring = np.sqrt(((x - cx) / loop[0]) ** 2 + ((y - cy) / loop[1]) ** 2)
        thickness = loop[2] - np.abs(ring - 1) * min(loop[0], loop[1])
        mask = coverage(thickness) * (1 - alpha)
        light = 0.8 + 0.08 * np.clip(thickness, 0, 3)
        color[:] = color * (1 - mask[:, :, None]) + (mask * light)[:, :, None] * rgb
        np.maximum(alpha, mask, out=alpha)


def _draw_ball(spec: ObjectSpec, elevation: float, light_x: float, rng: np.random.Generator) -> Sprite:
    """A shaded ellipsoid: a ball with a stripe, or a fruit with a stalk."""
    half_width, half_height = spec.width / 2, spec.height / 2
    x, y, anchor = _grid(spec.width, spec.height + 4, 4)
    u, v = x / half_width, (y + half_height) / half_height
    depth = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    light = 0.45 * light_x * u - 0.55 * v + 0.65 * depth
    shade = 0.36 + 0.68 * np.clip(light, 0, 1)
    body = np.array(spec.color, np.float32)
    surface = np.broadcast_to(body, (*x.shape, 3)).copy()
    if spec.kind_name == "ball":
        tilt = rng.uniform(-0.9, 0.9)
        stripe = coverage((0.16 - np.abs(u * np.sin(tilt) + v * np.cos(tilt) + 0.35 * depth - 0.2)) * half_width)
        other = np.array(COLORS["white" if sum(spec.color) < 560 else "blue"], np.float32)
        surface += stripe[:, :, None] * (other - body)
    else:
        surface *= 1 + 0.07 * smooth_noise(rng, *x.shape, 10)[:, :, None]
    color = surface * shade[:, :, None]
    color += 85 * np.exp(-(((u - 0.35 * light_x) / 0.2) ** 2 + ((v + 0.42) / 0.17) ** 2))[:, :, None]
    alpha = coverage((1 - np.sqrt(u**2 + v**2)) * half_height)
    if spec.kind_name in ("apple", "tomato"):
        stalk = coverage(np.minimum(1.6 - np.abs(x - 1), np.minimum(y + spec.height + 3, -spec.height + 8 - y)))
        color = color * (1 - stalk[:, :, None]) + stalk[:, :, None] * np.array((70, 84, 40), np.float32)
        alpha = np.maximum(alpha, stalk)
    return Sprite(finish(color, alpha), anchor, half_height)


def _draw_sheet(spec: ObjectSpec, elevation: float, light_x: float, rng: np.random.Generator) -> Sprite:
    """A light flat thing seen at an angle: a sheet of paper, a napkin, or a leaf or feather with its rib."""
    half_width, half_depth = spec.width / 2, spec.depth / 2 * (0.35 + 0.65 * np.sin(elevation))
    x, y, anchor = _grid(spec.width * 1.2, half_depth * 2 + 8, 8)
    bend = 4.0 * (x / half_width) ** 2
    across, along = x / half_width, (y + half_depth + bend) / half_depth
    if spec.kind.form == "leaf":
        outline = np.sqrt(np.clip(1 - across**2, 0, 1)) * (0.75 + 0.25 * across)
        distance = (outline - np.abs(along)) * half_depth
        rib = np.exp(-((along * half_depth / 1.3) ** 2)) + 0.35 * np.maximum(
            np.sin((across + np.abs(along) * 0.4) * 26), 0
        )
        shade = 0.86 + 0.14 * light_x * along - 0.16 * rib
    else:
        slant = across + 0.16 * along
        distance = np.minimum((1 - np.abs(slant)) * half_width, (1 - np.abs(along)) * half_depth)
        lines = (np.abs((along * 4) % 1 - 0.5) < 0.16) & (np.abs(slant) < 0.75) & (np.abs(along) < 0.85)
        shade = 0.9 + 0.12 * light_x * across - 0.22 * lines * (spec.kind_name == "paper")
    shade = shade + 0.03 * smooth_noise(rng, *x.shape, 12)
    color = shade[:, :, None] * np.array(spec.color, np.float32)
    return Sprite(finish(color, coverage(distance)), anchor, half_depth)


def _draw_drape(spec: ObjectSpec, elevation: float, light_x: float, rng: np.random.Generator) -> Sprite:
    """A cloth hanging over something: a rounded top, folds that widen downwards, and a wavy hem."""
    rise, hem = spec.height * np.cos(elevation), spec.depth / 2 * np.sin(elevation)
    x, y, anchor = _grid(spec.width * 1.15, rise + 10, hem + 8)
    down = np.clip((y + rise) / (rise + hem), 0, 1.2)
    half_width = spec.width / 2 * (0.34 + 0.66 * down**0.75)
    across = x / half_width
    phase, folds = rng.uniform(0, 6.28), rng.integers(4, 7)
    bottom = hem * np.sqrt(np.clip(1 - across**2, 0, 1)) + 2.5 * np.sin(across * folds * 3 + phase)
    dome = -rise + 0.42 * rise * np.clip(np.abs(x) / (spec.width * 0.3), 0, 1) ** 2.2
    distance = np.minimum(np.minimum((1 - np.abs(across)) * half_width, bottom - y), y - dome)
    fold = np.sin(np.arcsin(np.clip(across, -1, 1)) * folds + phase) * np.clip(down * 1.5 - 0.25, 0, 1)
    shade = 0.78 + 0.17 * fold + 0.2 * light_x * across - 0.16 * down + 0.12 * np.exp(-((down / 0.2) ** 2))
    color = shade[:, :, None] * np.array(spec.color, np.float32)
    if spec.kind_name != "cloth":
        stripes = 0.5 + 0.5 * np.tanh(6 * np.sin(down * rng.uniform(14, 20)))
        other = np.array(spec.color, np.float32) * 0.6 + (90 if sum(spec.color) < 420 else 10)
        color = color + (0.55 * stripes * shade)[:, :, None] * (other - np.array(spec.color, np.float32))
    color *= (1 + 0.03 * smooth_noise(rng, *x.shape, 3))[:, :, None]
    return Sprite(finish(color, coverage(distance)), anchor, spec.height / 2)
