import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from scalablevit_pl.experiment.invocation import CONFIG_FOLDERS, Invocation, find_config
from scalablevit_pl.models import create_model
from scalablevit_pl.run_folder import run_folder
from scalablevit_pl.weights.source import load_weights

QUICKSTART = "recipes/quickstart.yaml"
LINES = [
    "fit",
    "fit --config a.yaml --run=first --resume auto --data.batch_size 3 --config=b.yaml --model.lr=1",
    "fit --config= --run= --weights= --ckpt_path= --x=",
    "fit --run=--odd --weights=-w --config=-c",
    "test --weights null --run first --average ema",
    "predict -c=a.yaml --run=x=y stray --data.dataset=photo=s --model.lr -0.5 --data.mean -1,2 [1,2]",
]


def resolve(*words: str) -> Invocation:
    return Invocation.parse(words).resolve()


@pytest.mark.parametrize("line", LINES)
def test_rendered_words_parse_to_the_same_invocation(line: str) -> None:
    invocation = Invocation.parse(line.split())
    assert Invocation.parse(invocation.render()) == invocation


@pytest.mark.parametrize(
    "line",
    [
        f"fit -c {QUICKSTART} --config debug/overfit.yaml --trainer.max_epochs=3",
        "fit --run first --resume last",
        "fit --run first --resume auto --weights w --model.network.num_classes 3 --config recipes/finetune.yaml",
        "fit --ckpt_path runs/first/checkpoints/last.ckpt",
        "fit --run x --help-all",
        "fit --data.help some.Class",
        "fit --print_config",
        "validate --run first",
        "test --run first --ckpt_path last",
        f"test --config {QUICKSTART} --weights w --run elsewhere",
        "predict --run ./runs/first --data.batch_size=2",
    ],
)
def test_a_child_process_resolves_the_rendered_words_to_the_same_invocation(line: str, work: Path) -> None:
    (work / "w").mkdir()
    resolved = resolve(*line.split())
    assert Invocation.parse(resolved.render()).resolve() == resolved


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--config a.yaml", Invocation("fit", ("a.yaml",))),
        ("-c a.yaml -c=b.yaml", Invocation("fit", ("a.yaml", "b.yaml"))),
        ("--resume=last", Invocation("fit", resume="last")),
        ("--resume last", Invocation("fit", resume="last")),
        ("--ckpt_path=best", Invocation("fit", resume="best")),
        ("--run a --x --run b", Invocation("fit", run="b", rest=("--x",))),
        ("--runs=x run", Invocation("fit", rest=("--runs=x", "run"))),
        ("--data.batch_size=3 --model.lr 1", Invocation("fit", rest=("--data.batch_size=3", "--model.lr", "1"))),
        ("--weights w --x=1", Invocation("fit", weights="w", rest=("--x=1",))),
        ("", Invocation("fit")),
    ],
)
def test_options_and_their_synonyms_are_parsed(options: str, expected: Invocation) -> None:
    assert Invocation.parse(["fit", *options.split()]) == expected


@pytest.mark.parametrize(
    "options",
    [
        ["--config"],
        ["-c", "--run", "first"],
        ["--config", "--data.batch_size=2"],
        ["--run"],
        ["--resume", "--run", "x"],
    ],
)
def test_an_option_without_its_value_is_named(options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"-(c/--config|-run|-ckpt_path/--resume) has no value: write one after it"):
        Invocation.parse(["fit", *options])


def test_options_override_configuration_files_wherever_they_stand(work: Path) -> None:
    words = resolve("fit", "--run=new", "--data.batch_size=2", "-c", QUICKSTART).render()
    assert words == ["fit", f"--config={find_config(QUICKSTART)}", "--run=new", "--data.batch_size=2"]


def test_a_new_run_is_named_after_its_first_recipe(work: Path) -> None:
    assert resolve("fit", "-c", QUICKSTART, "-c", "debug/overfit.yaml").run == "quickstart-20260102-030405"
    assert resolve("fit", "--data=a.Class").run == "run-20260102-030405"
    assert resolve("fit", "--data=a.Class").automatic
    assert not resolve("fit", "--data=a.Class", "--run=new").automatic


def test_processes_started_together_need_a_name_for_the_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "2")
            with pytest.raises(ValueError, match="several processes need a common name for the run: give it with"):
                resolve("fit", "-c", QUICKSTART)
            assert resolve("fit", "-c", QUICKSTART, "--run=first").run == "first"


def test_a_resumed_run_uses_its_own_configuration(work: Path) -> None:
    resolved = resolve("fit", "--run", "first", "--resume", "last", "--trainer.max_epochs=2")
    own = "runs/first/config.yaml"
    assert resolved == Invocation("fit", (own,), "first", None, "last", ("--trainer.max_epochs=2",))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_uses_the_configuration_of_its_run(command: str, work: Path) -> None:
    assert resolve(command, "--run", "first").configs == ("runs/first/config.yaml",)
    assert resolve(command, "--run", "runs/first", "--config", QUICKSTART).configs == (str(find_config(QUICKSTART)),)
    for options in ([], ["--weights=null"]):
        with pytest.raises(ValueError, match="no run in 'runs/frist': runs/ has first"):
            resolve(command, "--run", "frist", "--config", QUICKSTART, *options)


def test_an_evaluation_ignores_the_weights_its_run_started_from(work: Path) -> None:
    assert resolve("test", "--run", "first").weights == "null"
    assert resolve("fit", "--run", "first", "--resume", "last").weights is None


def test_weights_are_evaluated_without_a_run(work: Path) -> None:
    (work / "w").mkdir()
    resolved = resolve("test", "-c", QUICKSTART, "--weights=w", "--run=new")
    assert (resolved.run, resolved.weights) == ("new", "w")


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("folder", ["", "runs/first/checkpoints"])
def test_a_checkpoint_of_a_run_names_the_run(
    command: str, folder: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work / folder)
    path = "runs/first/checkpoints/last.ckpt" if not folder else "last.ckpt"
    resolved = resolve(command, "--ckpt_path", path)
    assert resolved.run == str(work / "runs/first")
    assert resolved.configs == (str(work / "runs/first/config.yaml"),)


@pytest.mark.parametrize("path", ["last", "somewhere/checkpoints/last.ckpt", "runs/first/last.ckpt"])
def test_a_checkpoint_elsewhere_names_no_run(path: str, work: Path) -> None:
    assert resolve("fit", "-c", QUICKSTART, "--ckpt_path", path).run == "quickstart-20260102-030405"


@pytest.mark.parametrize(("command", "remedy"), [("fit", "--config recipes/"), ("validate", "--run")])
def test_a_command_with_nothing_to_start_from_names_what_it_needs(command: str, remedy: str, work: Path) -> None:
    for options in ([], ["--data.dataset", "photos", "--model.lr=1"]):
        with pytest.raises(ValueError, match=f"nothing to start from: give a .*{remedy}"):
            resolve(command, *options)
    with pytest.raises(ValueError, match="give a recipe with --config"):
        resolve("validate", "--weights", "runs/first")
    assert resolve("fit", "--data=a.Class").rest == ("--data=a.Class",)


def test_help_needs_neither_recipe_nor_run(work: Path) -> None:
    assert resolve("fit", "--run", "missing", "--help-all").render() == ["fit", "--help"]
    for options in (["--data.help", "some.Class"], ["--model.help=some.Class"]):
        assert resolve("fit", *options).render() == ["fit", *options]


def test_a_path_is_not_mistaken_for_a_run_below_runs(work: Path) -> None:
    (work / "model").mkdir()
    (work / "model" / "config.yaml").write_text("seed_everything: 1\n")
    resolved = resolve("test", "--run", "./model")
    assert run_folder(resolved.run or "").resolve() == work / "model"
    assert resolved.configs == ("model/config.yaml",)


def test_the_command_that_started_a_run_from_weights_also_resumes_it(work: Path) -> None:
    (work / "w").mkdir()
    words = ["fit", "-c", QUICKSTART, "--weights=w", "--run", "x", "--resume", "auto", "--data.batch_size", "8"]
    words += ["--model.network.num_classes", "5", "--model.network.drop_path_rate=0.1", "--model.label_smoothing=0.2"]
    started = resolve(*words)
    assert (started.weights, started.configs) == ("w", (str(find_config(QUICKSTART)),))
    assert started.rest == tuple(words[8:])
    (work / "runs/x/checkpoints").mkdir(parents=True)
    (work / "runs/x/config.yaml").touch()
    assert resolve(*words) == started  # there is no checkpoint yet
    (work / "runs/x/checkpoints/step=3.ckpt").touch()
    rest = ("--data.batch_size", "8", "--model.label_smoothing=0.2")
    assert resolve(*words) == Invocation("fit", ("runs/x/config.yaml",), "x", None, "auto", rest)
    with pytest.raises(ValueError, match="--weights starts a run, and --resume or --ckpt_path continues one"):
        resolve(*words, "--resume", "last")


def test_configurations_are_searched_in_the_working_folder_first(work: Path) -> None:
    assert find_config(QUICKSTART).samefile(CONFIG_FOLDERS[-1] / QUICKSTART)
    Path("recipes").mkdir()
    Path(QUICKSTART).write_text("mine")
    assert find_config(QUICKSTART) == Path(QUICKSTART)
    assert find_config(str(work / QUICKSTART)) == work / QUICKSTART


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recipes/quikstart.yaml", "did you mean recipes/quickstart.yaml"),
        ("quickstart", "did you mean recipes/quickstart.yaml"),
        ("recipes", "did you mean recipes/|the package has .*recipes/quickstart.yaml"),
        ("???", "the package has recipes/.*, recipes/quickstart.yaml"),
    ],
)
def test_an_unknown_configuration_gets_a_hint(name: str, hint: str, work: Path) -> None:
    with pytest.raises(ValueError, match=f"no configuration '{re.escape(name)}' here or .*: ({hint})"):
        find_config(name)


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, scalablevit_pl.experiment.invocation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


@pytest.fixture
def hub(hub_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield hub


def test_weights_on_the_hub_are_resolved_to_a_commit_once(hub: HubServer, work: Path) -> None:
    create_model("scalablevit_nano", num_classes=3).save_pretrained("model")
    hub.add_repo("ada/vit")
    commit = hub.commit("ada/vit", {path.name: path.read_bytes() for path in Path("model").iterdir()})
    started = resolve("fit", "-c", "recipes/finetune.yaml", "--weights", "ada/vit", "--run", "new")
    assert started.weights == f"ada/vit@{commit}"
    asked = len(hub.requests)
    assert len([path for _, path in hub.requests if path.startswith("/api/models/ada/vit")]) == 1
    hub.commit("ada/vit", {"README.md": b"moved on"})
    child = Invocation.parse(started.render()).resolve()
    assert child == started
    load_weights(str(child.weights))
    assert len(hub.requests) == asked  # neither a child process nor the loading asks again
