"""A page on which a model is played: `python -m demo.app` prints its address.

It only shows: pecn/sampling.py draws, pecn/rollouts.py makes films and filmstrips.
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
from data.cli import CommandParser, UserError, number, run_command, warn
from data.paths import DEFAULT_DATA_DIR
from data.prompts import PROGRESS_HELP, PROGRESS_OPTION, PROMPT_PREFIX, build_prompt
from data.video_decoder import load_picture, read_picture
from demo import BASE_MODEL, BASE_SETTINGS
from demo.make_clips import make_validation_clips
from pecn.evaluation import load_for_prediction, recorded_settings
from pecn.model import PIPELINE_INDEX
from pecn.pictures import UNCERTAINTY_SCALE, color_map, describe_scores
from pecn.rollouts import Rollout, film, filmstrip, rollout_choice, save_film
from pecn.sampling import predict_frames
from pecn.sampling_options import SCHEDULERS, add_sampling_options, sampling_options

NUM_RENDERED, MOST_CLIPS, FRAMES_AHEAD, SEED, NOT_TOLD = 24, 60, 100, 42, "none"
OWN_PICTURE = clips.Clip("picture", "unknown", "", Path(), frames=(0,))
# Frames are enlarged without smoothing, below their titles.
CSS = ".frame img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain; padding-top: 28px}"


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
        self.args, self.folder, self.choice = args, folder, clips.frame_choice(vars(args))
        self.pipeline, self.precision = load_for_prediction(args.model_dir)
        self.clips = validation_clips(args, self.choice)
        how = {"title": "PECN", "fill_width": True, "analytics_enabled": False, "delete_cache": (3600, 24 * 3600)}
        with gr.Blocks(**how) as self.blocks, gr.Row():
            self.history = gr.State([])
            with gr.Column(scale=2):
                self.lay_out_inputs()
            with gr.Column(scale=3):
                self.lay_out_results()

    def launch(self, **how: Any) -> None:
        """Listens where the options say, whatever gradio's environment variables do; `how` is as gradio takes it."""
        how |= {"server_name": self.args.host, "server_port": self.args.port, "share": self.args.share}
        self.blocks.launch(css=CSS, run_history=False, footer_links=["api", "gradio"], **how)

    def lay_out_inputs(self) -> None:
        """The left side: what to start from, the sentence, the options."""
        args, samples = self.args, [[str(clip.path(clip.frames[0])), clip.label] for clip in self.clips]
        table = {"components": ["image", "textbox"], "headers": ["frame", "sentence"], "visible": bool(samples)}
        self.gallery = gr.Dataset(samples=samples, type="index", label="Click on a clip", samples_per_page=5, **table)
        with gr.Accordion("Or a picture of your own", open=not samples):
            self.picture = gr.Image(label="Picture", height=240)
        self.sentence = gr.Textbox(label="What is done", placeholder="pushing a cup from left to right")
        with gr.Row():
            progress, horizons = [NOT_TOLD, *range(0, 100, 10)], list(self.choice.horizons)
            self.progress = gr.Dropdown(progress, label="Done so far, %", visible=bool(args.add_progress))
            self.horizon = gr.Dropdown(horizons, label="Frames later", visible=self.choice.tell_horizon)
            self.seed = gr.Number(SEED, label="Seed", precision=0, minimum=0)
        self.prefix = gr.Checkbox(args.recorded, label=f"Say first: {PROMPT_PREFIX}", visible=not args.recorded)
        gr.Button("Dice: another seed", size="sm").click(lambda: random.randrange(2**31), None, self.seed)
        with gr.Accordion("Options", open=False):
            names = ("Steps", "Image guidance", "Text guidance", "Draws")
            fields = ("num_inference_steps", "image_guidance_scale", "guidance_scale", "num_predictions")
            self.options = {
                field: gr.Slider(1, max(most, getattr(args, field)), getattr(args, field), step=step, label=name)
                for name, field, most, step in zip(names, fields, (50, 10, 10, 8), (1, 0.1, 0.1, 1))
            }
            self.options["scheduler"] = gr.Dropdown(list(SCHEDULERS), value=args.scheduler, label="Scheduler")
            self.options["keep_background"] = gr.Checkbox(args.keep_background, label="Keep background")

    def lay_out_results(self) -> None:
        """The right side, and what each click does."""
        with gr.Row():
            *drawing, back = map(gr.Button, ("Predict", "Go on", "What if", "Back"))
        png = {"format": "png", "interactive": False, "buttons": ["download"]}
        with gr.Row():
            names = ("input", "before", "prediction", "truth", "expected", "spread")
            how = {"height": 280, "min_width": 160, "elem_classes": "frame", **png}
            self.frames = {name: gr.Image(label=name, visible=name == "prediction", **how) for name in names}
        self.prompt = gr.Textbox(label="What the model read", visible=False)
        self.scores = gr.Textbox(label="Scores against the truth; copy: of the start", visible=False)
        self.strip = gr.Image(show_label=False, visible=False, **png)
        self.film = gr.DownloadButton("Download the film (GIF)", visible=False)
        results = {self.history, *self.frames.values(), self.prompt, self.scores, self.strip, self.film}
        results |= {self.sentence, self.progress, self.picture}
        how = {"outputs": results, "show_progress_on": self.frames["prediction"]}
        self.gallery.click(self.choose_clip, self.gallery, **how, api_name="choose_clip")
        self.picture.input(self.choose_picture, self.picture, **how, preprocess=False, api_name="choose_picture")
        back.click(self.back, self.history, **how, api_name="back")
        inputs = {self.history, self.sentence, self.progress, self.horizon, self.prefix, self.seed}
        how |= {"inputs": inputs | {*self.options.values()}, "concurrency_id": "model"}  # one draws, the others wait
        for button in drawing:
            name = button.value
            button.click(functools.partial(self.draw, name), **how, api_name=name.lower().replace(" ", "_"))

    @said_on_page
    def choose_clip(self, index: int) -> dict[Any, Any]:
        """Starts from a clip's frame, with its sentence and progress."""
        clip = self.clips[index]
        start = Rollout(clip, load_picture(clip.path(clip.frames[0])))
        told = {self.sentence: clip.label, self.progress: progress_at(start, NOT_TOLD), self.picture: None}
        return self.show([start]) | told

    @said_on_page
    def choose_picture(self, picture: dict[str, Any] | None) -> dict[Any, Any]:
        """Starts from a picture of one's own, which is read as sample_from_pix2pix.py reads its --image."""
        if picture is None:  # it was taken away
            return {self.picture: None}
        try:
            start = read_picture(picture["path"], self.args.resolution)
        except UserError as error:
            raise UserError(str(error).replace(picture["path"], picture.get("orig_name") or "the picture")) from None
        return self.show([Rollout(OWN_PICTURE, start)])

    @said_on_page
    def draw(self, what: str, given: dict[Any, Any], bar: gr.Progress = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
        """Predict draws from the start, Go on from the last prediction; What if draws the last one once more."""
        history, sentence, progress = map(given.get, (self.history, self.sentence, self.progress))
        if not history:
            raise UserError("there is no picture: click on a clip, or give one of your own")
        if not sentence.strip():
            raise UserError("the sentence is empty: say what is done, as in 'pushing a cup from left to right'")
        rollout = {"Predict": history[0], "Go on": history[-1], "What if": shortened(history[-1])}[what]
        clip, later = replace(rollout.clip, label=sentence), max(rollout.predictions, default=0) + given[self.horizon]
        if progress != NOT_TOLD and len(rollout.predictions) != len(shortened(history[-1]).predictions):
            progress = progress_at(rollout, progress)  # of another frame than shown
        told = (None if progress == NOT_TOLD else progress, given[self.horizon] if self.choice.tell_horizon else None)
        prompt = build_prompt(sentence, *told) if given[self.prefix] else sentence
        seed = given[self.seed] or 0
        if clip.video_id != OWN_PICTURE.video_id or rollout.predictions:  # else the noise is that of --image
            seed = clips.derive_seed(seed, clip.video_id, "rollout", later)  # that of a chained rollout
        options = replace(sampling_options(self.args), **{name: given[part] for name, part in self.options.items()})
        with self.precision:
            [frame] = predict_frames(self.pipeline, [last_frame(rollout)], [prompt], [seed], options, bar.tqdm)
        if frame is None:
            raise UserError("the prediction is not finite: the model is damaged, or does not fit its precision")
        longer = replace(rollout, clip=clip, predictions={**rollout.predictions})
        longer.add(later, prompt, frame)
        return self.show([*history, longer]) | {self.progress: progress}

    @said_on_page
    def back(self, history: list[Rollout]) -> dict[Any, Any]:
        """Undoes the last drawing, and shows what was there before it."""
        if len(history) < 2:
            raise UserError("there is nothing to undo")
        label, progress = history[-2].clip.label or gr.skip(), progress_at(shortened(history[-2]), gr.skip())
        return self.show(history[:-1]) | {self.sentence: label, self.progress: progress}

    def show(self, history: list[Rollout]) -> dict[Any, Any]:
        """The page's right side: the last rollout, beside the one before where that has as many frames."""
        rollout, before = history[-1], history[-2:][0]
        frames = dict.fromkeys(self.frames) | {"input": last_frame(shortened(rollout))}
        prompt = scores = strip = gif = None
        if rollout.predictions:
            *_, last = rollout.predictions.values()
            frame, truth, prompt = last.predicted, last.target, last.edit_prompt
            frames |= {"prediction": frame.sample, "expected": frame.expected, "truth": truth}
            if frame.uncertainty is not None:
                frames["spread"] = color_map(frame.uncertainty, "viridis", UNCERTAINTY_SCALE)
            if before is not rollout and len(before.predictions) == len(rollout.predictions):
                frames["before"] = last_frame(before)
            scores = None if truth is None else describe_scores(rollout.rows()[-1])
            strip, gif = filmstrip(rollout), Path(tempfile.mkdtemp(dir=self.folder), "film.gif")
            save_film(gif, film(rollout))
        parts = {self.frames[name]: frame for name, frame in frames.items()}
        parts |= {self.prompt: prompt, self.scores: scores, self.strip: strip, self.film: gif}
        shown = {part: gr.update(value=value, visible=value is not None) for part, value in parts.items()}
        shown[self.frames["prediction"]]["visible"] = True
        shown[self.frames["before"]]["label"] = f"before: {before.clip.label}"
        return shown | {self.history: history}


def last_frame(rollout: Rollout) -> np.ndarray:
    """What the next frame is drawn from."""
    *_, last = (rollout.start, *(one.predicted.sample for one in rollout.predictions.values()))
    return last


def shortened(rollout: Rollout) -> Rollout:
    """The rollout without its last frame; one without any stays as it is."""
    return replace(rollout, predictions=dict([*rollout.predictions.items()][:-1]))


def progress_at(rollout: Rollout, otherwise: Any) -> Any:
    """The progress at the rollout's last frame, as rollouts tell it: that of the last true frame once a clip ended."""
    frame, last = rollout.clip.frames[0] + max(rollout.predictions, default=0), rollout.clip.frames[-1]
    return (rollout.clip.progress or {}).get(min(frame, last), otherwise)


def validation_clips(args: argparse.Namespace, choice: clips.FrameChoice) -> list[clips.Clip]:
    """Clips of the data directory, drawn at random; where there are none it says so."""
    ahead = rollout_choice(choice, FRAMES_AHEAD, "direct" if choice.tell_horizon else "chained")
    try:
        found, _ = clips.find_clips(args.data_dir, "val", args.resolution, ahead, args.add_progress, False)
    except UserError as error:
        warn(f"the page has no clips to click on: {error}")
        return []
    return clips.choose_balanced(found, SEED, MOST_CLIPS)


def parse_args() -> argparse.Namespace:
    """The options, by default those that the model was trained with; `recorded` says whether they are known."""
    parser = CommandParser(prog="python -m demo.app", description="A page on which a model is played.")
    add = parser.add_argument
    model = "test_output/model" if Path("test_output/model", PIPELINE_INDEX).is_file() else str(BASE_MODEL)
    add("--model_dir", default=model, help="a trained model's directory, or a model on the hub (%(default)s)")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="prepared data directory (the model's; %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is open to everyone (%(default)s)")
    add("--port", type=number(at_least=1, at_most=65535), help="(the first free one from 7860 on)")
    add("--share", action="store_true", help="make a public link, as gradio does")
    add("--resolution", type=number(at_least=8, at_most=4096, multiple_of=8), default=128, help="(%(default)s)")
    clips.add_frame_options(parser)
    add("--add_progress", **PROGRESS_OPTION, default=False, help=PROGRESS_HELP)
    add_sampling_options(parser)
    args = parser.parse_args(namespace=argparse.Namespace(image=None))
    recorded = BASE_SETTINGS if Path(args.model_dir) == BASE_MODEL else recorded_settings(args)
    parser.set_defaults(**recorded, recorded=bool(recorded))
    args = parser.parse_args()
    clips.settle_frames(vars(args))
    return args


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir is None:
            args.data_dir = make_validation_clips(Path(folder, "clips"), NUM_RENDERED, SEED, args.resolution)
        Page(args, Path(folder)).launch()


if __name__ == "__main__":
    run_command(main)
