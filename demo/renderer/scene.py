"""The stage of a rendered clip: table, wall and floor, light, camera, and the compositing of sprites.

Coordinates are picture pixels of the 320 x 240 frame, x to the right and y downwards. An object stands at
ground position (x, y), so y is also its depth (larger is nearer), and z is its height above the table in
pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from demo.renderer.sprites import SUPERSAMPLING, Sprite, smooth_noise

FRAME_WIDTH, FRAME_HEIGHT, FPS = 320, 240, 12
MARGIN = 10  # pixels drawn beyond each side of the frame, for the camera to move in
HAND_DEPTH = 2.0  # a hand is this much nearer than what it holds


@dataclass(frozen=True)
class Pose:
    """Where and how a sprite is shown: ground position, height, clockwise turn in degrees, and stretch."""

    x: float
    y: float
    z: float = 0.0
    angle: float = 0.0
    stretch_x: float = 1.0
    stretch_y: float = 1.0
    support: float = 0.0  # height of what lies below (0: the table), where a contact shadow is drawn
    visible: bool = True


@dataclass
class Actor:
    """A sprite and its pose as a function of the share of the clip that has passed (0 to 1).

    `nearer` is added to the ground position's y when actors are sorted from far to near.
    """

    sprite: Sprite
    pose: Callable[[float], Pose]
    nearer: float = 0.0
    is_hand: bool = False


@dataclass(frozen=True)
class Light:
    """`direction_x` is -1 (from the left) to 1 (right); slants: pixels of shadow per pixel of height."""

    direction_x: float
    slant_x: float
    slant_y: float
    strength: float


@dataclass
class Stage:
    """Everything of a clip that is not acted: `background` (RGB, with margins), light, gain, camera path."""

    background: np.ndarray
    light: Light
    gain: np.ndarray
    camera: Callable[[int], np.ndarray]
    perspective: Callable[[float], float]
    noise: np.ndarray
    noise_offsets: np.ndarray

    def add_props(self, props: list[Actor]) -> None:
        """Paints things that never move, with their shadows, into the background."""
        _paint_actors(self.background, props, 0.0, self)


def draw_background(
    rng: np.random.Generator, table_back: float, table_side: float | None, falls_right: bool
) -> np.ndarray:
    """Wall, floor and table as one RGB picture with margins.

    `table_back` is the y of the table's far edge (negative: only the table is seen). With `table_side`, an x,
    the table ends there and the floor is seen beyond: on the right if `falls_right`, else on the left.
    """
    height, width = FRAME_HEIGHT + 2 * MARGIN, FRAME_WIDTH + 2 * MARGIN
    picture = _wall(rng, height, width)
    back = int(round(table_back)) + MARGIN
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    if table_side is not None:
        floor_top = max(back + 8, 12)
        picture[floor_top:] = _table_texture(rng, height - floor_top, width, ("carpet", "tiles", "plain"))[:] * 0.72
        picture[floor_top - 3 : floor_top] *= 0.8
    back = max(back, 0)
    table = _table_texture(rng, height - back, width, ("wood", "wood", "cloth", "speckle", "marble", "plain"))
    if table_side is None:
        picture[back:] = table
        if back > 2:
            picture[back - 3 : back] *= 0.75
            picture[back : back + 2] = picture[back : back + 2] * 0.7 + 70
        return np.clip(picture, 0, 255).astype(np.uint8)
    sign = 1 if falls_right else -1
    edge = table_side + MARGIN + sign * 0.18 * (y - 150 - MARGIN)
    inside = np.clip(sign * (edge - x) + 0.5, 0, 1)
    inside[:back] = 0
    slab = np.clip(sign * (edge - x) + 9.5, 0, 1)
    slab[: back + 4] = 0
    shade = np.clip(1 - 0.45 * np.exp(-np.clip(sign * (x - edge), 0, None) / 26), 0, 1)  # the table's own shadow
    shade[:back] = 1
    picture *= shade[:, :, None]
    full_table = np.zeros_like(picture)
    full_table[back:] = table
    edge_color = table.reshape(-1, 3).mean(axis=0) * 0.5
    picture = picture * (1 - slab[:, :, None]) + slab[:, :, None] * edge_color
    picture = picture * (1 - inside[:, :, None]) + inside[:, :, None] * full_table
    return np.clip(picture, 0, 255).astype(np.uint8)


def _wall(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An out-of-focus wall: plaster, perhaps with a picture, a window, a curtain or a cupboard."""
    base = np.array(
        [(206, 200, 188), (178, 190, 198), (190, 178, 160), (150, 156, 150), (216, 210, 204), (170, 150, 140)][
            rng.integers(6)
        ],
        np.float32,
    ) * rng.uniform(0.7, 1.0)
    plaster = 1 + 0.02 * smooth_noise(rng, height, width, 14) + 0.06 * smooth_noise(rng, height, width, 120)
    wall = plaster[:, :, None] * base
    for _ in range(rng.integers(0, 3)):
        left, span, bottom = (int(rng.integers(-30, width)), int(rng.integers(30, 110)), int(rng.integers(20, 90)))
        tone = base * rng.uniform(0.45, 1.25) + rng.uniform(-22, 22, 3)
        wall[:bottom, max(left, 0) : max(left + span, 0)] = tone
        wall[: max(bottom - 6, 0), max(left + 5, 0) : max(left + span - 5, 0)] = tone * rng.uniform(0.8, 1.15)
    return cv2.GaussianBlur(wall, (0, 0), 2.5)


def _table_texture(rng: np.random.Generator, height: int, width: int, choices: tuple[str, ...]) -> np.ndarray:
    """A surface seen in perspective, float32 RGB (height, width, 3): denser farther away."""
    name = choices[rng.integers(len(choices))]
    rows, columns = 300, 420
    tones = {
        "wood": ((164, 116, 72), (122, 80, 48), (198, 156, 108), (92, 62, 44), (184, 132, 84)),
        "cloth": ((170, 60, 58), (76, 104, 142), (196, 188, 172), (92, 126, 96), (150, 140, 150)),
        "speckle": ((186, 184, 180), (120, 122, 128), (206, 200, 186)),
        "marble": ((212, 208, 202), (170, 172, 176), (90, 94, 98)),
        "carpet": ((120, 104, 92), (96, 106, 120), (140, 120, 100), (84, 92, 84)),
        "tiles": ((176, 168, 156), (140, 132, 124)),
        "plain": ((200, 196, 188), (132, 140, 146), (96, 90, 88), (172, 158, 140), (62, 68, 78)),
    }[name]
    base = np.array(tones[rng.integers(len(tones))], np.float32) * rng.uniform(0.8, 1.1) + rng.uniform(-10, 10, 3)
    value = 1 + 0.05 * smooth_noise(rng, rows, columns, 90)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    if name == "wood":
        value += 0.055 * smooth_noise(rng, rows, columns, 9, 12) + 0.03 * smooth_noise(rng, rows, columns, 4, 30)
        plank = rng.uniform(70, 130)
        index = np.floor(y / plank).astype(int)
        value += rng.uniform(-0.07, 0.07, index.max() + 1)[index] - 0.14 * np.exp(-(((y % plank) / 1.6) ** 2))
    elif name == "cloth":
        period = rng.uniform(46, 90)
        bands = np.tanh(3 * np.sin(x * 6.283 / period)) + np.tanh(3 * np.sin(y * 6.283 / period))
        value += rng.uniform(0, 0.05) * bands + 0.03 * smooth_noise(rng, rows, columns, 2.5)
    elif name == "marble":
        vein = smooth_noise(rng, rows, columns, 60, 1.6) + 0.5 * smooth_noise(rng, rows, columns, 22)
        value += 0.04 * vein - 0.13 * np.exp(-((vein / 0.13) ** 2))
    elif name == "tiles":
        period = rng.uniform(70, 110)
        grout = np.minimum(x % period, y % period)
        value += 0.03 * smooth_noise(rng, rows, columns, 10) - 0.16 * np.exp(-((grout / 2.2) ** 2))
    else:
        grain = {"speckle": 0.035, "carpet": 0.045, "plain": 0.015}[name]
        value += grain * smooth_noise(rng, rows, columns, 3.2)
    tint = 1 + 0.02 * smooth_noise(rng, rows, columns, 70)
    texture = value[:, :, None] * base
    texture[:, :, 2] *= tint
    inset = 0.2 * columns * rng.uniform(0.5, 1.0)
    source = np.float32([(inset * 0.2, 0), (columns - inset * 0.2, 0), (columns - inset, rows), (inset, rows)])
    target = np.float32([(0, 0), (width, 0), (width, height), (0, height)])
    matrix = cv2.getPerspectiveTransform(source, target)
    warped = cv2.warpPerspective(texture, matrix, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    return cv2.GaussianBlur(warped, (0, 0), 0.8)


def make_stage(rng: np.random.Generator, num_frames: int, background: np.ndarray, light: Light) -> Stage:
    """Adds light, camera path and sensor noise, all drawn from `rng`, to a background."""
    y, x = np.mgrid[-1 : 1 : FRAME_HEIGHT * 1j, -1 : 1 : FRAME_WIDTH * 1j].astype(np.float32)
    vignette = 1 - rng.uniform(0.05, 0.2) * (x**2 + y**2) / 2 + rng.uniform(0.02, 0.12) * light.direction_x * x
    warmth = rng.uniform(-0.06, 0.06)
    tint = np.array((1 + warmth, 1.0, 1 - warmth), np.float32) * rng.uniform(0.82, 1.08)
    gain = np.clip(vignette[:, :, None] * tint * 200, 0, 255).astype(np.uint8)

    # A hand-held camera: two slow sinusoids per axis, periods 1.5 to 6 seconds, together about a pixel.
    amplitudes = rng.uniform(0.1, 0.7, (3, 2)) * np.array([[1.0], [0.8], [0.15]])
    rates = 2 * np.pi / (rng.uniform(1.5, 6.0, (3, 2)) * FPS)
    phases = rng.uniform(0, 2 * np.pi, (3, 2))

    def camera(frame_index: int) -> np.ndarray:
        shift_x, shift_y, turn = (amplitudes * np.sin(rates * frame_index + phases)).sum(axis=1)
        matrix = cv2.getRotationMatrix2D((FRAME_WIDTH / 2 + MARGIN, FRAME_HEIGHT / 2 + MARGIN), turn, 1.0)
        matrix[:, 2] += (shift_x - MARGIN, shift_y - MARGIN)
        return matrix

    def perspective(ground_y: float) -> float:
        return 1.0 + 0.0028 * (ground_y - 165)

    noise = cv2.convertScaleAbs(_noise_tile(), alpha=rng.uniform(1.0, 2.5), beta=128)
    return Stage(background, light, gain, camera, perspective, noise, rng.integers(0, 64, (num_frames, 2)))


@functools.cache
def _noise_tile() -> np.ndarray:
    """Sensor noise of deviation 1, float32; each frame of each clip shows another part of the same tile."""
    return np.random.default_rng(0).standard_normal((FRAME_HEIGHT + 64, FRAME_WIDTH + 64, 3), np.float32)


def render_frame(stage: Stage, actors: list[Actor], frame_index: int, progress: float) -> np.ndarray:
    """One uint8 RGB frame (240, 320, 3): all shadows, then all sprites from far to near, then the camera."""
    canvas = stage.background.copy()
    _paint_actors(canvas, actors, progress, stage)
    frame = cv2.warpAffine(canvas, stage.camera(frame_index), (FRAME_WIDTH, FRAME_HEIGHT), flags=cv2.INTER_LINEAR)
    frame = cv2.GaussianBlur(frame, (3, 3), 0.55)
    frame = cv2.multiply(frame, stage.gain, scale=1 / 200)
    row, column = stage.noise_offsets[frame_index]
    noise = stage.noise[row : row + FRAME_HEIGHT, column : column + FRAME_WIDTH]
    return cv2.addWeighted(frame, 1.0, noise, 1.0, -128)


def _paint_actors(canvas: np.ndarray, actors: list[Actor], progress: float, stage: Stage) -> None:
    """Paints all shadows, then all sprites from far to near; containers hide what lies in them."""
    shown = [(actor, actor.pose(progress)) for actor in actors]
    shown = sorted(((a, p) for a, p in shown if p.visible), key=lambda pair: pair[1].y + pair[0].nearer)
    for actor, pose in shown:
        _cast_shadow(canvas, actor, pose, stage)
    containers: list[tuple[Actor, Pose]] = []
    for actor, pose in shown:
        if containers and pose.y + actor.nearer > containers[0][1].y + 1:
            _paint_fronts(canvas, containers, stage)
        if pose.support != 0 and pose.z - pose.support < 30:
            _contact_shadow(canvas, actor.sprite, pose, stage)
        _paint(canvas, actor.sprite, actor.sprite.image, pose, stage)
        if actor.sprite.front is not None:
            containers.append((actor, pose))
    _paint_fronts(canvas, containers, stage)


def _paint_fronts(canvas: np.ndarray, containers: list[tuple[Actor, Pose]], stage: Stage) -> None:
    """Draws the near walls of open containers over what lies inside them, and forgets the containers."""
    for actor, pose in containers:
        _paint(canvas, actor.sprite, actor.sprite.front, pose, stage)
    containers.clear()


def _sprite_matrix(sprite: Sprite, pose: Pose, stage: Stage) -> np.ndarray:
    """The affine map (2, 3) from sprite pixels to canvas pixels."""
    scale = stage.perspective(pose.y) / SUPERSAMPLING
    cosine, sine = scale * math.cos(math.radians(pose.angle)), scale * math.sin(math.radians(pose.angle))
    xx, xy = cosine * pose.stretch_x, -sine * pose.stretch_y
    yx, yy = sine * pose.stretch_x, cosine * pose.stretch_y
    pivot_x, pivot_y = sprite.anchor[0], sprite.anchor[1] - sprite.pivot_height * SUPERSAMPLING
    place_x = pose.x + MARGIN
    place_y = pose.y - pose.z - sprite.pivot_height * scale * SUPERSAMPLING + MARGIN
    return np.array([[xx, xy, place_x - xx * pivot_x - xy * pivot_y], [yx, yy, place_y - yx * pivot_x - yy * pivot_y]])


def _region(matrix: np.ndarray, picture: np.ndarray, canvas: np.ndarray) -> tuple[int, int, int, int] | None:
    """The part (left, top, right, bottom) of the canvas that a warped picture covers, or None."""
    bounds = []
    for (along_x, along_y, start), limit in zip(matrix.tolist(), canvas.shape[1::-1], strict=True):
        along_x, along_y = along_x * picture.shape[1], along_y * picture.shape[0]
        low = max(math.floor(start + min(along_x, 0) + min(along_y, 0)), 0)
        high = min(math.ceil(start + max(along_x, 0) + max(along_y, 0)) + 1, limit)
        if high <= low:
            return None
        bounds.append((low, high))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def _warp(picture: np.ndarray, matrix: np.ndarray, region: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = region
    shifted = matrix - np.array([[0, 0, left], [0, 0, top]])
    return cv2.warpAffine(picture, shifted, (right - left, bottom - top), flags=cv2.INTER_LINEAR)


def _paint(canvas: np.ndarray, sprite: Sprite, picture: np.ndarray, pose: Pose, stage: Stage) -> None:
    """Alpha-blends a premultiplied picture of the sprite onto the canvas."""
    matrix = _sprite_matrix(sprite, pose, stage)
    region = _region(matrix, picture, canvas)
    if region is None:
        return
    left, top, right, bottom = region
    warped = _warp(picture, matrix, region)
    keep = cv2.cvtColor(cv2.bitwise_not(cv2.extractChannel(warped, 3)), cv2.COLOR_GRAY2RGB)
    part = cv2.multiply(np.ascontiguousarray(canvas[top:bottom, left:right]), keep, scale=1 / 255)
    canvas[top:bottom, left:right] = cv2.add(part, cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB))


def _darken(canvas: np.ndarray, alpha: np.ndarray, matrix: np.ndarray, strength: float) -> None:
    region = _region(matrix, alpha, canvas)
    if region is None:
        return
    left, top, right, bottom = region
    shade = cv2.convertScaleAbs(_warp(alpha, matrix, region), alpha=strength)
    keep = cv2.cvtColor(cv2.bitwise_not(shade), cv2.COLOR_GRAY2RGB)
    canvas[top:bottom, left:right] = cv2.multiply(
        np.ascontiguousarray(canvas[top:bottom, left:right]), keep, scale=1 / 255
    )


def _cast_shadow(canvas: np.ndarray, actor: Actor, pose: Pose, stage: Stage) -> None:
    """The sprite's outline laid onto the table along the light, and a darker spot where it touches."""
    sprite, light = actor.sprite, stage.light
    strength = light.strength * float(np.exp(-max(pose.z, 0) / 160))
    to_sprite = np.array([[4.0, 0, -32], [0, 4, -32], [0, 0, 1]])  # the outline is a quarter of the sprite, padded
    if actor.is_hand:
        matrix = _sprite_matrix(sprite, pose, stage) @ to_sprite
        matrix[:, 2] += (light.slant_x * (pose.z + 14), 8 + (light.slant_y + 0.25) * pose.z)
        _darken(canvas, sprite.shadow, matrix, 0.75 * strength)
        return
    if pose.z < -6:  # below the table's top
        return
    scale = stage.perspective(pose.y) / SUPERSAMPLING
    flatness = light.slant_y if abs(light.slant_y) > 0.12 else 0.12
    linear = scale * np.array([[pose.stretch_x, -light.slant_x * pose.stretch_y], [0, -flatness * pose.stretch_y]])
    ground = np.array((pose.x + light.slant_x * pose.z, pose.y + light.slant_y * pose.z)) + MARGIN
    matrix = np.column_stack([linear, ground - linear @ sprite.anchor]) @ to_sprite
    _darken(canvas, sprite.shadow, matrix, strength)
    if pose.z < 40 and pose.support == 0:
        _contact_shadow(canvas, sprite, pose, stage)


_BLOB = np.clip(255 * np.exp(-3.2 * (np.mgrid[-1.5:1.5:48j, -1.5:1.5:48j] ** 2).sum(axis=0)) - 3, 0, 255).astype(
    np.uint8
)


def _contact_shadow(canvas: np.ndarray, sprite: Sprite, pose: Pose, stage: Stage) -> None:
    """A soft dark ellipse on what lies below, which fades as the object rises."""
    gap = max(pose.z - pose.support, 0)
    half_width = 0.5 * sprite.image.shape[1] / SUPERSAMPLING * stage.perspective(pose.y) * pose.stretch_x
    linear = np.diag((half_width * 1.35 / 24, half_width * 0.6 / 24))
    place = np.array((pose.x, pose.y - pose.support)) + MARGIN
    matrix = np.column_stack([linear, place - linear @ (23.5, 23.5)])
    _darken(canvas, _BLOB, matrix, 0.55 * np.exp(-gap / 18))
