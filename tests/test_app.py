"""The page: what a visitor draws, two visitors at once, who can reach it, and the pages of other models."""

import shutil
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from data.files import write_json
from data.prompts import PROMPT_PREFIX, build_prompt
from data.video_decoder import load_picture, read_picture
from demo import app
from demo.make_clips import make_validation_clips
from pecn.rollouts import roll_out, rollout_choice
from pecn.sampling import predict_frames
from pecn.sampling_options import sampling_options
from tests.commands import call, error_line
from tests.conftest import SIDE, make_tiny_pipeline
from tests.test_hub import repository  # noqa: F401

LABEL = "pushing a cup from left to right"
SHOWN = ("picture", "sentence", "progress", "input", "before", "prediction", "truth", "expected", "spread")
SHOWN += ("prompt", "scores", "strip", "film")


@contextmanager
def page_of(folder: Path, *words: object) -> Iterator[tuple[app.Page, int]]:
    """The page of a command, and the port on which it listens until the block ends."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        patch.setattr(sys, "argv", ["app", "--port", str(port), *map(str, words)])
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_SHARE", "True")
        page = app.Page(app.parse_args(), folder)
        page.launch(prevent_thread_lock=True, quiet=True)
    try:
        yield page, port
    finally:
        page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def started(tiny_model, data_dir, tmp_path_factory) -> Iterator[tuple[app.Page, int]]:
    """The page of a model of three horizons that was trained with progress prompts."""
    folder = tmp_path_factory.mktemp("page")
    arguments = {"resolution": SIDE, "add_progress": True, "scheduler": "euler", "train_data_dir": str(data_dir)}
    arguments |= {"input_frame_idx": "any", "horizon": "1-3", "tell_horizon": True, "num_inference_steps": 1}
    model = shutil.copytree(tiny_model, folder / "model")
    write_json(model / "training_config.json", {"arguments": arguments})
    with page_of(folder, "--model_dir", model) as page_and_port:
        yield page_and_port


class Visitor:
    """A browser window."""

    def __init__(self, port: int) -> None:
        self.client = Client(f"http://127.0.0.1:{port}", verbose=False)

    def do(self, name: str, *words: object) -> dict:
        """Clicks, and returns what the page shows then, by name; pictures as arrays."""
        parts = self.client.predict(*words, api_name=f"/{name}")
        shown = {}
        for part, value in zip(SHOWN, parts, strict=True):
            value = value.get("value") if isinstance(value, dict) else value
            is_picture = isinstance(value, str) and value.endswith(".png")
            shown[part] = np.asarray(Image.open(value)) if is_picture else value
        return shown


def refusal(visitor: Visitor, name: str, *words: object) -> str:
    """The one line that the page says."""
    with pytest.raises(AppError) as refused:
        visitor.do(name, *words)
    [line] = str(refused.value).splitlines()
    return line


def test_a_clip_is_predicted_goes_on_and_back_as_rollouts_do(started):
    page, port = started
    visitor, clip = Visitor(port), page.clips[0]
    shown = visitor.do("choose_clip", 0)
    assert shown["sentence"] == clip.label and shown["progress"] == 50  # frame 20 of 40
    assert np.array_equal(shown["input"], load_picture(clip.path(20))) and shown["prediction"] is None

    choice = rollout_choice(page.choice, 2, "chained")
    with page.precision:
        [rollout] = roll_out(page.pipeline, [clip], choice, "chained", 42, 1, sampling_options(page.args))
    first, second = (one.predicted.sample for one in rollout.predictions.values())
    prompts = [one.edit_prompt for one in rollout.predictions.values()]
    one = visitor.do("predict", clip.label, 50)
    assert np.array_equal(one["prediction"], first) and one["prompt"] == prompts[0]
    assert np.array_equal(one["truth"], load_picture(clip.path(21))) and "dB" in one["scores"]
    two = visitor.do("go_on", clip.label, 50)
    assert np.array_equal(two["input"], first) and np.array_equal(two["prediction"], second)
    assert two["prompt"] == prompts[1]
    assert two["strip"].shape[1] == one["strip"].shape[1] * 3 // 2 - 4 and two["before"] is None
    with Image.open(two["film"]) as film:
        assert film.format == "GIF" and film.n_frames == 3

    other = visitor.do("what_if", "dropping a ball", 60)
    assert np.array_equal(other["before"], second) and np.array_equal(other["input"], first)
    assert other["prompt"] == build_prompt("dropping a ball", 60, 1)
    assert not np.array_equal(other["prediction"], second)
    assert np.array_equal(visitor.do("back")["prediction"], second)
    back = visitor.do("back")
    assert np.array_equal(back["prediction"], first) and back["sentence"] == clip.label
    assert np.array_equal(visitor.do("go_on", clip.label, 80)["prediction"], second)  # the clip's progress, not 80%
    again = visitor.do("predict", clip.label, 80)  # neither here, where the frame is another one
    assert again["progress"] == 50 and np.array_equal(again["prediction"], first)
    assert visitor.do("predict", clip.label, 80)["progress"] == 80
    for _ in range(3):
        back = visitor.do("back")
    assert np.array_equal(back["prediction"], first) and visitor.do("back")["prediction"] is None
    assert "nothing to undo" in refusal(visitor, "back")


def test_two_visitors_at_once_do_not_mix(started):
    page, port = started
    visitors = [Visitor(port), Visitor(port)]

    def play(number: int) -> list[np.ndarray]:
        visitor, clip = visitors[number], page.clips[number]
        starts = [visitor.do("choose_clip", number)]
        return [*starts, visitor.do("predict", clip.label, 50), visitor.do("go_on", clip.label, 50)]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(play, (0, 1)))
    for number, clip in enumerate(page.clips[:2]):
        choice = rollout_choice(page.choice, 2, "chained")
        with page.precision:
            [rollout] = roll_out(page.pipeline, [clip], choice, "chained", 42, 1, sampling_options(page.args))
        start, *frames = together[number]
        assert np.array_equal(start["input"], rollout.start)
        for shown, frame in zip(frames, rollout.predictions.values(), strict=True):
            assert np.array_equal(shown["prediction"], frame.predicted.sample)


def test_a_picture_of_ones_own_is_read_and_drawn_as_the_command_does(started, tmp_path):
    page, port = started
    visitor, photo = Visitor(port), tmp_path / "photo.jpg"
    picture = np.linspace(0, 255, 60 * 40 * 3).reshape(60, 40, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # it is stored turned to the left
    Image.fromarray(picture).save(photo, exif=exif)
    start = read_picture(photo, SIDE)
    assert np.array_equal(visitor.do("choose_picture", handle_file(photo))["input"], start)
    shown = visitor.do("predict", LABEL, "none", 3, 7, True, 1, 1.5, 1.0, 2)  # progress, horizon, seed, …, draws
    assert shown["prompt"] == build_prompt(LABEL, None, 3) and shown["truth"] is None and shown["scores"] is None
    options = replace(sampling_options(page.args), num_predictions=2)
    with page.precision:
        [frame] = predict_frames(page.pipeline, [start], [shown["prompt"]], [7], options)
    assert np.array_equal(shown["prediction"], frame.sample) and np.array_equal(shown["expected"], frame.expected)
    assert shown["spread"].shape == (SIDE, SIDE, 3)


def test_what_goes_wrong_is_said_in_one_line(started, tmp_path):
    visitor, text = Visitor(started[1]), tmp_path / "text.png"
    assert "there is no picture" in refusal(visitor, "predict", LABEL)
    text.write_text("file,caption\n")
    line = refusal(visitor, "choose_picture", handle_file(text))
    assert line.startswith("text.png cannot be read as a picture") and "gradio" not in line
    visitor.do("choose_clip", 0)
    assert "the sentence is empty" in refusal(visitor, "predict", " ")


def test_it_listens_to_this_machine_alone(started):
    """Whatever gradio's environment variables say; --host opens it."""
    page, port = started
    assert page.blocks.local_url.startswith("http://127.0.0.1:") and page.blocks.share_url is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert page.args.host == "127.0.0.1" and not page.args.share


def test_a_model_of_the_hub_has_neither_progress_nor_horizon_but_a_switch(repository, tmp_path, capfd):  # noqa: F811
    options = ("--data_dir", tmp_path, "--resolution", SIDE, "--num_inference_steps", 1)
    with page_of(tmp_path, "--model_dir", repository, *options) as (page, port):
        assert "the page has no clips to click on" in capfd.readouterr().err
        assert not page.progress.visible and not page.horizon.visible and page.prefix.visible
        visitor = Visitor(port)
        Image.new("L", (50, 40), 99).save(tmp_path / "gray.png")
        visitor.do("choose_picture", handle_file(tmp_path / "gray.png"))
        assert visitor.do("predict", "make it red")["prompt"] == "make it red"
        shown = visitor.do("predict", "make it red", "none", 1, 42, True)
        assert shown["prompt"] == f"{PROMPT_PREFIX}make it red"


def test_a_model_that_takes_no_picture_is_refused(data_dir, tmp_path):
    make_tiny_pipeline(in_channels=4).save_pretrained(tmp_path / "plain")
    done = call(app, "--model_dir", tmp_path / "plain", "--data_dir", data_dir)
    assert "takes no input frame" in error_line(done)


def test_rendered_clips_are_ready_to_be_shown(tmp_path):
    folder = make_validation_clips(tmp_path / "clips", 2, 42, SIDE)
    assert sorted(path.name for path in folder.glob(f"frames_{SIDE}x{SIDE}/*")) == ["2000000", "2000001"]
    assert len(list(folder.glob("annotations/*_filtered.json"))) == 2
