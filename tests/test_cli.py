"""What all commands share: the types of options, and how errors end a command."""

import pytest
from tqdm import tqdm

from data import cli


def parse(kind, *words):
    parser = cli.CommandParser(prog="command")
    parser.add_argument("--option", **kind if isinstance(kind, dict) else {"type": kind})
    return parser.parse_args(["--option", *words]).option


@pytest.mark.parametrize(
    "kind, words, value",
    [
        (cli.number(), ["-3"], -3),
        (cli.number(at_least=1, at_most=8), ["1"], 1),
        (cli.number(at_least=1, at_most=8), ["8"], 8),
        (cli.number(multiple_of=8), ["96"], 96),
        (cli.number(float, above=0, below=1), ["0.5"], 0.5),
        (cli.SWITCH, [], True),
        (cli.SWITCH, ["True"], True),
        (cli.SWITCH, ["false"], False),
    ],
)
def test_a_good_value_is_taken(kind, words, value):
    parsed = parse(kind, *words)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (cli.number(at_least=1), "0", "must be at least 1, not 0"),
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), cli.UserError("no"), OSError(28, "No space left on device")])
def test_what_ends_a_command_is_said_below_its_progress_bar(error, capsys):
    def numbers():
        with tqdm(total=2) as bar:
            yield bar.n

    def main():
        unfinished = numbers()
        next(unfinished)
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run_command(main)
    printed = capsys.readouterr().err
    if isinstance(error, KeyboardInterrupt):
        assert exit_.value.code == 130
        assert printed.splitlines()[-1] == "interrupted: run the same command again"
    else:  # Python prints the line when it ends
        assert exit_.value.code == f"error: {error}" and printed.endswith("\n")
