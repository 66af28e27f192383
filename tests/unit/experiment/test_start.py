from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from scalablevit_pl.experiment.invocation import Invocation
from scalablevit_pl.experiment.parsing import ParsedExperiment
from scalablevit_pl.experiment.start import StartingPoint, find_start
from scalablevit_pl.models import create_model

Start = Callable[..., tuple[ParsedExperiment, StartingPoint]]
QUICKSTART = ("--config", "recipes/quickstart.yaml")


@pytest.fixture
def start(work: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Parse a command of the run `first`, and find what it starts from."""
    monkeypatch.setattr(ParsedExperiment, "_set_seed", lambda parsed: None)

    def started(command: str, *options: str) -> tuple[ParsedExperiment, StartingPoint]:
        recipe = () if "-c" in options else QUICKSTART
        parsed = ParsedExperiment(Invocation.parse([command, "--run=first", *recipe, *options]).resolve())
        return parsed, find_start(parsed)

    return started


def save(name: str, step: int, **more: object) -> Path:
    path = Path(f"runs/first/checkpoints/{name}.ckpt")
    torch.save({"scalablevit_pl": {"schema": 1}, "state_dict": {}, "global_step": step, **more}, path)
    return path


def test_a_fit_starts_from_nothing_unless_told_otherwise(start: Start) -> None:
    save("last", 3)
    parsed, started = start("fit")
    assert parsed.config.ckpt_path is None
    assert started == StartingPoint()


@pytest.mark.parametrize(("command", "name"), [("validate", "best"), ("test", "best"), ("predict", "best")])
def test_an_evaluation_uses_the_best_checkpoint_of_its_run(command: str, name: str, start: Start) -> None:
    save("last", 4)
    path = save(name, 3)
    parsed, started = start(command)
    assert (parsed.config.ckpt_path, started.step) == (str(path), 3)


@pytest.mark.parametrize("option", ["last", "best", "runs/first/checkpoints/other.ckpt"])
def test_a_checkpoint_is_named_or_given_as_a_file(option: str, start: Start) -> None:
    path = save(Path(option).stem, 5)
    parsed, started = start("fit", "--resume", option)
    assert (parsed.config.ckpt_path, started.step, started.record) == (str(path), 5, {"schema": 1})


def test_auto_resumes_from_the_newest_intact_checkpoint(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    Path("runs/first/checkpoints/last.ckpt").unlink()
    parsed, started = start("fit", "--resume", "auto")
    assert (parsed.config.ckpt_path, started) == (None, StartingPoint(restarts=True))
    paths = [save(f"step={step}", step) for step in (1, 2, 3)]
    paths[2].write_bytes(b"no checkpoint")
    parsed, started = start("fit", "--resume", "auto")
    assert (parsed.config.ckpt_path, started.step, started.restarts) == (str(paths[1]), 2, False)
    assert "step=3.ckpt' as a checkpoint" in caplog.text
    for path in paths:
        path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints in .* can be read: choose another name"):
        start("fit", "--resume", "auto")
    with pytest.raises(ValueError, match="--ckpt_path auto resumes a fit: give best, last or a file"):
        start("validate", "--ckpt_path", "auto")


def test_averaged_weights_must_be_in_the_checkpoint(start: Start) -> None:
    save("best", 3)
    with pytest.raises(ValueError, match=r"best.ckpt' has no averaged weights: use the raw ones with --average none"):
        start("test", "--average", "ema")
    save("best", 3, ema_state_dict={})
    assert start("test", "--average", "ema")[1].step == 3


def test_weights_bring_their_network_and_preprocessing(start: Start) -> None:
    Path("runs/first/checkpoints/last.ckpt").unlink()
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    before = torch.get_rng_state()
    parsed, started = start("fit", "-c", "recipes/finetune.yaml", "--weights", "model", "--resume", "auto")
    assert started.weights is not None
    assert started.restarts
    assert torch.equal(torch.get_rng_state(), before)  # the network is initialized as without --weights
    assert parsed.config.model.init_args.network.init_args.config["name"] == "scalablevit_nano"
    assert parsed.config.data.init_args.preprocessing.input_size == started.weights.preprocessing.input_size
    with pytest.raises(ValueError, match="starts from weights: name them with --weights FOLDER or --weights OWNER/"):
        start("fit", "-c", "recipes/finetune.yaml")


def test_an_option_for_the_preprocessing_is_told_apart_from_its_defaults(start: Start) -> None:
    create_model("scalablevit_nano", num_classes=10).save_pretrained("model")
    options = ("--weights", "model", "--data.preprocessing.input_size=32")
    parsed, _ = start("fit", "-c", "recipes/finetune.yaml", *options)
    assert parsed.config.data.init_args.preprocessing.input_size == 32
    with pytest.raises(ValueError, match=r"trained on other images: preprocessing.crop_pct|preprocessing.mean"):
        start("fit", "-c", "recipes/finetune.yaml", *options, "--data.preprocessing.mean=[0, 0, 0]")


def test_a_checkpoint_of_another_run_does_not_continue_the_folder(tmp_path: Path) -> None:
    start = StartingPoint({"schema": 1}, 3)
    assert start.continues(tmp_path / "a", str(tmp_path / "a/checkpoints/last.ckpt"))
    assert not start.continues(tmp_path / "a", str(tmp_path / "b/checkpoints/last.ckpt"))
    assert not StartingPoint().continues(tmp_path / "a", None)
    assert StartingPoint(restarts=True).continues(tmp_path / "a", None)


def test_the_configuration_found_is_plain(start: Start) -> None:
    parsed, _ = start("fit")
    record = parsed.record()
    assert yaml.safe_load(yaml.safe_dump(record)) == record
    assert (record["run"], record["data"]["init_args"]["preprocessing"]["input_size"]) == ("first", 28)
    assert not {"config", "ckpt_path"} & set(record)
