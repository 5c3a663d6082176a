"""benchmarks/progress_study.py: the study as one command, and its comparison by hand-made scores."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import progress_comparison, progress_study
from benchmarks.progress_study import Frames, Run
from data.cli import UserError
from data.paths import filtered_annotations_path
from tests.conftest import run

FIXED, ANY_START = Frames(20, 5), Frames(None, 5)


@pytest.fixture(scope="module")
def study(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The work directory of a quick study of two sources and what it printed."""
    work_dir = tmp_path_factory.mktemp("study")
    return work_dir, quick(work_dir, tiny_model).stdout


def quick(work_dir: Path, model: Path, *options: object, check: bool = True):
    module = ("python", "-m", "benchmarks.progress_study", "--quick", "--sources", "none", "estimated")
    return run(*module, "--work_dir", work_dir, "--pretrained_model_name_or_path", model, *options, check=check)


def files_of_runs(work_dir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (work_dir / "runs").rglob("*") if path.is_file()}


def test_quick_study_compares_the_same_pairs_with_and_without_progress(study: tuple[Path, str]) -> None:
    work_dir, output = study
    results = json.loads((work_dir / "results.json").read_text())
    assert list(results["pairs"]) == ["20 -> 25", "any -> +5"]
    for (title, pairs), folder in zip(results["pairs"].items(), ("20_to_25", "any_to_plus_5")):
        assert len(pairs) == 6 and {pair["task"] for pair in pairs} == {"move_object", "drop_object", "cover_object"}
        by_source = {}
        for metrics in (work_dir / "runs").glob(f"{folder}_*/samples/metrics.json"):
            source = "none" if "_progress_none_" in str(metrics) else "estimated"
            by_source[source] = {sample["video_id"]: sample for sample in json.loads(metrics.read_text())["samples"]}
        for pair in pairs:
            for source, samples in by_source.items():
                sample = samples[pair["video_id"]]
                assert ("% of the action" in sample["edit_prompt"]) == (source == "estimated")
                assert pair["psnr"][source] == [sample["psnr"]["sample"]]
                assert pair["psnr"]["copy"] == sample["psnr"]["copy"]  # the same frames
        gains = [pair["psnr"]["estimated"][0] - pair["psnr"]["none"][0] for pair in pairs]
        assert any(gain != 0 for gain in gains)  # progress reached training or sampling
        (row,) = [line for line in output.splitlines() if line.startswith(f"  {title:<9} estimated   all ")][:1]
        assert f"{np.mean(gains):+.2f}" in row
    assert "not SSv2" in output
    assert "too few for an answer" in output and "it helps" not in output


def test_finished_runs_are_not_repeated_and_models_not_kept(study: tuple[Path, str], tiny_model: Path) -> None:
    work_dir, output = study
    before = files_of_runs(work_dir)
    assert not [path for path in before if path.suffix == ".safetensors"]
    [weights] = (work_dir / "estimators").rglob("*.safetensors")
    written = weights.stat().st_mtime_ns
    again = quick(work_dir, tiny_model, "--data_dir", work_dir / "clips").stdout
    assert files_of_runs(work_dir) == before and weights.stat().st_mtime_ns == written
    table = [line for line in output.splitlines() if line.startswith("  20 -> 25")]
    assert table == [line for line in again.splitlines() if line.startswith("  20 -> 25")]
    assert "not SSv2" not in again  # whether it is, is then the user's to know


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_dir", "nowhere"], "python -m data.dataset --data_dir nowhere"),
        (["--pretrained_model_name_or_path", "demo/base_model"], "demo.make_model"),
        (["--training_options=--seed 3"], "--seed"),
        (["--training_options=--add_progress=True"], "--add_progress"),
        (["--sources", "guessed"], "--sources"),
        (["--num_inference_steps", "0"], "num_inference_steps"),
        (["--residual", "auto"], "must be True or False"),
        (["--max_train_steps", "0"], "max_train_steps"),
        (["--input_frame_idx", "30"], "must come after --input_frame_idx"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    study: tuple[Path, str], tiny_model: Path, tmp_path: Path, monkeypatch, capsys, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data_dir", str(study[0] / "clips")]
    words = ["--quick", "--work_dir", "work", "--pretrained_model_name_or_path", str(tiny_model), *data, *options]
    with pytest.raises((UserError, SystemExit)) as caught:
        progress_study.main(progress_study.parse_args(words))
    assert message in str(caught.value) + capsys.readouterr().err
    assert not Path("work/runs").exists()


def test_a_flag_that_training_refuses_stops_the_study(
    study: tuple[Path, str], tiny_model: Path, tmp_path: Path
) -> None:
    options = ("--data_dir", study[0] / "clips", "--training_options=--no_such_flag", "--sources", "none", "oracle")
    done = quick(tmp_path, tiny_model, *options, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ") and "--no_such_flag" in message and "train.log" in message
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_settings_that_change_results_change_the_runs_folder(tmp_path: Path) -> None:
    path = filtered_annotations_path(tmp_path, "train")
    path.parent.mkdir()
    path.write_text("[]")

    def folder(*options: str, model: str = "", seed: int = 0, source: str = "none", frames: Frames = FIXED) -> str:
        args = progress_study.parse_args([f"--work_dir={tmp_path}", *options])
        planned = progress_study.plan_run(args, tmp_path, tmp_path / "val.json", frames, source, seed, model)
        return planned.folder.name

    assert folder() == folder()
    others = [
        folder("--training_options="),
        folder("--num_predictions=3"),
        folder("--residual=False"),
        folder("--learning_rate=1e-3"),
        folder("--training_options=--use_ema"),
        folder("--num_inference_steps=7"),
        folder(model="another"),
        folder(seed=1),
        folder(source="oracle"),
        folder(source="constant"),
        folder(source="estimated"),
        folder("--estimator_steps=7", source="estimated"),
        folder(frames=ANY_START),
    ]
    assert len({folder(), *others}) == 1 + len(others)


def test_failed_command_is_quoted_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "run" / "train.log"
    with pytest.raises(UserError) as caught:
        progress_study.call(["-c", "print('50%\\rerror: no memory left\\nbye', end=''); raise SystemExit(3)"], log)
    assert "no memory left" in str(caught.value) and str(log) in str(caught.value) and "\n" not in str(caught.value)


def write_metrics(folder: Path, source: str, seed: int, predicted: dict[str, float], several: bool = False) -> Run:
    """A finished run with these PSNRs of the predictions by video; those of videos named "still…" do not move.

    With `several` they are those of the expected frames, and the samples' are worse.
    """

    def scores(predicted: float, copy: float) -> dict[str, float]:
        ways = {"sample": predicted - 5, "expected": predicted} if several else {"sample": predicted}
        return {**ways, "copy": copy}

    samples = [
        {
            "video_id": video_id,
            "task": "move_object",
            "psnr": scores(value, 20.0),
            "moving": None if video_id.startswith("still") else {"psnr": scores(value - 10, 10.0)},
        }
        for video_id, value in predicted.items()
    ]
    finished = Run(FIXED, source, seed, folder / f"{source}{seed}", [], [])
    finished.metrics.parent.mkdir(parents=True)
    finished.metrics.write_text(json.dumps({"samples": samples}))
    return finished


@pytest.mark.parametrize("several", [False, True])
def test_differences_are_averaged_over_seeds_before_pairs(tmp_path: Path, several: bool) -> None:
    runs = [
        write_metrics(tmp_path, "none", 0, {"a": 20, "b": 30, "still": 40}, several),
        write_metrics(tmp_path, "oracle", 0, {"still": 40, "b": 31, "a": 22}, several),  # another order
        write_metrics(tmp_path, "none", 1, {"a": 20, "b": 30, "still": 40}, several),
        write_metrics(tmp_path, "oracle", 1, {"a": 24, "b": 29, "still": 40}, several),
    ]
    pairs = progress_study.collect_pairs(runs)
    whole = progress_comparison.compare(pairs, "psnr", "oracle", "none")
    assert (whole["num_pairs"], whole["copy_mean"], whole["base_mean"]) == (3, 20, 30)
    assert whole["difference"] == pytest.approx(1)  # a +3, b 0, still 0
    assert whole["difference_per_seed"] == pytest.approx([1, 1])
    assert whole["interval"] == pytest.approx((0, 3))  # 27 equally likely resamples; all a and no a are above 2.5%
    moving = progress_comparison.compare(pairs, "moving_psnr", "oracle", "none")
    assert (moving["num_pairs"], moving["copy_mean"], moving["difference"]) == (2, 10, pytest.approx(1.5))


def test_a_single_pair_has_neither_interval_nor_p_value(tmp_path: Path) -> None:
    sources = ("none", "constant", "estimated")
    runs = [write_metrics(tmp_path, source, 0, {"a": 20 + gain}) for gain, source in enumerate(sources)]
    rows = progress_comparison.compare_all(progress_study.collect_pairs(runs), sources)
    for row in rows:
        gain = sources.index(row["source"])
        assert (row["base"], row["difference"], row["interval"], row["p_value"]) == ("none", gain, None, None)
    table = progress_comparison.format_table({"20 -> 25": rows})
    assert "  20 -> 25  constant    all              1    20.00    20.00   21.00    +1.00" in table
    assert "  20 -> 25  estimated   all              1    20.00    20.00   22.00    +2.00" in table


@pytest.mark.parametrize("content", [None, "{", '{"samples": []}'])
def test_run_that_does_not_fit_the_others_is_named(tmp_path: Path, content: str | None) -> None:
    good = write_metrics(tmp_path, "none", 0, {"a": 20})
    bad = write_metrics(tmp_path, "oracle", 0, {"a": 20})
    bad.metrics.unlink() if content is None else bad.metrics.write_text(content)
    with pytest.raises(UserError, match=f"delete {bad.folder}"):
        progress_study.collect_pairs([good, bad])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(5, 60), st.floats(5, 60)), min_size=2, max_size=8), st.integers(1, 3))
def test_swapping_the_prompts_turns_the_answer_round(scores: list[tuple[float, float]], num_seeds: int) -> None:
    def pairs(first: str, second: str) -> list[dict]:
        cells = [{"copy": 20.0, first: [a] * num_seeds, second: [b] * num_seeds} for a, b in scores]
        return [{"video_id": str(i), "task": "drop_object", "psnr": cell} for i, cell in enumerate(cells)]

    one = progress_comparison.compare(pairs("none", "oracle"), "psnr", "oracle", "none")
    other = progress_comparison.compare(pairs("oracle", "none"), "psnr", "oracle", "none")
    assert other["difference"] == pytest.approx(-one["difference"], abs=1e-9)
    assert other["interval"] == pytest.approx([-end for end in reversed(one["interval"])], abs=1e-6)
    assert other["p_value"] == pytest.approx(one["p_value"])
    assert one["interval"][0] - 1e-9 <= one["difference"] <= one["interval"][1] + 1e-9


def test_answer_needs_interval_and_seeds_to_agree() -> None:
    row = {"num_pairs": 200, "measure": "psnr", "difference": 0.3, "interval": (0.1, 0.5), "p_value": 0.001}
    row |= {"source": "oracle", "base": "none"}
    assert (
        "progress oracle against none, over the whole picture: it helps by 0.30 dB, with every seed"
        in progress_comparison.answer("20 -> 25", row | {"difference_per_seed": [0.2, 0.4]})
    )
    assert "not with every seed" in progress_comparison.answer("20 -> 25", row | {"difference_per_seed": [-0.1, 0.7]})
    unsure = row | {"interval": (-0.1, 0.7), "p_value": 0.2, "difference_per_seed": [0.2, 0.4]}
    assert "no difference shown" in progress_comparison.answer("20 -> 25", unsure)
    harmful = row | {"difference": -0.3, "interval": (-0.5, -0.1), "difference_per_seed": [-0.2, -0.4]}
    assert "hurts by 0.30 dB" in progress_comparison.answer("20 -> 25", harmful)
    single = row | {"difference_per_seed": [0.3]}
    assert "helps by 0.30 dB, but only one seed was tried" in progress_comparison.answer("20 -> 25", single)
    assert "6 pairs are too few" in progress_comparison.answer("20 -> 25", single | {"num_pairs": 6})


def test_permutation_test_agrees_with_all_sign_changes():
    differences = np.array([1.3, 0.2, -0.4, 2.0, 0.9, 0.7, -0.1, 1.1])
    sums = [np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9)
    assert progress_comparison.paired_permutation_test(differences) == pytest.approx(exact)


def test_permutation_test_finds_a_difference_and_no_other():
    rng = np.random.default_rng(3)
    differences = rng.normal(0, 1, 200)
    p_value = progress_comparison.paired_permutation_test(differences + 1)
    assert p_value == pytest.approx(2 / 10_001)  # one of 10,001 on either side
    assert progress_comparison.paired_permutation_test(differences - differences.mean()) > 0.9
    assert progress_comparison.paired_permutation_test([0.0] * 5) == 1
