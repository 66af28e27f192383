import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from scalablevit_pl.experiment.adoption import class_arguments
from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.explanation import explain
from scalablevit_pl.models.factory import MODELS
from scalablevit_pl.run_folder import claim_folder

Parse = Callable[..., ParsedExperiment]
QUICKSTART = ("--config", "recipes/quickstart.yaml")


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, work: Path) -> Parse:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is restored after the test
    return lambda *words: ParsedExperiment(Invocation.parse(words).resolve())


def test_later_files_override_earlier_ones_and_options_override_files(parse: Parse, work: Path) -> None:
    (work / "more.yaml").write_text("trainer:\n  max_epochs: 7\ndata:\n  init_args:\n    batch_size: 3\n")
    config = parse("fit", "--data.batch_size=5", *QUICKSTART, "--config", "more.yaml").config
    assert config.trainer.max_epochs == 7
    assert config.data.init_args.batch_size == 5
    assert config.data.init_args.preprocessing.input_size == 28


def test_a_recipe_that_is_not_utf_8_is_named(parse: Parse, work: Path) -> None:
    (work / "more.yaml").write_bytes("# Größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"invalid start byte: save .*quickstart.yaml', 'more.yaml' as UTF-8"):
        parse("fit", *QUICKSTART, "--config", "more.yaml")


def test_sys_argv_is_neither_read_nor_warned_about(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("sys.argv", ["scalablevit", "fit", "--data.batch_size=7"])
    assert parse("fit", *QUICKSTART, "--data.batch_size=3").config.data.init_args.batch_size == 3
    assert not [warning for warning in recwarn if "sys.argv" in str(warning.message)]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_option_lets_a_checkpoint_run_code(command: str, parse: Parse) -> None:
    with pytest.raises(ValueError, match="unknown option --weights_only"):
        parse(command, *QUICKSTART, "--run", "first", "--weights_only=false")


@pytest.mark.parametrize(("command", "known"), [("fit", False), ("validate", False), ("test", True), ("predict", True)])
def test_only_commands_that_report_choose_between_averaged_and_raw_weights(
    command: str, known: bool, parse: Parse
) -> None:
    words = (command, *QUICKSTART, "--run=first", "--average=none")
    if known:
        assert parse(*words).config.average == "none"
    else:
        with pytest.raises(ValueError, match="unknown option --average"):
            parse(*words)


def test_parsing_builds_nothing_and_makes_no_folder(parse: Parse, work: Path) -> None:
    parsed = parse("fit", *QUICKSTART, "--run=new")
    assert not hasattr(parsed, "trainer")
    assert not (work / "runs/new").exists()


def test_parts_are_built_even_if_another_one_cannot(parse: Parse) -> None:
    parsed = parse("fit", *QUICKSTART, "--run=new", "--model.network.name=scalablevit_x")
    built, faults = parsed.build_parts()
    assert list(built) == ["data"]
    assert "scalablevit_x" in str(faults["model"])
    assert isinstance(parsed.build_trainer(), pl.Trainer)


TIMM = ("--model.network=timm.create_model", "--model.network.model_name=resnet10t")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--model.network.checkpoint_path=nope.pth"],
            "timm.create_model(model_name='resnet10t', pretrained=False, checkpoint_path='nope.pth') failed with "
            "FileNotFoundError: check its arguments, or see --traceback",
        ),
        (
            ["--model.network.model_name=resnet99"],
            "timm.create_model(model_name='resnet99', pretrained=False) failed with RuntimeError: Unknown model "
            "(resnet99): check its arguments, or see --traceback",
        ),
    ],
)
def test_an_error_of_another_package_s_constructor_is_one_sentence(
    words: list[str], sentence: str, parse: Parse
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$") as error:
        parse("fit", *QUICKSTART, "--run=new", *TIMM, *words).build("model")
    assert explain(error.value) == sentence


def test_a_bug_of_the_package_keeps_its_traceback(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**arguments: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setitem(MODELS, "scalablevit_nano", (fail, "linear"))
    with pytest.raises(Exception, match="a bug") as error:
        parse("fit", *QUICKSTART, "--run=new").build("model")
    assert explain(error.value) is None


BATCHES = [*(f"limit_{part}_batches" for part in ("train", "val", "test", "predict")), "overfit_batches"]


@pytest.mark.parametrize("texts", [("1", "1.0", "0"), ("1.0", "0.5", "1")])
@pytest.mark.parametrize("in_file", [False, True])
def test_counts_of_batches_stay_integers_and_shares_stay_fractions(
    texts: tuple[str, ...], in_file: bool, parse: Parse, work: Path
) -> None:
    given = dict(zip([*BATCHES, "val_check_interval"], texts * 2, strict=True))
    (work / "limits.yaml").write_text("trainer:\n" + "".join(f"  {name}: {text}\n" for name, text in given.items()))
    options = [f"--trainer.{name}={text}" for name, text in given.items()]
    parsed = parse("fit", *QUICKSTART, *(("--config", "limits.yaml") if in_file else options))
    claim_folder(work / "runs" / "saved", parsed.record(), resume=True)
    for config in (parsed.config, parse("fit", "--run", "saved").config):
        assert {name: str(config.trainer[name]) for name in given} == given


BUILD = "--model.network.class_path=scalablevit_pl.models.build_classifier"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--model.network.num_classes=3"], "--model.network.num_classes"),
        ([*TIMM], "--model.network.dict_kwargs.num_classes"),
        ([BUILD, "--model.network.config={num_classes: 3}"], "--model.network.config.num_classes"),
    ],
)
def test_the_option_of_the_number_of_classes_depends_on_what_builds_the_network(
    words: list[str], option: str, parse: Parse
) -> None:
    parsed = parse("fit", *QUICKSTART, *words)
    assert parsed.classes_option == option
    assert parsed.classes_open == (words == [*TIMM])
    again = parse("fit", *QUICKSTART, *words, f"{option}=4")
    again.set_classes(7)
    assert class_arguments(again.config)[0]["num_classes"] == 4


def test_an_open_number_of_classes_is_set_after_something_was_built(parse: Parse) -> None:
    parsed = parse("fit", *QUICKSTART)
    parsed.build("data")
    parsed.set_classes(7)
    assert parsed.record()["model"]["init_args"]["network"]["init_args"]["num_classes"] == 7
    assert parsed.build("model").model.num_classes == 7
