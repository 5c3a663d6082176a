"""The hand that acts in a rendered clip, with its forearm and sleeve, as a sprite."""

from __future__ import annotations

import cv2
import numpy as np

from demo.renderer.sprites import SUPERSAMPLING, Sprite, coverage, finish

SKIN_TONES = ((238, 198, 172), (222, 172, 140), (198, 142, 108), (160, 108, 78), (116, 76, 54), (84, 56, 42))

# A right hand seen from its back, fingers up, in picture pixels from the point between thumb and fingertips
# that grips: per finger its joints (x, y) and radii, closed and open.
_CLOSED = (
    ((-5, 34), (-1, 12), (-4, -5)),
    ((6, 31), (10, 8), (5, -9)),
    ((15, 33), (20, 12), (15, -5)),
    ((23, 39), (28, 24), (25, 9)),
    ((-12, 60), (-25, 38), (-17, 14)),
)
_OPEN = (
    ((-5, 34), (-2, 8), (-2, -14)),
    ((6, 31), (12, 4), (13, -19)),
    ((15, 33), (25, 8), (28, -12)),
    ((23, 39), (34, 20), (40, 3)),
    ((-12, 60), (-32, 40), (-34, 15)),
)
_FINGER_RADII = ((6.8, 6.2, 5.2), (7.0, 6.4, 5.4), (6.8, 6.2, 5.2), (6.0, 5.4, 4.6), (8.5, 7.2, 6.0))
_PALM = (
    ((-6, 38), (-4, 64), 12, 12),
    ((8, 35), (6, 68), 13, 14),
    ((19, 42), (14, 68), 11, 12),
    ((5, 66), (6, 96), 15.5, 14.5),
)
_HAND_LEFT, _HAND_TOP = 50, 30  # room on either side of the gripping point and above it, picture pixels
_ARM_LENGTH = 370  # picture pixels; long enough to reach out of the picture from anywhere in it


def draw_hands(
    skin: tuple[int, int, int],
    sleeve: tuple[int, int, int],
    sleeve_start: float,
    openness: tuple[float, ...],
    mirrored: bool,
    light_x: float,
) -> tuple[Sprite, ...]:
    """The same hand with forearm and sleeve, fingers up, once per `openness` (0: closed, 1: spread fingers).

    `sleeve_start` is where the sleeve begins, in picture pixels from the gripping point, at most 150.
    """
    light_across = -light_x if mirrored else light_x
    x = (np.arange(-_HAND_LEFT * SUPERSAMPLING, _HAND_LEFT * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    y = (np.arange(-_HAND_TOP * SUPERSAMPLING, _ARM_LENGTH * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    first = int(np.searchsorted(y, sleeve_start))
    cloth = _draw_sleeve(x[None, :], y[first:, None], sleeve, sleeve_start, light_across)
    skin_rows = int(np.searchsorted(y, sleeve_start + 12))
    sprites = []
    for spread in openness:
        image = np.zeros((len(y), len(x), 4), np.uint8)
        image[:skin_rows] = _draw_skin(x, y[:skin_rows], skin, spread, light_across)
        uncovered = 255 - cloth[:, :, 3:].astype(np.uint16)
        image[first:] = cloth + (image[first:] * uncovered // 255).astype(np.uint8)
        if mirrored:
            image = np.ascontiguousarray(image[:, ::-1])
        sprites.append(Sprite(image, (float(_HAND_LEFT * SUPERSAMPLING), float(_HAND_TOP * SUPERSAMPLING))))
    return tuple(sprites)


def _draw_skin(
    x: np.ndarray, y: np.ndarray, skin: tuple[int, int, int], openness: float, light_across: float
) -> np.ndarray:
    """Hand and wrist as a height field, the upper hull of round capsules, shaded from its slope.

    Fingers, knuckles and the creases between them come out of the field by themselves. Returns RGBA for
    columns x and rows y, given in picture pixels.
    """
    height = np.zeros((len(y), len(x)), np.float32)
    inside = np.full((len(y), len(x)), -9, np.float32)

    def add_capsule(a: tuple, b: tuple, radius_a: float, radius_b: float, lift: float = 0.0) -> None:
        reach = max(radius_a, radius_b) + 3
        rows = slice(*np.searchsorted(y, (min(a[1], b[1]) - reach, max(a[1], b[1]) + reach)))
        columns = slice(*np.searchsorted(x, (min(a[0], b[0]) - reach, max(a[0], b[0]) + reach)))
        px, py = x[None, columns] - a[0], y[rows, None] - a[1]
        dx, dy = b[0] - a[0], b[1] - a[1]
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        radius = radius_a + t * (radius_b - radius_a)
        distance = np.sqrt((px - t * dx) ** 2 + (py - t * dy) ** 2)
        bulge = np.sqrt(np.clip(radius**2 - distance**2, 0, None)) + np.where(distance < radius, lift, 0)
        height[rows, columns] = np.maximum(height[rows, columns], bulge)
        inside[rows, columns] = np.maximum(inside[rows, columns], radius - distance)

    for a, b, radius_a, radius_b in _PALM:
        add_capsule(a, b, radius_a, radius_b)
    for closed, spread, radii in zip(_CLOSED, _OPEN, _FINGER_RADII, strict=True):
        joints = [
            (c[0] + openness * (o[0] - c[0]), c[1] + openness * (o[1] - c[1]))
            for c, o in zip(closed, spread, strict=True)
        ]
        add_capsule(joints[0], joints[1], radii[0], radii[1], 4)
        add_capsule(joints[1], joints[2], radii[1], radii[2], 4)
    add_capsule((6, 92), (8, _ARM_LENGTH + 30), 14.5, 22)

    smooth = cv2.GaussianBlur(height, (0, 0), 2.2)
    slope_x = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, scale=SUPERSAMPLING / 8)
    slope_y = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, scale=SUPERSAMPLING / 8)
    normal_z = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    light = (1 - 0.5 * light_across * slope_x + 0.45 * slope_y) * normal_z
    shade = 0.42 + 0.52 * np.clip(light, 0, 1.25)
    color = shade[:, :, None] * np.array(skin, np.float32)
    color[:, :, 0] += 10 * (1 - normal_z)  # skin glows red where it turns away
    return finish(color, coverage(inside))


def _draw_sleeve(
    x: np.ndarray, y: np.ndarray, rgb: tuple[int, int, int], start: float, light_across: float
) -> np.ndarray:
    """RGBA of a sleeve, a shaded tube with folds and a cuff, for columns x and rows y in picture pixels."""
    radius = 19.5 + (y - 92) * 0.023
    offset = (x - 6.5) / radius
    folds = 0.07 * np.sin(0.38 * y + 2.0 * np.sin(0.11 * x) + 3 * np.sin(0.023 * y))
    shade = 0.4 + 0.55 * np.sqrt(np.clip(1 - offset**2, 0, 1)) + folds + 0.15 * light_across * offset
    shade = shade + 0.12 * np.clip(1 - (y - start) / 5, 0, 1)
    return finish(shade[:, :, None] * np.array(rgb, np.float32), coverage((1 - np.abs(offset)) * radius))
