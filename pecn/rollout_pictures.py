"""Films, filmstrips and plots of rollouts, and the folder that they leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from data.cli import UserError
from data.files import parts_replaced_together
from data.paths import find_video
from data.video_decoder import frame_rate
from pecn.pictures import SAMPLES, save_picture, titled
from pecn.rollouts import Rollout, score_rollout, summarize_by_horizon
from pecn.scores import SHARP_ENOUGH, TOO_SHARP

ROLLOUT_FILE = "rollout.json"
SIDE = 192  # pixels; smaller frames are enlarged by a whole factor until they reach it
LINES = {
    "sample": ("prediction", "tab:red"),
    "expected": ("expected frame", "tab:blue"),
    "copy": ("copy of the start frame", "black"),
}
PLOTS = {"psnr": "PSNR, dB", "ssim": "SSIM", "sharpness": "sharpness (gradients over the target's)"}


def enlarged(frame: np.ndarray) -> np.ndarray:
    """A uint8 RGB frame (H, W, 3), each pixel a square of them, with at least SIDE pixels a side."""
    factor = max(1, -(-SIDE // min(frame.shape[:2])))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def shown_frames(rollout: Rollout) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(horizon, true frame, prediction) from the start on, enlarged; once a video has ended its last frame is shown."""
    shown, last = [], None
    for horizon, truth, prediction in zip((0, *rollout.horizons), rollout.truths, rollout.predictions):
        title = f"+{horizon}" if horizon else "start"
        last = last if truth is None else enlarged(truth)
        shown.append((f"{title}, ended" if truth is None else title, last, enlarged(prediction)))
    return shown


def filmstrip(rollout: Rollout) -> np.ndarray:
    """A row of true frames above a row of predictions, the start first, with horizons and sentence; uint8 RGB."""
    columns = [titled(np.concatenate([truth, prediction]), title) for title, truth, prediction in shown_frames(rollout)]
    return titled(np.concatenate(columns, axis=1), f"{rollout.clip.label}: truth above, prediction below")


def film(rollout: Rollout) -> list[np.ndarray]:
    """True frame to the left and prediction to the right, for the start frame and each horizon; uint8 RGB."""
    return [
        np.concatenate([titled(truth, f"truth {title}"), titled(prediction, "prediction")], axis=1)
        for title, truth, prediction in shown_frames(rollout)
    ]


def save_mp4(path: Path, pictures: Sequence[np.ndarray], rate: Fraction) -> None:
    """Writes uint8 RGB pictures (H, W, 3) of even sides, `rate` a second, as H.264, or MPEG-4 where that is missing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"  # the only format that all players know
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def save_gif(path: Path, pictures: Sequence[np.ndarray], rate: Fraction) -> None:
    """Writes uint8 RGB pictures (H, W, 3), about `rate` a second: GIF counts time in hundredths of a second."""
    # Each frame's own 256 colors; Pillow's usual way to choose them loses those of small objects.
    first, *others = (Image.fromarray(picture).quantize(method=Image.Quantize.FASTOCTREE) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=10 * max(1, round(100 / rate)), loop=0)


# All videos.


def save_rollouts(rollouts: Iterable[Rollout], output_dir: Path, note: str) -> list[dict[str, Any]]:
    """Writes samples/<video id>/, quality_by_horizon.png and rollout.json; returns `summarize_by_horizon`'s summary.

    A sample's folder holds rollout.mp4 and rollout.gif, the true frames to the left of the predictions at the video's
    frame rate, and filmstrip.png. The rollouts may be a generator: none is kept. A run that is interrupted, or that the
    disk stops (UserError), leaves former results whole.
    """
    rows: list[dict[str, Any]] = []
    try:
        with parts_replaced_together(output_dir, last=ROLLOUT_FILE) as new:
            for rollout in rollouts:
                rows += score_rollout(rollout)
                save_rollout(new / SAMPLES / rollout.clip.video_id, rollout)
            summary = summarize_by_horizon(rows)
            save_quality_plot(new / "quality_by_horizon.png", summary, note)
            text = json.dumps({"summary": summary, "samples": rows}, indent=1, ensure_ascii=False, allow_nan=False)
            (new / ROLLOUT_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the results to {output_dir}: {error.strerror or error}") from error
    return summary


def save_rollout(folder: Path, rollout: Rollout) -> None:
    """Writes one video's pictures, as `save_rollouts` says."""
    folder.mkdir(parents=True)
    data_dir = rollout.clip.folder.parents[1]
    rate = frame_rate(find_video(data_dir, rollout.clip.video_id)) / rollout.step
    pictures = film(rollout)
    save_mp4(folder / "rollout.mp4", pictures, rate)
    save_gif(folder / "rollout.gif", pictures, rate)
    save_picture(folder / "filmstrip.png", filmstrip(rollout))


def save_quality_plot(path: Path, summary: Sequence[dict[str, Any]], note: str) -> None:
    """Plots PSNR, SSIM and sharpness where something moves against the horizon, of the prediction and of copying."""
    summary = [group for group in summary if group["moving"]["num_samples"]]
    figure = Figure(figsize=(18, 6), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, 3), PLOTS.items()):
        for way, (title, color) in LINES.items():
            figures = [group["moving"][metric][way] for group in summary if way in group["moving"][metric]]
            if figures:
                _plot_line(axes, [group["horizon"] for group in summary], figures, title, color)
        if metric == "sharpness":
            axes.axhspan(SHARP_ENOUGH, TOO_SHARP, color="0.92", zorder=0, label="as sharp as a frame")
        axes.set_title(name)
        axes.set_xlabel("horizon (frames after the start)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.suptitle(f"Where something moves, with 95% intervals: {note}", parse_math=False)
    figure.savefig(path)


def _plot_line(axes: Axes, horizons: Sequence[int], figures: Sequence[dict], title: str, color: str) -> None:
    """The means at the horizons, and a band for their intervals; a single video has none."""
    axes.plot(horizons, [of_horizon["mean"] for of_horizon in figures], "o-", color=color, label=title)
    intervals = [of_horizon["interval"] or (of_horizon["mean"],) * 2 for of_horizon in figures]
    axes.fill_between(horizons, *zip(*intervals), color=color, alpha=0.15, linewidth=0)
