"""Finds damaged frames before anything heavy is loaded, or hours of work rest on them."""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.layout import UserError

MOST_FOLDERS = 5  # to name in one message


def check_frames(pairs: Sequence[dict[str, Any]], resolution: int) -> None:
    """Raises UserError where a frame is not a whole PNG of `resolution` x `resolution` pixels, naming the first one.

    A pair may lack a frame (None).
    Every byte of a PNG but its signature is under a checksum, so that nothing has to be decoded (W3C's PNG
    specification, third edition, section 5).
    """
    bad = {}
    for pair in pairs:
        for column in ("input_image", "edited_image"):
            if pair[column] is None:
                continue
            path = Path(pair[column])
            problem = find_png_damage(path, resolution)
            if problem and path.parent not in bad:
                bad[path.parent] = f"{path} {problem}"
    if bad:
        folders = [shlex.quote(str(folder)) for folder in bad]
        data_dir = shlex.quote(str(next(iter(bad)).parents[1]))
        more = f" (and frames of {len(bad) - 1} more videos)" if len(bad) > 1 else ""
        shown = " ".join(folders[:MOST_FOLDERS]) + (" ..." if len(folders) > MOST_FOLDERS else "")
        raise UserError(
            f"{next(iter(bad.values()))}{more}; delete and extract again:"
            f" rm -r {shown} && python -m data.video_loader --data_dir {data_dir} --resolutions {resolution}"
        )


def find_png_damage(path: Path, side: int) -> str | None:
    """What is wrong with a frame, as the end of a sentence that begins with its path; None where it is whole."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "is not a PNG file" if content else "is empty"
    position, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        end = position + 8 + length
        if len(content) < end + 4:
            return "is cut off"
        if zlib.crc32(memoryview(content)[position + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return "is damaged (a checksum differs)"
        if kind == b"IHDR":
            width, height = (int.from_bytes(content[position + at : position + at + 4], "big") for at in (8, 12))
            if (width, height) != (side, side):
                return f"is {width}x{height} pixels, not {side}x{side}"
        position = end + 4
    return None
