"""What the command answers to a name that it does not know, and what its help page names."""

import sys
from pathlib import Path

import pytest

from lightning_pet.cli.main import main

NET = ["--model=user_code.Net", "--data=user_code.Data"]


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-pet"])
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "usage" not in said
    return said.splitlines()


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ([*NET, "--pet+=LoRACalback"], "Did you mean the callback LoRACallback?"),
        ([*NET, "--pet+=lora"], "Did you mean the callback LoRACallback?"),
        ([*NET, "--pet+=diff_pruning"], "Did you mean the callback DiffPruningCallback?"),
        ([*NET, "--pet+=lightning_pet.LoraCallbak"], "Did you mean the callback LoRACallback?"),
        ([*NET, "--trainer.callbacks+=AdapterCalback"], "Did you mean the callback AdapterCallback?"),
        ([*NET, "--pet+=LoRACallback", "--pet.droput=4"], "Did you mean the option 'dropout' of LoRACallback?"),
        (["--model=TextClasifier"], "Did you mean the model TextClassifier?"),
        (["--model=user_code.Net", "--data=Datess"], "Did you mean the data Dates?"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_suggestion_is_the_last_line(arguments: list[str], last: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, *arguments)
    assert lines[-1] == last
    assert lines[-2] == "All options: lightning-pet fit --help"
    assert len(lines) < 20


def test_without_a_near_name_all_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    last = refused(capsys, *NET, "--pet+=Xyz")[-1]
    assert last.startswith("Known are AdaLoRACallback, ")
    assert "VeRACallback, and classes of yours" in last
    assert "OnLayersCallback" not in last  # a base
    assert not refused(capsys, *NET, "--pet+=my_module.Xyz")[-1].startswith("Known")


def test_the_help_page_names_our_modules_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert not end.value.code
    page = capsys.readouterr().out
    assert "\nYour LightningModule, or one of ours:\n" in page
    assert "\nYour LightningDataModule, or one of ours:\n" in page
    page = "".join(page.split())  # names are broken to the width of the page
    for name in (
        *("text_classification.TextClassifier", "seq2seq.Seq2SeqModule", "label_words.LabelWordClassifier"),
        *("text_classification.TextClassificationData", "seq2seq.Seq2SeqData", "docstring_topics.DocstringTopics"),
        *("dates.Dates", "lm_adaptation.LMAdaptationData"),
    ):
        assert name in page, name
