"""What all commands share: files and folders that are whole or absent, the lock, and the types of options."""

import os
from pathlib import Path

import pytest
from tqdm import tqdm

from data import cli, files


def contents(folder):
    """{relative path: text} of all files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


# Whole or absent.


def test_a_folder_and_a_file_replace_the_former_ones(tmp_path):
    write(tmp_path / "folder", old="1")
    write(tmp_path, file="1")
    with files.whole_or_absent(tmp_path / "folder") as partial:
        write(partial, new="2")
        assert contents(tmp_path / "folder") == {"old": "1"}
    with files.whole_or_absent(tmp_path / "file") as partial:
        partial.write_text("2")
    assert contents(tmp_path) == {"folder/new": "2", "file": "2"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_former_folder_and_removes_the_partial_one(tmp_path, failure):
    write(tmp_path / "folder", old="1")
    write(files.partial_path(tmp_path / "folder"), left_by_a_killed_run="0")
    with pytest.raises(failure), files.whole_or_absent(tmp_path / "folder") as partial:
        assert not partial.exists()
        write(partial, new="2")
        raise failure
    assert contents(tmp_path) == {"folder/old": "1"}
    assert os.listdir(tmp_path) == ["folder"]


def test_leftovers_go_and_nothing_else(tmp_path):
    write(tmp_path / ".1.partial", frame="1")
    write(tmp_path / ".1.outdated", frame="1")
    write(tmp_path, **{".2.partial": "", "3.partial": "", ".4": ""})
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".4", "3.partial"]


@pytest.fixture
def parts(tmp_path):
    """A folder with three parts, to be replaced by three others, and a part that stays."""
    write(tmp_path / "unet", weights="old")
    write(tmp_path, config="old", index="old", notes="old")
    return tmp_path


def replace_parts(folder):
    with files.parts_replaced_together(folder, last="index") as new:
        write(new / "unet", weights="new")
        write(new, config="new", index="new")


def all_parts(unet, config, index):
    return {"unet/weights": unet, "config": config, "index": index, "notes": "old"}


def test_the_last_part_leaves_first_and_arrives_last(parts, monkeypatch):
    moves = []
    rename = os.rename

    def noted_rename(source, target):
        rename(source, target)
        moves.append((Path(source).name, Path(target).parent == parts))

    monkeypatch.setattr(os, "rename", noted_rename)
    replace_parts(parts)
    assert contents(parts) == all_parts("new", "new", "new")
    assert sorted(os.listdir(parts)) == ["config", "index", "notes", "unet"]
    assert len(moves) == 6
    assert moves[0] == ("index", False) and moves[-1] == ("index", True)


@pytest.mark.parametrize("failing", range(6))
def test_a_failure_at_any_rename_brings_the_former_parts_back(parts, monkeypatch, failing):
    calls = iter(range(100))
    rename = os.rename

    def failing_rename(source, target):
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(OSError, match="No space left"):
        replace_parts(parts)
    assert contents(parts) == all_parts("old", "old", "old")
    assert sorted(os.listdir(parts)) == ["config", "index", "notes", "unet"]


def test_a_failure_while_parts_are_written_touches_none(parts):
    with pytest.raises(ValueError), files.parts_replaced_together(parts, last="index") as new:
        write(new, config="new")
        raise ValueError
    assert contents(parts) == all_parts("old", "old", "old")


# The lock.


def test_a_second_holder_is_refused_until_the_first_is_done(tmp_path):
    with files.only_one(tmp_path, "training"):
        with (
            pytest.raises(cli.UserError, match="another training is running in"),
            files.only_one(tmp_path, "training"),
        ):
            pytest.fail("the second holder was let in")
    with pytest.raises(ValueError), files.only_one(tmp_path, "training"):
        raise ValueError
    with files.only_one(tmp_path, "training"):
        pass


# Options.


def parse(kind, text):
    parser = cli.CommandParser(prog="command")
    parser.add_argument("--option", type=kind)
    return parser.parse_args(["--option", text]).option


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (cli.number(), "-3", -3),
        (cli.number(at_least=1, at_most=8), "1", 1),
        (cli.number(at_least=1, at_most=8), "8", 8),
        (cli.number(multiple_of=8), "96", 96),
        (cli.number(float, above=0, below=1), "0.5", 0.5),
        (cli.boolean, "True", True),
        (cli.boolean, "false", False),
    ],
)
def test_a_good_value_is_taken(kind, text, value):
    parsed = parse(kind, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (cli.number(at_least=1), "0", "must be at least 1, not 0"),
        (cli.number(at_most=4096), "4097", "must be at most 4096, not 4097"),
        (cli.number(at_most=999_999), "9" * 400, f"must be at most 999999, not {'9' * 400}"),
        (cli.number(float, above=0), "0", "must be above 0, not 0"),
        (cli.number(float, below=1), "1", "must be below 1, not 1"),
        (cli.number(multiple_of=8), "97", "must be a multiple of 8, not 97"),
        (cli.number(), "1.5", "'1.5' is not a whole number"),
        (cli.number(float), "nan", "'nan' is not a number"),
        (cli.number(float), "inf", "'inf' is not a number"),
        (cli.boolean, "yes", "must be True or False, not 'yes'"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(capsys, kind, text, message):
    with pytest.raises(SystemExit) as exit_:
        parse(kind, text)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: argument --option: {message}; --help lists the options\n"


# Commands.


@pytest.mark.parametrize("error, line", [(KeyboardInterrupt(), "interrupted: "), (cli.UserError("no"), "error: no")])
def test_what_ends_a_command_is_said_below_its_progress_bar(error, line, capsys):
    def numbers():
        with tqdm(total=2) as bar:
            yield bar.n

    def main():
        unfinished = numbers()
        next(unfinished)
        raise error

    with pytest.raises(SystemExit):
        cli.run_command(main)
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)
