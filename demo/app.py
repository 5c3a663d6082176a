"""A page on which a model is played: `python -m demo.app` prints its address.

A clip or a picture of your own is the start. Predict draws the next frame, Go on draws another one from that. The page
has no method of its own: pecn/sampling.py draws, and pecn/rollouts.py makes films and filmstrips.
"""

from __future__ import annotations

import argparse
import functools
import html
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from data import clips
from data.cli import CommandParser, UserError, available_cores, number, run_command, warn
from data.dataset import TASK_TEMPLATES, match_tasks
from data.files import write_json
from data.paths import DEFAULT_DATA_DIR, filtered_annotations_path, read_annotations
from data.prompts import PROGRESS_HELP, PROGRESS_OPTION, PROMPT_PREFIX, build_prompt
from data.video_decoder import load_picture, read_picture
from data.video_loader import extract_missing
from demo.make_clips import ANNOTATION_NAMES, make_clips
from pecn.evaluation import load_for_prediction, recorded_settings
from pecn.model import PIPELINE_INDEX
from pecn.pictures import UNCERTAINTY_SCALE, color_map, describe_scores
from pecn.rollouts import Rollout, film, filmstrip, save_film
from pecn.sampling import predict_frames
from pecn.sampling_options import SCHEDULERS, add_sampling_options, sampling_options

QUICK_TEST, BASE_MODEL = Path("test_output/model"), Path("demo/base_model")
# The base model has no record of its training; it is sampled from as in the quick test.
BASE_SETTINGS = {"resolution": 96, "horizon": "1-10", "add_progress": True, "num_inference_steps": 8, "strength": 0.9}
BASE_SETTINGS |= {"scheduler": "dpmsolver++karras", "guidance_scale": 2.0, "image_guidance_scale": 1.0}
NUM_RENDERED, MOST_CLIPS, SEED = 24, 60, 42
FRAMES_AHEAD = 100  # of a clip: how far Go on can be compared with the truth
NOT_TOLD = "none"  # the progress
OWN_PICTURE = clips.Clip("picture", "unknown", "", Path(), frames=(0,))
PIXELS = ".pixels img {image-rendering: pixelated}"  # frames are enlarged, but not smoothed


def said_on_page(function: Callable) -> Callable:
    """A handler of events whose UserError is shown on the page, in one line."""

    @functools.wraps(function)
    def handler(*args: Any) -> Any:
        try:
            return function(*args)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    return handler


class Page:
    """The page of one model. Each visitor has a history of rollouts: the last one is shown, and Back drops it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        """Loads the model; films are written into `folder`."""
        self.args, self.folder, self.choice = args, folder, clips.frame_choice(vars(args))
        self.pipeline, self.precision = load_for_prediction(args.model_dir)
        self.clips = validation_clips(args, self.choice)
        with gr.Blocks(title="PECN", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as self.blocks:
            gr.Markdown("## PECN: predict a future frame")
            self.history = gr.State([])
            with gr.Row():
                with gr.Column(scale=2):
                    self.lay_out_inputs()
                with gr.Column(scale=3):
                    self.lay_out_results()

    def lay_out_inputs(self) -> None:
        """The left side: what to start from, the sentence, the options."""
        args, samples = self.args, [[str(clip.path(clip.frames[0])), clip.label] for clip in self.clips]
        columns = [gr.Image(visible=False, label="frame"), gr.Textbox(visible=False, label="sentence")]
        table = {"components": columns, "samples": samples, "samples_per_page": 5, "visible": bool(samples)}
        self.gallery = gr.Dataset(label="Click on a validation clip", type="index", **table)
        with gr.Accordion("Or a picture of your own", open=not samples):
            sources = ["upload", "clipboard", "webcam"]
            self.picture = gr.Image(label="Picture", sources=sources, type="filepath", image_mode=None, height=240)
        self.sentence = gr.Textbox(label="What is done", placeholder="pushing a cup from left to right")
        with gr.Row():
            progress, horizons = [NOT_TOLD, *range(0, 100, 10)], list(self.choice.horizons)
            self.progress = gr.Dropdown(progress, label="Done so far, %", visible=bool(args.add_progress))
            self.horizon = gr.Dropdown(horizons, label="Frames later", visible=self.choice.tell_horizon)
            self.prefix = gr.Checkbox(args.recorded, label=f"Say first: {PROMPT_PREFIX}", visible=not args.recorded)
            self.seed = gr.Number(SEED, label="Seed", precision=0, minimum=0)
            dice = gr.Button("\N{GAME DIE}", min_width=40, scale=0)
            dice.click(lambda: random.randrange(2**31), None, self.seed, api_visibility="private")
        with gr.Accordion("Options", open=False):
            self.options = {
                "num_inference_steps": gr.Slider(1, max(50, args.num_inference_steps), step=1, label="Steps"),
                "scheduler": gr.Dropdown(list(SCHEDULERS), label="Scheduler"),
                "image_guidance_scale": gr.Slider(1, max(10, args.image_guidance_scale), label="Image guidance"),
                "guidance_scale": gr.Slider(1, max(10, args.guidance_scale), label="Text guidance"),
                "num_predictions": gr.Slider(1, max(8, args.num_predictions), step=1, label="Draws"),
                "keep_background": gr.Checkbox(label="Keep background"),
            }
            for name, option in self.options.items():
                option.value = getattr(args, name)

    def lay_out_results(self) -> None:
        """The right side, and what each click does."""
        names = ("Predict", "Go on", "What if", "Back")
        with gr.Row():
            buttons = [gr.Button(name, variant="primary" if name == "Predict" else "secondary") for name in names]
        shown = {"format": "png", "interactive": False, "visible": False}
        with gr.Row():
            frames = ("input", "before", "prediction", "truth", "expected", "spread")
            self.frames = {name: gr.Image(label=name, elem_classes="pixels", min_width=200, **shown) for name in frames}
        self.prompt = gr.Textbox(label="What the model read", visible=False)
        self.scores = gr.Textbox(label="Scores against the truth; copy: of the start", visible=False)
        self.strip = gr.Image(label="All steps", **shown)
        self.film = gr.DownloadButton("Download the film (GIF)", visible=False)
        results = [self.history, *self.frames.values(), self.prompt, self.scores, self.strip, self.film]
        how = {"outputs": [*results, self.sentence, self.progress, self.picture]}
        self.gallery.click(self.choose_clip, self.gallery, **how, api_name="choose_clip")
        self.picture.input(self.choose_picture, self.picture, **how, preprocess=False, api_name="choose_picture")
        inputs = {self.history, self.sentence, self.progress, self.horizon, self.prefix, self.seed}
        inputs |= {*self.options.values()}
        queued = {"concurrency_id": "model", "concurrency_limit": 1}  # one draws at a time, the others wait
        for name, button in zip(names[:3], buttons):
            api_name = name.lower().replace(" ", "_")
            button.click(functools.partial(self.draw, name), inputs, **how, **queued, api_name=api_name)
        buttons[3].click(self.back, self.history, **how, api_name="back")

    @said_on_page
    def choose_clip(self, index: int) -> dict[Any, Any]:
        """Starts from a clip's frame, with its sentence and progress."""
        clip = self.clips[index]
        start = Rollout(clip, [], [], load_picture(clip.path(clip.frames[0])), [], [])
        words = {self.sentence: clip.label, self.progress: progress_at(start, NOT_TOLD)}
        return self.show([start]) | words | {self.picture: None}

    @said_on_page
    def choose_picture(self, picture: dict[str, Any] | None) -> dict[Any, Any]:
        """Starts from a picture of one's own, which is read as sample_from_pix2pix.py reads its --image."""
        if picture is None:  # it was taken away
            return {self.picture: None}
        try:
            start = read_picture(picture["path"], self.args.resolution)
        except UserError as error:
            raise UserError(str(error).replace(picture["path"], picture.get("orig_name") or "the picture")) from None
        return self.show([Rollout(OWN_PICTURE, [], [], start, [], [])])

    @said_on_page
    def draw(self, what: str, given: dict[Any, Any], bar: gr.Progress = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
        """Predict draws from the start, Go on from the last prediction; What if draws the last one once more."""
        history, sentence, progress, seed = (
            given[part] for part in (self.history, self.sentence, self.progress, self.seed)
        )
        if not history:
            raise UserError("there is no picture: click on a clip, or give one of your own")
        if not sentence.strip():
            raise UserError("the sentence is empty: say what is done, as in 'pushing a cup from left to right'")
        rollout = {"Predict": history[0], "Go on": history[-1], "What if": shortened(history[-1])}[what]
        clip, tell_horizon = replace(rollout.clip, label=sentence), self.choice.tell_horizon
        if what == "Go on" and progress != NOT_TOLD:
            progress = progress_at(rollout, progress)
        ahead = given[self.horizon] if tell_horizon else self.choice.horizons[0]
        later = sum(rollout.horizons[-1:]) + ahead
        told = (None if progress == NOT_TOLD else progress, ahead if tell_horizon else None)
        prompt = build_prompt(sentence, *told) if given[self.prefix] else sentence
        if clip.video_id != OWN_PICTURE.video_id or rollout.predictions:  # else the noise is that of --image
            seed = clips.derive_seed(seed, clip.video_id, "rollout", later)  # that of a chained rollout
        options = {name: given[part] for name, part in self.options.items()}
        options = replace(sampling_options(self.args), **options)
        with self.precision:
            [frame] = predict_frames(self.pipeline, [last_frame(rollout)], [prompt], [seed], options, bar.tqdm)
        if frame is None:
            raise UserError("the prediction is not finite: the model is damaged, or does not fit its precision")
        truth_idx = clip.frames[0] + later
        truth = load_picture(clip.path(truth_idx)) if truth_idx in clip.frame_set else None
        new = {"horizons": later, "edit_prompts": prompt, "truths": truth, "predictions": frame}
        longer = replace(rollout, clip=clip, **{name: [*getattr(rollout, name), one] for name, one in new.items()})
        return self.show([*history, longer]) | {self.progress: progress}

    @said_on_page
    def back(self, history: list[Rollout]) -> dict[Any, Any]:
        """Undoes the last drawing, and shows what was there before it."""
        if len(history) < 2:
            raise UserError("there is nothing to undo")
        rollout = history[-2]
        words = {self.sentence: rollout.clip.label, self.progress: progress_at(shortened(rollout), gr.skip())}
        return self.show(history[:-1]) | words

    def show(self, history: list[Rollout]) -> dict[Any, Any]:
        """The page's right side: the last rollout, beside the one before where that has as many frames."""
        rollout, before = history[-1], history[-2:][0]
        shown = dict.fromkeys([*self.frames.values(), self.prompt, self.scores, self.strip, self.film])
        shown[self.frames["input"]] = last_frame(shortened(rollout))
        if rollout.predictions:
            frame, truth = rollout.predictions[-1], rollout.truths[-1]
            frames = {"prediction": frame.sample, "expected": frame.expected, "truth": truth}
            if frame.uncertainty is not None:
                frames["spread"] = color_map(frame.uncertainty, "viridis", UNCERTAINTY_SCALE)
            if before is not rollout and len(before.predictions) == len(rollout.predictions):
                frames["before"] = before.predictions[-1].sample
            shown |= {self.frames[name]: picture for name, picture in frames.items()}
            shown |= {self.prompt: rollout.edit_prompts[-1], self.strip: filmstrip(rollout)}
            if truth is not None:
                shown[self.scores] = describe_scores(rollout.rows()[-1])
            shown[self.film] = Path(tempfile.mkdtemp(dir=self.folder), "film.gif")
            save_film(shown[self.film], film(rollout))
        updates = {part: gr.update(value=value, visible=value is not None) for part, value in shown.items()}
        updates[self.frames["before"]]["label"] = f"before: {before.clip.label}"
        return updates | {self.history: history}


def last_frame(rollout: Rollout) -> np.ndarray:
    """What the next frame is drawn from."""
    return rollout.predictions[-1].sample if rollout.predictions else rollout.start


def shortened(rollout: Rollout) -> Rollout:
    """The rollout without its last frame; one without any stays as it is."""
    lists = ("horizons", "edit_prompts", "truths", "predictions")
    return replace(rollout, **{name: getattr(rollout, name)[:-1] for name in lists})


def progress_at(rollout: Rollout, otherwise: Any) -> Any:
    """The progress at the rollout's last frame, as rollouts tell it: that of the last true frame once a clip ended."""
    frame, last = rollout.clip.frames[0] + sum(rollout.horizons[-1:]), rollout.clip.frames[-1]
    return (rollout.clip.progress or {}).get(min(frame, last), otherwise)


def validation_clips(args: argparse.Namespace, choice: clips.FrameChoice) -> list[clips.Clip]:
    """Clips of the data directory, drawn at random; where there are none it says so."""
    start = clips.DEFAULT_INPUT_FRAME_IDX if choice.start is None else choice.start
    choice = replace(choice, start=start, horizons=range(1, FRAMES_AHEAD + 1))
    try:
        found, _ = clips.find_clips(args.data_dir, "val", args.resolution, choice, args.add_progress, False)
    except UserError as error:
        warn(f"the page has no clips to click on: {error}")
        return []
    return clips.choose_balanced(found, SEED, MOST_CLIPS)


def render_clips(data_dir: Path, resolution: int) -> None:
    """Makes a data directory of rendered validation clips."""
    make_clips(data_dir, 0, NUM_RENDERED, SEED, available_cores())
    entries = match_tasks(read_annotations(data_dir / "annotations" / ANNOTATION_NAMES["val"]), list(TASK_TEMPLATES))
    for split, chosen in (("train", []), ("val", entries)):
        write_json(filtered_annotations_path(data_dir, split), chosen)
    extract_missing(data_dir, entries, [resolution], available_cores())


def parse_args() -> argparse.Namespace:
    """The options, by default those that the model was trained with; `recorded` says whether they are known."""
    parser = CommandParser(prog="python -m demo.app", description="A page on which a model is played.")
    add = parser.add_argument
    model = QUICK_TEST if (QUICK_TEST / PIPELINE_INDEX).is_file() else BASE_MODEL
    add("--model_dir", default=str(model), help="a trained model's directory, or a model on the hub (%(default)s)")
    add("--data_dir", type=Path, help="prepared data directory (the model's; for the base model clips are rendered)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is open to everyone (%(default)s)")
    add("--port", type=number(at_least=1, at_most=65535), help="(the first free one from 7860 on)")
    add("--share", action="store_true", help="make a public link, as gradio does")
    add("--resolution", type=number(at_least=8, at_most=4096, multiple_of=8), default=128, help="(%(default)s)")
    clips.add_frame_options(parser)
    add("--add_progress", **PROGRESS_OPTION, default=False, help=PROGRESS_HELP)
    add_sampling_options(parser)
    parser.set_defaults(image=None)
    args = parser.parse_args()
    recorded = BASE_SETTINGS if Path(args.model_dir) == BASE_MODEL else recorded_settings(args)
    parser.set_defaults(**recorded, recorded=bool(recorded))
    args = parser.parse_args()
    clips.settle_frames(vars(args))
    return args


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir is None and Path(args.model_dir) == BASE_MODEL:
            args.data_dir = Path(folder, "clips")
            render_clips(args.data_dir, args.resolution)
        args.data_dir = args.data_dir or DEFAULT_DATA_DIR
        where = {"server_name": args.host, "server_port": args.port, "share": args.share}
        Page(args, Path(folder)).blocks.launch(**where, css=PIXELS, run_history=False, footer_links=["api", "gradio"])


if __name__ == "__main__":
    run_command(main)
