"""The sentences of the rendered clips: each task's templates, their objects and their choreography."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from demo.renderer.actions import (
    Director,
    change_distance,
    cover,
    drop,
    float_down,
    hold,
    lift_and_drop,
    push_off_table,
    put,
    raise_or_lower,
    slide,
    throw_up,
)
from demo.renderer.scene import Actor

SMALL = ("block", "ball", "apple", "lemon", "tomato", "eraser", "matchbox")
UPRIGHT = ("cup", "can", "candle", "jar", "bottle")
CARRIED = SMALL + UPRIGHT + ("sponge", "phone", "book", "box")
SUPPORTS = ("box", "book")
CONTAINERS = ("bowl", "pot", "basket")
LIGHT_THINGS = ("paper", "leaf", "feather", "napkin")
DRAPES = ("cloth", "towel", "scarf")


@dataclass(frozen=True)
class Action:
    """A template, the kinds of object that may fill each of its places, and its choreography."""

    template: str
    kinds: tuple[tuple[str, ...], ...]
    choreograph: Callable[[Director], list[Actor]]
    needs_table_side: bool = False


SLIDING = SMALL + ("cup", "can", "jar", "sponge", "phone", "book", "box", "bowl", "candle")
ACTIONS: dict[str, tuple[Action, ...]] = {
    "move_object": (
        Action("Pushing [something] from left to right", (SLIDING,), lambda d: slide(d, 1, True)),
        Action("Pulling [something] from right to left", (SLIDING,), lambda d: slide(d, -1, False)),
        Action("Moving [something] up", (CARRIED,), lambda d: raise_or_lower(d, True)),
        Action("Pushing [something] from right to left", (SLIDING,), lambda d: slide(d, -1, True)),
        Action("Pulling [something] from left to right", (SLIDING,), lambda d: slide(d, 1, False)),
        Action("Moving [something] down", (CARRIED,), lambda d: raise_or_lower(d, False)),
        Action("Moving [something] closer to [something]", (SLIDING, SLIDING), lambda d: change_distance(d, True)),
        Action("Moving [something] away from [something]", (SLIDING, SLIDING), lambda d: change_distance(d, False)),
    ),
    "drop_object": (
        Action("Dropping [something] onto [something]", (SMALL, SUPPORTS), lambda d: drop(d, "onto")),
        Action("[Something] falling like a rock", (CARRIED,), lambda d: drop(d, "surface")),
        Action("Lifting [something] up completely, then letting it drop down", (CARRIED,), lift_and_drop),
        Action("Dropping [something] into [something]", (SMALL, CONTAINERS), lambda d: drop(d, "into")),
        Action(
            "Pushing [something] so that it falls off the table",
            (SMALL + ("can", "cup", "sponge"),),
            push_off_table,
            needs_table_side=True,
        ),
        Action("[Something] falling like a feather or paper", (LIGHT_THINGS,), float_down),
        Action("Dropping [something] next to [something]", (CARRIED, SLIDING), lambda d: drop(d, "next to")),
        Action("Dropping [something] in front of [something]", (SMALL, SLIDING), lambda d: drop(d, "in front of")),
        Action("Throwing [something] in the air and letting it fall", (SMALL,), throw_up),
        Action(
            "Dropping [something] behind [something]",
            (SMALL + ("can", "cup"), UPRIGHT + ("box", "bowl")),
            lambda d: drop(d, "behind"),
        ),
    ),
    "cover_object": (
        Action("Covering [something] with [something]", (SMALL + ("cup", "phone", "candle"), DRAPES), cover),
        Action("Putting [something] onto [something]", (SMALL + ("cup", "can"), SUPPORTS), lambda d: put(d, "onto")),
        Action("Putting [something] next to [something]", (CARRIED, SLIDING), lambda d: put(d, "next to")),
        Action("Putting [something] into [something]", (SMALL, CONTAINERS), lambda d: put(d, "into")),
        Action("Putting [something] on a surface", (CARRIED,), lambda d: put(d, "surface")),
        Action("Covering [something] with [something]", (SMALL + ("jar", "sponge", "matchbox"), DRAPES), cover),
        Action("Putting [something] in front of [something]", (SMALL, SLIDING), lambda d: put(d, "in front of")),
        Action(
            "Putting [something] behind [something]",
            (SMALL + ("can", "cup"), UPRIGHT + ("box", "bowl")),
            lambda d: put(d, "behind"),
        ),
    ),
    "other": (  # templates of no task, so that the filter has something to leave out
        Action("Holding [something]", (CARRIED,), hold),
        Action("Pretending to put [something] on a surface", (CARRIED,), lambda d: put(d, "surface", True)),
    ),
}
