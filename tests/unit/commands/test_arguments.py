"""Options of the commands."""

from pathlib import Path

import pytest

from scalablevit_pl.commands.arguments import OptionParser, check_output


@pytest.fixture
def parser() -> OptionParser:
    parser = OptionParser("try")
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--accelerator", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--force", action="store_true")
    return parser


@pytest.mark.parametrize(
    "options",
    [
        ["a", "b", "--weights", "w", "--batch_size", "4", "--force"],
        ["--batch_size=4", "a", "--force", "--weights=w", "b"],
        ["--force", "--weights", "w", "a", "b", "--batch_size", "4"],
    ],
    ids=" ".join,
)
def test_options_and_operands_are_parsed_in_any_order(parser: OptionParser, options: list[str]) -> None:
    read = parser.read(options)
    assert (read.paths, read.weights, read.batch_size, read.force) == ([Path("a"), Path("b")], "w", 4, True)
    assert read.accelerator == "auto"


@pytest.mark.parametrize("before", [["a"], []])
def test_two_dashes_end_the_options(parser: OptionParser, before: list[str]) -> None:
    read = parser.read([*before, "--weights", "w", "--", "-x.png", "--force", "--", "b"])
    assert (read.weights, read.force) == ("w", False)
    assert read.paths == [Path(name) for name in (*before, "-x.png", "--force", "--", "b")]


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--weigths", "--weights"),
        ("--weigths=w", "--weights"),
        ("--batch-size", "--batch_size"),
        ("--weight", "--weights"),  # no abbreviations
        ("-f", "--force"),
        ("--help", "--weights"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(parser: OptionParser, option: str, meant: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^unknown option {name}: did you mean --") as caught:
        parser.read(["a", option, "4"])
    if name != "--help":
        assert str(caught.value).endswith(f"{meant}?")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["a"], "--weights"),
        (["--weights"], "--weights"),
        (["--weights", "w", "--batch_size", "many"], "--batch_size"),
        (["--weights", "w", "--accelerator", "tpu"], "--accelerator"),
        (["--weights", "w", "--force=1"], "--force"),
    ],
    ids=str,
)
def test_an_invalid_value_is_one_sentence_that_refers_to_help(
    parser: OptionParser, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        parser.read(options)
    (sentence,) = str(caught.value).splitlines()
    assert sentence.endswith(": see scalablevit try --help")
    assert capsys.readouterr() == ("", "")


def test_negative_numbers_are_values_not_options(parser: OptionParser) -> None:
    assert parser.read(["a", "--weights", "w", "--batch_size", "-1"]).batch_size == -1
    assert parser.read(["a", "--weights", "-1,8"]).weights == "-1,8"
    assert parser.read(["-1", "--weights", "w"]).paths == [Path("-1")]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    check_output("--json", Path("folder/x.json"))
    check_output("--json", Path("x.json"))
    for name in ("", "/", "..", "folder", "nowhere/x.json"):
        with pytest.raises(ValueError, match=r"^--json '.*' must be the name of a file in a folder that exists and"):
            check_output("--json", Path(name))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(ValueError, match=r"^--plot 'x.png' must be .* and is writable$"):
        check_output("--plot", Path("x.png"))
