"""The shipped configurations by name, from any folder; and complete ones put together from them."""

import sys
from pathlib import Path

import pytest
import yaml

from lightning_pet.cli.lightning_cli import or_default, run
from lightning_pet.cli.main import init, list_configurations, main
from lightning_pet.errors import ArgumentError
from lightning_pet.recipes import GROUPS, config_folder, names, with_shipped

EVERY = [name for group in GROUPS for name in names(group)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's, without our configurations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-pet"])
    Path("reviews.csv").write_text("review,label\ngood,pos\nbad,neg\n", encoding="utf-8")
    Path("pairs.jsonl").write_text('{"source": "a", "target": "b"}\n', encoding="utf-8")


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "configs/{}.yaml"])
def test_shipped_configurations_are_found_from_any_folder(form: str) -> None:
    assert "method/lora" in EVERY
    for name in EVERY:
        given, file = form.format(name), str(config_folder() / f"{name}.yaml")
        assert Path(file).is_file()
        assert with_shipped(["-c", given, f"--config={given}", "--config", given]) == [
            *("-c", file),
            f"--config={file}",
            *("--config", file),
        ]


def test_a_file_of_the_users_comes_first_and_other_arguments_stay() -> None:
    Path("method").mkdir()
    Path("method/lora").write_text("{}")
    arguments = ["-c", "method/lora", "--data.train=method/adapter", "-c", "{trainer: {max_epochs: 1}}"]
    assert or_default(arguments) == arguments


@pytest.mark.parametrize(
    ("given", "hint"),
    [("lora", "method/lora"), ("method/lorra", "method/lora"), ("configs/date.yaml", "dates"), ("my.yaml", "")],
)
def test_a_configuration_that_does_not_exist_is_refused(given: str, hint: str) -> None:
    for verb in (["fit"], ["plan"], ["intrinsic-dimension"]):
        with pytest.raises(SystemExit) as end:
            main([*verb, "-c", given])
        said = str(end.value.code)
        assert said.startswith(f"lightning-pet {verb[0]}: ArgumentError: -c {given}: there is no such file here")
        assert said.endswith(f"Did you mean {hint}?" if hint else "'lightning-pet list' shows those.")


def test_the_list_names_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    list_configurations()
    lines = capsys.readouterr().out.splitlines()
    shown = {words[0]: " ".join(words[1:]) for line in lines if line.startswith("  ") and (words := line.split())}
    assert set(shown) == set(EVERY)
    assert all(shown.values())
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("task", names(""))
@pytest.mark.parametrize("method", [None, *(name.removeprefix("method/") for name in names("method"))])
def test_a_complete_configuration_is_written(task: str, method: str | None) -> None:
    data = {"text_classification": "reviews.csv", "label_words": "reviews.csv", "seq2seq": "pairs.jsonl"}.get(task)
    if task == "conversations":
        line = '{"messages": [{"role": "assistant", "content": "Hi"}]}'
        Path(data := "chats.jsonl").write_text(line, encoding="utf-8")
    if task in ("lm_adaptation", "text"):
        Path(data := "texts.txt").write_text("one text\nanother\n", encoding="utf-8")
    init(task, method, data, {"text": "review"} if data == "reviews.csv" else None, "my.yaml")
    written = yaml.safe_load(Path("my.yaml").read_text(encoding="utf-8"))
    shipped = yaml.safe_load((config_folder() / f"{task}.yaml").read_text(encoding="utf-8"))
    assert written["trainer"] == shipped["trainer"]
    assert written["model"]["class_path"] == shipped["model"]["class_path"]
    if method is None:
        assert written.get("pet") == shipped.get("pet")
        assert written["model"] == shipped["model"]
    else:
        part = yaml.safe_load((config_folder() / "method" / f"{method}.yaml").read_text(encoding="utf-8"))
        assert written["pet"] == part["pet"]
    if data is None:
        assert written["data"] == shipped["data"]
    else:
        assert written["data"]["init_args"]["train"] == data
    if data == "reviews.csv":
        assert written["data"]["init_args"]["columns"] == {"text": "review", "label": "label"}


def test_what_was_written_is_what_fit_reads(capsys: pytest.CaptureFixture[str]) -> None:
    init("text_classification", "prompt_tuning", "reviews.csv", {"text": "review"})
    assert capsys.readouterr().out.endswith("lightning-pet fit -c run.yaml\n")
    with pytest.raises(SystemExit) as end:
        run(["fit", "-c", "run.yaml", "-c", "trainer/cpu", "--print_config"])
    assert not end.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    assert [method["class_path"] for method in config["pet"]] == ["lightning_pet.PromptTuningCallback"]
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.05  # the rate of the method's own command
    assert config["trainer"]["accelerator"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("text_clasification", None, "reviews.csv"),
            "there is no task .*mean text_classification\\?",
        ),
        (("text_classification", "lorra", "reviews.csv"), "there is no method 'lorra'; .* Did you mean method/lora\\?"),
        (("text_classification",), "give --data"),
        (("text_classification", "lora", "nothing.csv"), "there is no file .*nothing.csv"),
        (
            ("text_classification", "lora", "reviews.csv"),
            "no column 'text'; it has review, label.*--columns.text=NAME",
        ),
        (("seq2seq", "lora", "pairs.jsonl", {"text": "a"}), "seq2seq has no text; it reads source, target"),
        (
            ("dates", "lora", "reviews.csv"),
            "dates brings its own data; .* with .*text_classification",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_written(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        init(*arguments)
    assert not Path("run.yaml").exists()


def test_nothing_is_written_over() -> None:
    Path("run.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"run\.yaml exists already"):
        init("dates")
    assert Path("run.yaml").read_text() == "mine"


def test_the_verbs_are_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    overview = capsys.readouterr().out
    assert "list " in overview
    assert "init " in overview
    main(["init", "text_classification", "--method=adapter", "--data=reviews.csv", "--columns.text=review"])
    assert "AdapterCallback" in Path("run.yaml").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match=r"lightning-pet init: run\.yaml exists already"):
        main(["init", "dates"])


def test_an_error_of_ours_is_raised() -> None:
    with pytest.raises(ArgumentError, match="no shipped configuration"):
        with_shipped(["-c", "nothing"])
