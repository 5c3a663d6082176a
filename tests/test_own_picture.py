"""Your own picture: what follows it, from the shell and from Python."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from data.cli import UserError
from data.prompts import build_prompt
from data.video_decoder import read_picture
from pecn.evaluation import default_output_dir, loaded_model
from pecn.sampling import predict_frames
from tests.conftest import PROJECT, SIDE, run

EXIF_ORIENTATION, TURNED_LEFT = 0x0112, 6  # the picture is stored turned to the left
LABEL = "pushing a cup from left to right"


@pytest.fixture(scope="module")
def upright():
    return astronaut()[:381, :507]


@pytest.fixture(scope="module")
def photo(upright, tmp_path_factory):
    """A JPEG of odd size whose EXIF data say how it was held."""
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_LEFT
    Image.fromarray(np.rot90(upright)).save(path, exif=exif, quality=95)
    return path


def predict(model, photo, output_dir, *options, check=True):
    command = ["python", "sample_from_pix2pix.py", "--model_dir", model, "--output_dir", output_dir]
    return run(*command, "--image", photo, "--prompt", LABEL, *options, check=check)


def test_each_picture_gets_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        folder = default_output_dir(Path("photos/a cup.jpg"))
        assert folder == Path(f"test_result/a cup-{number}")
        folder.mkdir(parents=True)
    assert default_output_dir(None) == Path("test_result/baseline")


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_script_predicts_from_a_photo_as_the_model_was_trained(photo, upright, tiny_model, tmp_path):
    model, output_dir = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    arguments = {"resolution": SIDE, "add_progress": True, "num_inference_steps": 1, "scheduler": "euler"}
    (model / "training_config.json").write_text(json.dumps({"arguments": arguments}))
    done = predict(model, photo, output_dir, "--add_progress", 40, "--num_predictions", 2)
    names = ["comparison.png", "expected.png", "input.png", "prediction.png", "uncertainty.png"]
    assert sorted(path.name for path in output_dir.glob("*.*[!k]")) == names
    sentence = f"{LABEL}. And 40% of the action has been completed."
    assert f"prompt: Generate a future frame of this action: {sentence}\n" in done.stdout
    assert not done.stderr
    assert "photo.jpg is squashed to a square, as training frames are; crop takes its middle square\n" in done.stdout
    frame = read(output_dir / "input.png")
    assert frame.shape == read(output_dir / "prediction.png").shape == (SIDE, SIDE, 3)
    assert np.abs(frame - cv2.resize(upright, (SIDE, SIDE), interpolation=cv2.INTER_AREA)).mean() < 1

    done = predict(model, photo, output_dir)
    assert "was trained with progress prompts (PROGRESS=40: 40% is done)" in done.stderr
    names = ["comparison.png", "input.png", "prediction.png"]  # no mean of the earlier two
    assert sorted(path.name for path in output_dir.glob("*.*[!k]")) == names


def test_16_bits_of_gray_are_read_as_their_upper_8(tmp_path):
    levels = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "gray.png"), levels)
    assert np.abs(read_picture(tmp_path / "gray.png", SIDE) - (levels / 257)[..., None]).max() <= 2


def test_a_prediction_that_is_the_input_is_named(photo, tmp_path):
    one_small_step = ("--num_inference_steps", 50, "--strength", 0.02, "--image_guidance_scale", 1)
    done = predict(PROJECT / "demo" / "base_model", photo, tmp_path / "out", *one_small_step, "--keep_background")
    assert "warning: the prediction is the input" in done.stderr
    assert np.array_equal(read(tmp_path / "out" / "prediction.png"), read(tmp_path / "out" / "input.png"))


def test_four_lines_of_python_draw_what_the_command_draws(photo, tiny_model, tmp_path):
    done = predict(tiny_model, photo, tmp_path / "out", "--horizon", 5)  # of a model that does not say what it knows
    assert f"{LABEL}. The frame is 5 frames later." in done.stdout
    predict(tiny_model, photo, tmp_path / "out")
    with loaded_model(str(tiny_model)) as pipeline:
        [predicted] = predict_frames(pipeline, [read_picture(photo, 128)], [build_prompt(LABEL)], seeds=[42])
    assert predicted.sample.shape == (128, 128, 3)
    assert np.array_equal(predicted.sample, read(tmp_path / "out" / "prediction.png"))


def test_other_formats_are_read(tmp_path):
    for mode, suffix, wanted in (("L", "png", (76, 76, 76)), ("RGBA", "webp", (255, 0, 0)), ("P", "gif", (255, 0, 0))):
        Image.new("RGB", (7, 300), (255, 0, 0)).convert(mode).save(tmp_path / f"picture.{suffix}")
        picture = read_picture(tmp_path / f"picture.{suffix}", 16)
        assert picture.shape == (16, 16, 3) and np.abs(picture.astype(int) - wanted).max() <= 3


def test_crop_takes_the_middle_square(upright, photo, tiny_model, tmp_path):
    done = predict(tiny_model, photo, tmp_path / "out", "--crop", "True", "--resolution", SIDE)
    assert "squashed" not in done.stdout
    middle = cv2.resize(upright[:, 63:444], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    assert np.abs(read(tmp_path / "out" / "input.png") - middle).mean() < 1


GRAY = np.linspace(0, 65535, 16).round().astype(np.uint16)[None].repeat(16, 0)


@pytest.mark.parametrize("name", ["gray.png", "gray.tif", "gray.pgm", "color.png", "color.tif"])
def test_16_bits_become_8(tmp_path, name):
    cv2.imwrite(str(tmp_path / name), GRAY if "gray" in name else np.dstack([GRAY] * 3))
    wanted = np.linspace(0, 255, 16)[None, :, None]
    assert np.abs(read_picture(tmp_path / name, 16) - wanted).max() <= 1


TRANSPARENT = [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tif"), ("P", "png"), ("P", "gif")]


@pytest.mark.parametrize("mode, suffix", TRANSPARENT)
def test_what_is_transparent_is_white(tmp_path, mode, suffix):
    path = tmp_path / f"picture.{suffix}"
    if mode == "P":
        picture = Image.new("P", (16, 16))
        picture.putpalette([0, 0, 0, 200, 0, 0])
        picture.paste(1, (0, 0, 8, 16))
        picture.save(path, transparency=1)
    else:
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[:, :8, 0], pixels[:, 8:, 3] = 200, 255
        Image.fromarray(pixels).convert(mode).save(path, lossless=True)
    picture = read_picture(path, 16)
    assert (picture[:, :8] == 255).all() and (picture[:, 8:] == 0).all()


def test_pictures_that_cannot_be_read_are_said_to_be_what_they_are(tmp_path):
    Image.fromarray(GRAY.astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    for name, wanted in (("float.tif", "its pixels are floats"), ("phone.jpg", "it is HEIC")):
        with pytest.raises(UserError, match=wanted):
            read_picture(tmp_path / name, 16)


@pytest.mark.filterwarnings("error")
def test_large_pictures_are_read_without_a_warning(tmp_path):
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "large.png")
    assert (read_picture(tmp_path / "large.png", 16) == 255).all()


def test_mistakes_get_one_line(photo, tiny_model, tmp_path):
    def message(*options, image=photo, output_dir=tmp_path / "out", status=1):
        done = predict(tiny_model, image, output_dir, *options, check=False)
        assert done.returncode == status
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ") and not output_dir.joinpath("prediction.png").exists()
        return line

    (tmp_path / "captions.csv").write_text("file,caption\n")
    assert "cannot be read as a picture" in message(image=tmp_path / "captions.csv")
    assert "nothing.png cannot be read as a picture (No such file" in message(image=tmp_path / "nothing.png")
    (tmp_path / "input.png").touch()
    assert "choose another OUTPUT_DIR" in message(image=tmp_path / "input.png", output_dir=tmp_path)
    assert "a multiple of 10" in message("--add_progress", 45, status=2)
    assert "choose one number with HORIZON" in message("--horizon", "1-3")
    for flags, wanted in (
        (("--image", photo), "--image and --prompt need each other"),
        (("--prompt", LABEL), "--image and --prompt need each other"),
        (("--image", photo, "--prompt", " "), "--prompt is blank"),
        (("--add_progress", 40), "a percentage as --add_progress needs --image"),
    ):
        done = run("python", "sample_from_pix2pix.py", "--model_dir", tiny_model, *flags, check=False)
        assert done.returncode == 2 and wanted in done.stderr
