"""How hand and objects move in the rendered clips (which sentence is told how: `demo/renderer/templates.py`).

Motion profile. Time is the share u of the clip that has passed (frame index / number of frames), so an
action always takes the whole clip and a long clip is a slow action. The profile was chosen for
plausibility alone:

- A hand moves along minimum-jerk curves, 10 s^3 - 15 s^4 + 6 s^5 (Flash and Hogan, "The coordination of arm
  movements", J. Neuroscience 5(7), 1985): it starts, speeds up, slows down and stops.
- It reaches the object after 12% of the clip, acts until about 85%, and withdraws; objects carried in are
  on their way at the first frame. An action's times are the same in all clips, so that a frame and the
  progress tell what comes next.
- A released object falls with constant acceleration, bounces with its kind's coefficient of restitution
  and comes to rest. A fall from 110 pixels takes 0.27 of the clip. At a picture scale of about 4 pixels a
  centimeter that is slower than on Earth, as in slow motion; at full speed a fall from hand height is over
  within three or four frames at 12 frames per second.
- A sheet or leaf reaches its terminal speed at once and sways from side to side with a period of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from demo.renderer.scene import HAND_DEPTH, Actor, Light, Pose
from demo.renderer.sprites import ObjectSpec, Sprite, draw_object

Point = tuple[float, float, float]  # x, ground y, height z in picture pixels

GRAVITY = 3000.0  # pixels per clip length squared


def minimum_jerk(share: float) -> float:
    """Position (0 to 1) on a minimum-jerk movement after `share` of its time; 0 before it and 1 after it."""
    s = min(max(share, 0.0), 1.0)
    return s**3 * (10 - 15 * s + 6 * s * s)


def falling_height(elapsed: float, drop: float, restitution: float) -> float:
    """Height above the resting place of something let go at height `drop`, `elapsed` clip lengths ago.

    Constant acceleration GRAVITY; each bounce keeps the share `restitution` of the speed; below 12% of the
    first impact's speed it rests.
    """
    time_to_ground = np.sqrt(2 * drop / GRAVITY)
    if elapsed < time_to_ground:
        return drop - GRAVITY * max(elapsed, 0.0) ** 2 / 2
    elapsed -= time_to_ground
    speed = restitution * GRAVITY * time_to_ground
    while restitution > 0 and speed > 0.12 * GRAVITY * time_to_ground:
        flight = 2 * speed / GRAVITY
        if elapsed < flight:
            return speed * elapsed - GRAVITY * elapsed**2 / 2
        elapsed -= flight
        speed *= restitution
    return 0.0


class Director:
    """What a choreography works with: the clip's random numbers, objects, hands and camera elevation."""

    def __init__(
        self,
        rng: np.random.Generator,
        objects: list[ObjectSpec],
        hands: tuple[Sprite, Sprite],
        light: Light,
        elevation: float,
    ) -> None:
        self.rng, self.objects, self.hands, self.light, self.elevation = rng, objects, hands, light, elevation
        self.table_side: float | None = None
        self.side = 1 if rng.random() < 0.5 else -1  # which side a carried object comes from

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def top(self, spec: ObjectSpec) -> float:
        """Height of an object in the picture."""
        return spec.height * float(np.cos(self.elevation))

    def actor(self, spec: ObjectSpec, pose: Callable[[float], Pose], nearer: float = 0.0) -> Actor:
        return Actor(draw_object(spec, self.elevation, self.light.direction_x), pose, nearer=nearer)

    def still(self, spec: ObjectSpec, x: float, y: float) -> Actor:
        return self.actor(spec, lambda u: Pose(x, y))

    def hand(
        self,
        grip: Callable[[float], Point],
        shoulder: tuple[float, float],
        arrive: float,
        leave: float,
        from_front: bool = False,
    ) -> list[Actor]:
        """Open and closed hand: reaches `grip` at `arrive`, follows it, lets go at `leave` and withdraws.

        `shoulder` is the point outside the picture where the arm begins; `arrive` < 0: held from the start.
        """
        reach_from = arrive - 0.14
        withdraw_until = leave + 0.2

        def pose(u: float, closed: bool) -> Pose:
            x, y, z = grip(min(max(u, arrive), leave))
            away = 0.0
            if u < arrive:
                away = 1 - minimum_jerk((u - reach_from) / (arrive - reach_from))
            elif u > leave + 0.02:
                away = minimum_jerk((u - leave - 0.02) / (withdraw_until - leave))
            toward_x, toward_y = shoulder[0] - x, shoulder[1] - (y - z)
            back = 300 * away / math.hypot(toward_x, toward_y)
            is_closed = arrive - 0.015 <= u <= leave
            return Pose(
                x + back * toward_x,
                y,
                z - back * toward_y,
                math.degrees(math.atan2(-toward_x, toward_y)),
                visible=closed == is_closed and away < 0.999,
            )

        nearer = 400.0 if from_front else HAND_DEPTH
        return [
            Actor(sprite, lambda u, closed=closed: pose(u, closed), is_hand=True, nearer=nearer)
            for sprite, closed in zip(self.hands, (False, True), strict=True)
        ]

    def shoulder(self, side: float, low: float, high: float) -> tuple[float, float]:
        """A point right (side > 0) or left of the picture, `low` to `high` pixels below its top."""
        return 160 + side * self.between(230, 300), self.between(low, high)


def slide(
    d: Director, direction: int, pushed: bool, span: tuple[float, float] | None = None, y: float | None = None
) -> list[Actor]:
    """The hand moves the first object sideways, pushing from behind or pulling from the front."""
    spec = d.objects[0]
    if span is None:
        distance, center = d.between(105, 165), d.between(145, 175)
        span = center - direction * distance / 2, center + direction * distance / 2
    y = d.between(160, 202) if y is None else y
    drift = d.between(-5, 5)
    start, stop = 0.12, 0.87
    rolling = 360 / (np.pi * spec.width) if spec.kind.form == "ball" and pushed else 0.0

    def pose(u: float) -> Pose:
        share = minimum_jerk((u - start) / (stop - start))
        x = span[0] + share * (span[1] - span[0])
        return Pose(x, y + share * drift, angle=rolling * (x - span[0]))

    hand_side = -direction if pushed else direction

    def grip(u: float) -> Point:
        p = pose(u)
        return p.x + hand_side * (spec.width / 2 - 2), p.y, 0.5 * d.top(spec)

    return [d.actor(spec, pose), *d.hand(grip, d.shoulder(hand_side, 170, 300), start, stop, from_front=True)]


def change_distance(d: Director, closer: bool) -> list[Actor]:
    """The first object is moved closer to the second or away from it, along a line."""
    spec, other = d.objects
    side, y = d.side, d.between(162, 195)
    other_x = 160 - side * d.between(74, 94)
    near = other_x + side * ((spec.width + other.width) / 2 + d.between(8, 16))
    far = near + side * d.between(85, 115)
    span = (far, near) if closer else (near, far)
    pushed = closer  # the hand stays on the free side of the object
    direction = int(np.sign(span[1] - span[0]))
    return [d.still(other, other_x, y - d.between(4, 12)), *slide(d, direction, pushed, span, y)]


def raise_or_lower(d: Director, up: bool) -> list[Actor]:
    """The hand lifts the object straight up and keeps it there, or brings it down onto the table."""
    spec = d.objects[0]
    x, y, sway = d.between(110, 210), d.between(170, 205), d.between(-14, 14)
    rise = min(d.between(85, 125), y - d.top(spec) - 14)
    start, stop = (0.12, 0.88) if up else (0.01, 0.81)

    def pose(u: float) -> Pose:
        share = minimum_jerk((u - start) / (stop - start))
        share = share if up else 1 - share
        return Pose(x + sway * share, y, rise * share)

    def grip(u: float) -> Point:
        p = pose(u)
        return p.x + d.side * spec.width * 0.2, p.y, p.z + 0.8 * d.top(spec)

    arrive, leave = (start, 2.0) if up else (-1.0, stop)
    return [d.actor(spec, pose), *d.hand(grip, d.shoulder(d.side, 70, 190), arrive, leave)]


@dataclass(frozen=True)
class Landing:
    """Where a dropped or placed object comes to rest, and the other object of the scene, if any."""

    x: float
    y: float
    z: float
    others: list[Actor]


def _landing(d: Director, where: str, spec: ObjectSpec) -> Landing:
    """Chooses resting place and position of the second object so that `where` (a preposition) is true."""
    x = d.between(130, 190)
    if where == "surface":
        return Landing(x, d.between(165, 205), 0.0, [])
    other = d.objects[1]
    if where == "onto":
        y = d.between(160, 190)
        return Landing(x, y, d.top(other) - 1, [d.still(other, x, y)])
    if where == "into":
        y = d.between(165, 195)
        return Landing(x, y, 0.14 * other.height, [d.still(other, x, y)])
    if where == "next to":
        y, gap = d.between(160, 195), (spec.width + other.width) / 2 + d.between(6, 14)
        return Landing(x + d.side * gap / 2, y, 0.0, [d.still(other, x - d.side * gap / 2, y - d.between(0, 6))])
    apart = d.between(34, 42) + spec.depth * 0.15
    y, shift = d.between(152, 164), d.between(6, 18) * d.side
    if where == "in front of":
        return Landing(x + shift, y + apart, 0.0, [d.still(other, x, y)])
    return Landing(x + 1.6 * shift, y, 0.0, [d.still(other, x, y + apart)])  # behind


def drop(d: Director, where: str) -> list[Actor]:
    """The hand carries the object over its landing place, lets go, and the object falls and bounces."""
    spec = d.objects[0]
    end = _landing(d, where, spec)
    height = min(110.0, end.y - end.z - d.top(spec) - 8)
    release, carry = 0.41, d.side * d.between(95, 140)
    restitution = min(spec.kind.restitution, 0.3) if where in ("onto", "into") else spec.kind.restitution
    tilt = d.between(-16, 16)

    def pose(u: float) -> Pose:
        away = 1 - minimum_jerk((u + 0.08) / (release + 0.04))
        z = end.z + falling_height(u - release, height, restitution)
        tumble = tilt * np.sin(np.pi * np.clip((u - release) / np.sqrt(2 * height / GRAVITY), 0, 1))
        return Pose(end.x + away * carry, end.y, z + 10 * away, tumble, support=end.z)

    def grip(u: float) -> Point:
        p = pose(min(u, release))
        return p.x + d.side * spec.width * 0.15, p.y, p.z + 0.85 * d.top(spec)

    hand = d.hand(grip, d.shoulder(d.side, 10, 110), -1.0, release)
    return [*end.others, d.actor(spec, pose, nearer=0.5), *hand]


def float_down(d: Director) -> list[Actor]:
    """A sheet, leaf or feather is let go and sways down slowly."""
    spec = d.objects[0]
    x, y, height = d.between(130, 190), d.between(175, 205), 138.0
    release, rest = 0.19, 0.92
    sway, swings, turn = d.side * 26, 2, 15

    def pose(u: float) -> Pose:
        share = float(np.clip((u - release) / (rest - release), 0, 1))
        calm = min(1.0, 4 * (1 - share))
        swing = 2 * np.pi * swings * share
        return Pose(x + sway * np.sin(swing), y, height * (1 - share), turn * np.cos(swing) * d.side * calm)

    def grip(u: float) -> Point:
        return x + d.side * spec.width * 0.45, y, height + 6

    hand = d.hand(grip, d.shoulder(d.side, 10, 100), -1.0, release)
    return [d.actor(spec, pose), *hand]


def lift_and_drop(d: Director) -> list[Actor]:
    """The hand lifts the object, holds it for a moment and lets it drop."""
    spec = d.objects[0]
    x, y = d.between(120, 200), d.between(170, 205)
    height = min(105.0, y - d.top(spec) - 10)
    start, release = 0.1, 0.5

    def pose(u: float) -> Pose:
        if u < release:
            return Pose(x, y, height * minimum_jerk((u - start) / (release - 0.03 - start)))
        return Pose(x, y, falling_height(u - release, height, spec.kind.restitution))

    def grip(u: float) -> Point:
        p = pose(min(u, release - 1e-6))
        return p.x + d.side * spec.width * 0.2, p.y, p.z + 0.85 * d.top(spec)

    return [d.actor(spec, pose), *d.hand(grip, d.shoulder(d.side, 60, 160), start, release)]


def throw_up(d: Director) -> list[Actor]:
    """The hand swings down, throws the object up and lets it fall onto the table."""
    spec = d.objects[0]
    x, y, drift = d.between(120, 200), d.between(180, 208), d.side * d.between(-40, -15)
    apex = min(110.0, y - d.top(spec) - 6)
    release, at = 0.32, 32.0
    speed = np.sqrt(2 * GRAVITY * (apex - at))
    swing = 2 * (at - 4) / speed  # constant acceleration from height 4 to `at`

    def pose(u: float) -> Pose:
        since = u - release
        if since < -swing:
            return Pose(x, y, 4 + 22 * (1 - minimum_jerk(u / (release - swing))))
        if since < 0:
            return Pose(x, y, 4 + (at - 4) * ((since + swing) / swing) ** 2)
        rising = speed / GRAVITY
        z = (
            apex - GRAVITY * (since - rising) ** 2 / 2
            if since < rising
            else falling_height(since - rising, apex, spec.kind.restitution)
        )
        flight = rising + np.sqrt(2 * apex / GRAVITY)
        return Pose(
            x + drift * min(since / flight, 1.0), y, z, angle=2 * drift * np.sin(np.pi * min(since / flight, 1))
        )

    def grip(u: float) -> Point:
        p = pose(min(u, release))
        return p.x + d.side * spec.width * 0.2, p.y, p.z + 0.3 * d.top(spec)

    return [d.actor(spec, pose), *d.hand(grip, d.shoulder(d.side, 170, 270), -1.0, release)]


def push_off_table(d: Director) -> list[Actor]:
    """The hand pushes the object over the table's side edge; it falls to the floor in an arc."""
    spec = d.objects[0]
    direction = 1 if d.table_side > 160 else -1
    y, edge_at = d.between(138, 156), 0.6  # share of the push at which the object's middle passes the edge
    edge_x = d.table_side + direction * 4
    start, leave = 0.1, 0.52
    duration, path = (leave - start) / edge_at, d.between(75, 105) / minimum_jerk(edge_at)
    start_x = edge_x - direction * path * minimum_jerk(edge_at)
    speed = direction * path * 30 * edge_at**2 * (1 - edge_at) ** 2 / duration
    floor = -min(d.between(64, 80), 226 - y)
    turn = direction * d.between(50, 100)
    falling_time = np.sqrt(-2 * floor / GRAVITY)

    def pose(u: float) -> Pose:
        since = u - leave
        if since < 0:
            return Pose(start_x + direction * path * minimum_jerk((u - start) / duration), y)
        z = floor + falling_height(since, -floor, spec.kind.restitution)
        slide = 0.5 * speed * 0.08 * (1 - np.exp(-max(since - falling_time, 0) / 0.08))
        turned = turn * min(since / falling_time, 1.0)
        return Pose(edge_x + speed * min(since, falling_time) + slide, y, z, turned, support=floor)

    def grip(u: float) -> Point:
        p = pose(min(u, leave - 1e-6))
        return p.x - direction * (spec.width / 2 - 2), p.y, 0.5 * d.top(spec)

    return [d.actor(spec, pose), *d.hand(grip, d.shoulder(-direction, 150, 260), start, leave)]


def put(d: Director, where: str, pretended: bool = False) -> list[Actor]:
    """The hand carries the object to its place, sets it down and withdraws (pretending: takes it back)."""
    spec = d.objects[0]
    end = _landing(d, where, spec)
    stop, carry = 0.81, d.side * d.between(110, 150)
    clearance = min(d.between(60, 90), end.y - end.z - d.top(spec) - 10)
    down_from, arrive_above = stop - 0.46, 0.54

    def pose(u: float) -> Pose:
        if pretended:
            u = stop * (1 - abs(1 - 2 * u)) * 0.9
        away = 1 - minimum_jerk((u + 0.1) / (arrive_above + 0.1))
        above = 1 - minimum_jerk((u - down_from) / (stop - down_from))
        return Pose(end.x + away * carry, end.y, end.z + above * clearance, support=end.z)

    def grip(u: float) -> Point:
        p = pose(u)
        return p.x + d.side * spec.width * 0.15, p.y, p.z + 0.85 * d.top(spec)

    hand = d.hand(grip, d.shoulder(d.side, 20, 130), -1.0, 2.0 if pretended else stop)
    return [*end.others, d.actor(spec, pose, nearer=0.5), *hand]


def cover(d: Director) -> list[Actor]:
    """The hand brings a cloth that hangs from its fingers and spreads it over the object."""
    spec, cloth = d.objects
    x, y, stop = d.between(125, 195), d.between(168, 196), 0.79
    carry, clearance = d.side * d.between(110, 150), min(d.between(60, 85), y - d.top(cloth) - 10)
    down_from = stop - 0.47

    def pose(u: float) -> Pose:
        away = 1 - minimum_jerk((u + 0.1) / 0.62)
        above = 1 - minimum_jerk((u - down_from) / (stop - down_from))
        return Pose(x + away * carry, y + 3, above * clearance, -9 * d.side * away, 1 - 0.36 * above, 1 + 0.14 * above)

    def grip(u: float) -> Point:
        p = pose(u)
        return p.x + d.side * 4, p.y, p.z + d.top(cloth) * (0.5 + 0.47 * p.stretch_y)

    hand = d.hand(grip, d.shoulder(d.side, 10, 110), -1.0, stop)
    return [d.still(spec, x, y), d.actor(cloth, pose, nearer=2.0), *hand]


def hold(d: Director) -> list[Actor]:
    """The hand holds the object almost still above the table."""
    spec = d.objects[0]
    x, y, z = d.between(120, 200), d.between(175, 205), d.between(30, 60)

    def pose(u: float) -> Pose:
        return Pose(x + 3 * np.sin(5 * u), y, z + 3 * np.sin(8 * u + 1))

    def grip(u: float) -> Point:
        p = pose(u)
        return p.x + d.side * spec.width * 0.25, p.y, p.z + 0.7 * d.top(spec)

    return [d.actor(spec, pose), *d.hand(grip, d.shoulder(d.side, 120, 240), -1.0, 2.0)]
