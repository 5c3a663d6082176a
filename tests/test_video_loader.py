"""Frame extraction: the command, the frames and annotations it writes, and bad videos."""

import hashlib
import os
import random
import re
import shutil
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from data import files, paths, video_decoder, video_loader
from tests.commands import call, error_line


def extract(data_dir, *options):
    return call(video_loader, "--data_dir", data_dir, *options)


def write_video(path, num_frames=12, size=(64, 48), fourcc="VP90", suffix=".webm", seed=0):
    """A clip of moving noise. The codec's container is chosen by `suffix`; the file is then named `path`."""
    written = path.with_name(f"{path.stem}_new{suffix}")
    writer = cv2.VideoWriter(str(written), cv2.VideoWriter_fourcc(*fourcc), 12, size)
    assert writer.isOpened()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for index in range(num_frames):
        writer.write(np.roll(noise, index, axis=1))
    writer.release()
    os.replace(written, path)


def make_data_dir(folder, ids, val_ids=()):
    (folder / "videos").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, split_ids in (("train", ids), ("val", val_ids)):
        entries = [
            {"id": video_id, "label": "moving a cup up", "template": "Moving [something] up", "task": "move_object"}
            for video_id in split_ids
        ]
        files.write_json(paths.filtered_annotations_path(folder, split), entries)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six good clips of different lengths; copied by the tests that change them."""
    folder = make_data_dir(tmp_path_factory.mktemp("clips") / "data", ["1", "2", "3", "4"], ["5", "6"])
    for index in range(1, 7):
        write_video(folder / "videos" / f"{index}.webm", num_frames=8 + 3 * index, seed=index)
    return folder


@pytest.fixture
def data_dir(clips, tmp_path):
    return Path(shutil.copytree(clips, tmp_path / "data"))


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    """The clips after one undisturbed extraction."""
    folder = Path(shutil.copytree(clips, tmp_path_factory.mktemp("undisturbed") / "data"))
    result = extract(folder)
    assert result.returncode == 0, result.stderr
    return folder


def tree_hashes(folder):
    """{relative path: hash} of every file, and the empty folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def num_frames_of(data_dir):
    found = {}
    for split in paths.SPLITS:
        for entry in paths.read_annotations(paths.filtered_annotations_path(data_dir, split)):
            found[entry["id"]] = entry.get("num_frames")
    return found


def log_of(data_dir):
    return (data_dir / "frames_extraction.log").read_text()


# What is written.


def test_frames_are_the_resized_video(undisturbed):
    capture = cv2.VideoCapture(str(undisturbed / "videos" / "2.webm"))
    for index in range(14):
        decoded, image = capture.read()
        assert decoded
        for resolution in (96, 128):
            path = paths.frame_path(paths.frames_dir(undisturbed, resolution), "2", index)
            with Image.open(path) as png:
                assert (png.format, png.mode, png.size) == ("PNG", "RGB", (resolution, resolution))
                written = np.asarray(png)
            expected = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
            assert np.array_equal(written, expected[:, :, ::-1])
    assert not capture.read()[0]
    assert num_frames_of(undisturbed) == {str(index): 8 + 3 * index for index in range(1, 7)}
    assert log_of(undisturbed) == "6 videos selected: 6 have all their frames, 0 failed\n"
    assert sorted(path.name for path in paths.frames_dir(undisturbed, 128).iterdir()) == list("123456")


def test_second_run_does_nothing(undisturbed):
    before = tree_hashes(undisturbed)
    times = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.png")}
    result = extract(undisturbed)
    assert "0 videos extracted, 6 were there already" in result.stdout
    assert tree_hashes(undisturbed) == before
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.png")} == times


def test_filtering_again_only_restores_num_frames(undisturbed, tmp_path):
    data_dir = Path(shutil.copytree(undisturbed, tmp_path / "data"))
    for split in paths.SPLITS:
        path = paths.filtered_annotations_path(data_dir, split)
        entries = paths.read_annotations(path)
        files.write_json(path, [{k: v for k, v in entry.items() if k != "num_frames"} for entry in entries])
    shutil.rmtree(data_dir / "videos")  # nothing is decoded again
    assert extract(data_dir).returncode == 0
    assert num_frames_of(data_dir) == num_frames_of(undisturbed)


def test_only_what_is_missing_or_inconsistent_is_written(undisturbed, tmp_path):
    data_dir = Path(shutil.copytree(undisturbed, tmp_path / "data"))
    frames_96, frames_128 = (paths.frames_dir(data_dir, resolution) for resolution in (96, 128))
    shutil.rmtree(frames_96 / "1")
    paths.frame_path(frames_96, "2", 3).unlink()  # a hole
    paths.frame_path(frames_128, "3", 16).unlink()  # the last frame
    shutil.copytree(frames_96 / "6", frames_96 / ".6.partial")  # a killed run's
    result = extract(data_dir)
    assert "3 videos extracted, 3 were there already" in result.stdout
    assert tree_hashes(data_dir) == tree_hashes(undisturbed)


def test_one_more_size_from_another_video_rewrites_all_sizes(data_dir):
    extract(data_dir, "--resolutions", 16, "--limit", 1)
    write_video(data_dir / "videos" / "1.webm", num_frames=5)
    extract(data_dir, "--resolutions", 16, 24, "--limit", 1)
    for resolution in (16, 24):
        assert len(list((paths.frames_dir(data_dir, resolution) / "1").iterdir())) == 5
    assert num_frames_of(data_dir)["1"] == 5


def test_sound_that_ends_after_the_pictures_does_not_make_a_video_truncated(tmp_path):
    data_dir = make_data_dir(tmp_path / "data", ["1"])
    with av.open(str(data_dir / "videos" / "1.mkv"), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        for _ in range(5):
            container.mux(pictures.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(pictures.encode())
    extract(data_dir, "--resolutions", 32)
    assert num_frames_of(data_dir) == {"1": 5}


# Bad and unusual videos.


def test_videos_converted_to_a_higher_rate_are_said(tmp_path):
    data_dir = make_data_dir(tmp_path / "data", ["fast", "slow"], ["still"])
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name, rate, frames_each in (("fast", 30, 2), ("slow", 12, 1), ("still", 12, 30)):
        path = str(data_dir / "videos" / f"{name}.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), rate, (64, 48))
        for index in range(30):
            writer.write(np.roll(noise, index // frames_each * 8, axis=1))
        writer.release()
    printed = extract(data_dir, "--resolutions", 48).stdout
    assert "over a third of the frames repeat the one before, at 30 frames/s" in printed


def test_of_two_videos_with_one_id_it_is_said_which_is_used(data_dir):
    shutil.copy(data_dir / "videos" / "2.webm", data_dir / "videos" / "1.mp4")
    errors = extract(data_dir, "--resolutions", 16).stderr
    assert "1 ids have several videos: 1.webm is used, not 1.mp4" in errors
    assert num_frames_of(data_dir)["1"] == 11


def test_many_missing_and_no_validation_videos_are_warned_of(data_dir):
    for video_id in "56":
        (data_dir / "videos" / f"{video_id}.webm").unlink()
    errors = extract(data_dir, "--resolutions", 16).stderr
    assert (
        f"2 of 6 chosen videos are not in {data_dir}/videos; choose from the others: python -m data.dataset" in errors
    )
    assert "not one validation video is in" in errors
    shutil.move(data_dir / "videos", data_dir / "20bn-something-something-v2")
    shutil.rmtree(paths.frames_dir(data_dir, 16))
    assert "move them: mkdir -p" in error_line(extract(data_dir, "--resolutions", 16))


@pytest.mark.parametrize(
    "times, duration, truncated",
    [
        ([i / 12 for i in range(42)], 43 / 12, False),  # a container that claims one frame too many, or one was lost
        ([i / 12 for i in range(41)], 43 / 12, True),
        ([0, 0.1, 0.2, 1.2, 2.2], 40 / 12, False),  # varying frame rate, long last frame
        ([0, 0.1, 0.2, 1.2, 2.2], 60 / 12, True),
        ([0], 5, True),  # a single frame
        ([0, 0.1], 0, False),  # no duration stated
    ],
)
def test_what_counts_as_truncated(times, duration, truncated):
    if truncated:
        with pytest.raises(video_decoder.VideoError, match="frames end at"):
            video_decoder.check_duration(times, duration, 1 / 12)
    else:
        video_decoder.check_duration(times, duration, 1 / 12)


def test_bad_videos_are_named_and_stop_nobody(tmp_path):
    write_video(tmp_path / "good.webm", num_frames=26)
    good = (tmp_path / "good.webm").read_bytes()
    bad = {
        "empty": (b"", "unreadable"),
        "cut": (good[: len(good) // 2], "truncated"),
        "lastframes": (good[: int(len(good) * 0.9)], "truncated"),
        "zeros": (good[: len(good) // 2] + bytes(len(good) // 2), "truncated"),
        "header": (good[:200], "unreadable"),
        "random": (random.Random(0).randbytes(20_000), "unreadable"),
        "playlist": (b"ffconcat version 1.0\nfile '1.webm'\n", "unreadable"),
        "picture": (cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes(), "unreadable"),
    }
    others = dict.fromkeys(("folder", "pipe", "link", "absent"), "missing")
    others |= {"nostream": "unreadable"}
    data_dir = make_data_dir(tmp_path / "data", ["1", *bad, *others, "2"])
    videos = data_dir / "videos"
    write_video(videos / "1.webm", num_frames=11)
    write_video(videos / "2.webm", num_frames=14)
    for video_id, (content, _) in bad.items():
        (videos / f"{video_id}.webm").write_bytes(content)
    (videos / "folder.webm").mkdir()
    os.mkfifo(videos / "pipe.webm")
    (videos / "link.webm").symlink_to("nowhere.webm")
    cv2.VideoWriter(str(videos / "nostream.webm"), cv2.VideoWriter_fourcc(*"VP90"), 12, (64, 48)).release()

    done = extract(data_dir, "--resolutions", 16)
    assert done.returncode == 0
    assert "frames_extraction.log" in done.stdout
    expected = {video_id: kind for video_id, (_, kind) in bad.items()} | others
    assert dict(re.findall(r"^(\w+): ([a-z ]+): .+$", log_of(data_dir), re.MULTILINE)) == expected
    assert f"link: missing: there is no file {videos}/nowhere.webm\n" in log_of(data_dir)
    assert f"2 have all their frames, {len(expected)} failed" in done.stdout
    assert {video_id: count for video_id, count in num_frames_of(data_dir).items() if count} == {"1": 11, "2": 14}
    assert sorted(path.name for path in paths.frames_dir(data_dir, 16).iterdir()) == ["1", "2"]

    # A repaired file is extracted, and a failed video loses the num_frames it had.
    (videos / "cut.webm").write_bytes(good)
    shutil.rmtree(paths.frames_dir(data_dir, 16) / "1")
    (videos / "1.webm").write_bytes(b"")
    extract(data_dir, "--resolutions", 16)
    assert {video_id: n for video_id, n in num_frames_of(data_dir).items() if n} == {"2": 14, "cut": 26}


# Files that people have.


def encode(path, codec="libx264", sound=None, num_frames=24, shift=0, pixels="yuv420p", options=None, **how):
    """A clip of noise at 12 frames a second; the first `shift` frames lie before time 0, `how` goes to av.open."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", **how) as container:
        pictures = container.add_stream(codec, rate=12, options=options or {"g": "6"})
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, pixels
        sounds = container.add_stream(sound, rate=48_000, layout="mono") if sound else None
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, index, axis=1)).reformat(format=pixels)
            frame.pts = index - shift
            container.mux(pictures.encode(frame))
            if sounds:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
                samples.sample_rate = 48_000
                container.mux(sounds.encode(samples))
        for stream in filter(None, (pictures, sounds)):
            container.mux(stream.encode())


def decoded(path):
    """The frames of a video, 16 pixels a side, and the remarks on it."""
    folder = path.with_name(f"{path.name}_frames")
    num_frames, remarks = video_decoder.write_frames(path, {16: folder})
    return [cv2.imread(str(folder / f"{index:05d}.png")) for index in range(num_frames)], remarks


@pytest.mark.parametrize("name", ["trim.mp4", "trim.mov"])
def test_a_lossless_trim_gives_the_frames_that_are_shown(tmp_path, name):
    encode(tmp_path / "whole.mp4")
    encode(tmp_path / name, shift=10)  # MP4's muxer hides what lies before time 0 by an edit list
    with av.open(str(tmp_path / name)) as container:
        assert container.streams.video[0].frames == 24
    whole, trimmed = decoded(tmp_path / "whole.mp4")[0], decoded(tmp_path / name)[0]
    assert len(whole) == 24 and np.array_equal(trimmed, whole[10:])


CUT = [
    ("a.webm", {"codec": "libvpx-vp9", "sound": "libopus"}),
    ("a.mkv", {"sound": "aac"}),
    ("a.avi", {"codec": "mpeg4", "sound": "mp3"}),
    ("a.mp4", {"sound": "aac", "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("b.mp4", {"sound": "aac", "container_options": {"movflags": "faststart"}}),
    ("c.mp4", {"sound": "aac", "format": "flv"}),
]


@pytest.mark.parametrize("name, how", CUT)
def test_a_part_of_a_video_with_sound_is_truncated(tmp_path, name, how):
    encode(tmp_path / name, **how)
    assert len(decoded(tmp_path / name)[0]) == 24
    content = (tmp_path / name).read_bytes()
    for percent in (40, 50, 75, 90):
        part = tmp_path / f"{percent}_{name}"
        part.write_bytes(content[: len(content) * percent // 100])
        with pytest.raises(video_decoder.VideoError) as caught:
            decoded(part)
        assert caught.value.args[0] == "truncated"


@pytest.mark.parametrize("name", ["song.mp4", "song.mkv"])
def test_the_cover_of_a_song_is_no_video(tmp_path, name):
    cover = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    with av.open(str(tmp_path / name), "w") as container:
        sounds = container.add_stream("aac", rate=48_000, layout="mono")
        if name == "song.mkv":
            container.add_attachment("cover.jpg", "image/jpeg", cover)
        else:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame(64, 48, "yuvj420p")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48_000
        container.mux(sounds.encode(samples))
        container.mux(sounds.encode())
    with pytest.raises(video_decoder.VideoError, match="it has no video that can be decoded"):
        decoded(tmp_path / name)


@pytest.mark.parametrize("container", ["mpegts", "flv", "vob", "mov"])
def test_the_container_may_be_another_than_the_name_says(tmp_path, container):
    encode(tmp_path / "a.mp4", sound="aac" if container != "vob" else "mp2", format=container)
    assert len(decoded(tmp_path / "a.mp4")[0]) == 24


def test_segments_of_mpeg_ts_may_be_joined(tmp_path):
    encode(tmp_path / "one.mp4", format="mpegts")
    (tmp_path / "two.mp4").write_bytes((tmp_path / "one.mp4").read_bytes() * 2)
    assert len(decoded(tmp_path / "two.mp4")[0]) == 48


def test_another_container_is_said_to_be_none(tmp_path):
    encode(tmp_path / "a.mp4", codec="wmv2", format="asf")
    with pytest.raises(video_decoder.VideoError, match="none of matroska,.*; convert it"):
        decoded(tmp_path / "a.mp4")


def test_hdr_and_interlaced_videos_are_counted_and_named(tmp_path):
    data_dir = make_data_dir(tmp_path / "data", ["plain", "pq", "hlg"], ["interlaced"])
    for name, transfer in (("pq", "smpte2084"), ("hlg", "arib-std-b67")):
        with av.open(str(data_dir / "videos" / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=12, options={"color_trc": transfer})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
            stream.codec_context.color_primaries, stream.codec_context.colorspace = 9, 9  # BT.2020
            frame = av.VideoFrame(64, 48, "yuv420p10le")
            for plane, level in zip(frame.planes, (64 + 876 * WHITE[name], 512, 512)):
                plane.update(np.full(plane.buffer_size // 2, round(level), "<u2"))
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    encode(data_dir / "videos" / "interlaced.m4v", options={"x264-params": "interlaced=1"}, format="mp4")
    encode(data_dir / "videos" / "plain.mp4")
    done = extract(data_dir, "--resolutions", 16)
    assert "HDR (colors are mapped to the standard range): 2 of them (hlg, pq)\n" in done.stdout
    assert re.search(r"interlaced \(.*bwdif.*\): 1 of them \(interlaced\)\n", done.stdout)
    for name in WHITE:  # paper's white is white, not gray as in an HDR signal
        assert cv2.imread(str(paths.frame_path(paths.frames_dir(data_dir, 16), name, 0))).min() >= 250


WHITE = {"pq": 0.58, "hlg": 0.75}  # the share of the signal that shows 203 nits


# Errors of the whole run.


def test_what_is_missing_is_said_in_one_line(data_dir, tmp_path):
    assert f"python -m data.dataset --data_dir {tmp_path}" in error_line(extract(tmp_path))
    shutil.rmtree(data_dir / "videos")
    assert error_line(extract(data_dir)).startswith(f"error: no videos in {data_dir}/videos")


def test_a_second_extraction_at_once_is_refused(data_dir):
    with files.only_one(data_dir / "annotations", "extraction"):
        assert "another extraction is running" in error_line(extract(data_dir))


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_is_done(data_dir, monkeypatch):
    write_frames = video_loader.write_frames

    def full_at_the_third(path, folders):
        if path.stem == "3":
            for folder in folders.values():
                folder.mkdir()
            raise OSError(28, "No space left on device")
        return write_frames(path, folders)

    monkeypatch.setattr(video_loader, "write_frames", full_at_the_third)
    done = extract(data_dir, "--resolutions", 16, "--num_workers", 1)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    counts = {video_id: count for video_id, count in num_frames_of(data_dir).items() if count}
    assert {"1": 11, "2": 14}.items() <= counts.items() and "3" not in counts
    assert {path.name for path in paths.frames_dir(data_dir, 16).iterdir()} >= set(counts)
    assert not list(data_dir.glob("frames_*/.*"))


def test_nothing_but_failures_is_an_error(data_dir):
    for path in (data_dir / "videos").iterdir():
        path.write_bytes(b"not a video")
    done = extract(data_dir, "--resolutions", 16)
    assert done.returncode == 1
    assert done.stderr.endswith(f"error: not one of 6 videos has frames; {data_dir}/frames_extraction.log says why\n")
    assert log_of(data_dir).startswith("6 videos selected: 0 have all their frames, 6 failed (unreadable: 6)\n")
