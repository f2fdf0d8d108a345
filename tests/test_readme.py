"""What the README tells a new user to type works: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_pet.cli.lightning_cli import default_config, run
from lightning_pet.cli.main import extract, init, inspect, list_configurations, merge

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FILE_VERBS = {"inspect": inspect, "extract": extract, "merge": merge, "list": list_configurations, "init": init}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What the README calls the user's own.
MY_MODULE = """
import lightning as L, torch
class MyModule(L.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = torch.nn.Linear(width, 2)
class MyData(L.LightningDataModule):
    pass
"""


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands(start: str) -> list[list[str]]:
    lines = [
        line
        for path in PAGES
        for block in blocks("bash", path.read_text(encoding="utf-8"))
        for line in block.replace("\\\n", " ").splitlines()
    ]
    found = [shlex.split(line, comments=True) for line in dict.fromkeys(lines)]
    return [words for words in found if words[: len(start.split())] == start.split()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a user has it: an own module, and the configurations."""
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my.yaml").write_text("trainer:\n  max_epochs: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-pet"])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    return tmp_path


# -- the two commands that .ci/run takes from here --------------------------------------------------


def marked(name: str) -> str:
    (command,) = re.findall(rf"^<!-- command: {name} -->\n```bash\n(.*)\n```$", TEXT, flags=re.M)
    return command


def test_the_main_command_is_one_line_that_installs_and_trains() -> None:
    make, install, train = marked("main").split(" && ")
    assert make == "python3 -m venv .venv"
    assert install == '.venv/bin/pip install -c constraints.txt ".[quickstart]"'
    assert train == ".venv/bin/lightning-pet fit"


def test_the_test_command_is_one_line_that_installs_and_tests() -> None:
    make, install, test = marked("tests").split(" && ")
    assert make == "python3 -m venv .venv-test"
    assert install == '.venv-test/bin/pip install -c constraints.txt -e ".[test]"'
    assert test == ".venv-test/bin/python -m pytest"


def test_what_the_commands_name_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"quickstart", "test"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"lightning-pet": "lightning_pet.cli.main:main"}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins if not pin.startswith("#"))


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {_plain(name) for name in re.findall(r"^([\w.-]+)==", pins, flags=re.M)}
    names = {_plain(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted}
    assert names - {"lightning-pet"} <= pinned


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ci_takes_the_commands_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
    function = re.search(r"^readme_command\(\) \{.*?^\}", script, flags=re.M | re.S)[0]
    for name in ("main", "tests"):
        done = subprocess.run(
            ["bash", "-c", f"{function}\nreadme_command {name}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout == marked(name) + "\n"
        assert f"run_readme {name}" in script


# -- commands, in the README and in the documentation -----------------------------------------------


@pytest.mark.parametrize(
    "words", [w for verb in ("fit", "validate", "test") for w in commands(f"lightning-pet {verb}")], ids=" ".join
)
@pytest.mark.usefixtures("workplace")
def test_a_trainer_command_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if not {"-c", "--config"} & set(words) and not any(word.startswith("--model") for word in words):
        words = [*words[:2], "-c", str(default_config()), *words[2:]]  # as run() does, except to print
    with pytest.raises(SystemExit) as end:
        run([*words[1:], "--print_config"])
    assert not end.value.code
    assert "trainer:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [w for verb in FILE_VERBS for w in commands(f"lightning-pet {verb}")], ids=" ".join)
def test_a_file_command_parses(words: list[str]) -> None:
    parser = jsonargparse.capture_parser(lambda: jsonargparse.auto_cli(FILE_VERBS, args=[]))
    parsed = parser.parse_args(words[1:])
    assert parsed.subcommand == words[1]


@pytest.mark.parametrize("words", commands("python my_cli.py"), ids=" ".join)
@pytest.mark.usefixtures("workplace")
def test_another_lightning_cli_takes_the_callback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    class Module(pl.LightningModule):
        pass

    with pytest.raises(SystemExit) as end:
        LightningCLI(Module, pl.LightningDataModule, args=[*words[2:], "--print_config"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert "class_path: lightning_pet.LoRACallback" in out
    assert re.search(r"\br: 8\b", out)


def test_there_is_something_to_parse() -> None:
    assert len(commands("lightning-pet fit")) >= 4
    assert len(commands("python my_cli.py")) >= 2
    assert len(commands("lightning-pet merge")) >= 1


# -- Python -----------------------------------------------------------------------------------------


class MyModule(pl.LightningModule):
    """The user's module in the README: a tiny BERT with fixed weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        self.model: nn.Module = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch[:, 0] % 2).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class MyData(pl.LightningDataModule):
    """Sixteen rows of five tokens."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randint(32, (16, 5), generator=torch.Generator().manual_seed(0)), batch_size=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("workplace")
def test_the_python_of_the_readme_runs_from_top_to_bottom() -> None:
    known = {"MyModule": MyModule, "datamodule": MyData(), "model": MyModule().model, "__name__": "readme"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, Python block {number + 1}", "exec"), known)
        known["checkpoint"] = known["trainer"].checkpoint_callback.best_model_path
    base = {name: tensor for name, tensor in MyModule().state_dict().items()}
    merged = known["module"].state_dict()
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_yaml_and_python_blocks_are_well_formed(path: Path) -> None:
    import yaml

    text = path.read_text(encoding="utf-8")
    for block in blocks("python", text):
        compile(block, path.name, "exec")
    for block in blocks("yaml", text):
        assert yaml.safe_load(block)


# -- links ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
