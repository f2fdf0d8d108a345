"""Every shipped configuration parses as the command line parses it, and the wheel holds them all."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lightning_pet.cli.lightning_cli import default_config, run
from lightning_pet.recipes import config_folder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TASKS = sorted(CONFIGS.glob("*.yaml"))
PARTS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in TASKS)


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-pet"])  # LightningCLI warns of other arguments than its own


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    with pytest.raises(SystemExit) as end:
        run(["fit", *argv, "--print_config"])
    assert not end.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "-c", str(path))
    assert config["model"]["class_path"].startswith("lightning_pet.modules.")
    assert config["data"]["class_path"].startswith("lightning_pet.data.")
    methods = [method["class_path"] for method in config["pet"] or []]
    # Language-model adaptation makes a base: the whole model trains.
    assert methods == ([] if path.stem == "lm_adaptation" else ["lightning_pet.LoRACallback"])
    assert config["trainer"]["max_epochs"] > 0


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_part_parses_on_top_of_a_task(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = printed(capsys, "-c", str(CONFIGS / "docstring_topics.yaml"), "-c", str(path))
    for key, value in part.get("trainer", {}).items():
        given = config["trainer"][key]
        if isinstance(value, dict):
            assert given["class_path"] == value["class_path"]
            given, value = given["init_args"], value["init_args"]
            given = {name: given[name] for name in value}
        assert given == value
    for method, given in zip(part.get("pet", []), config["pet"], strict="pet" in part):
        assert method["init_args"].items() <= given["init_args"].items()


@pytest.mark.parametrize("path", [*TASKS, *PARTS], ids=lambda path: path.stem)
def test_a_configuration_opens_with_its_command(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert (
        f"lightning-pet fit -c configs/{path.relative_to(CONFIGS)}" in head
        or f"-c configs/{path.relative_to(CONFIGS)}" in head
    )


def test_a_method_file_shows_the_defaults_of_its_callback() -> None:
    """What a file leaves at its default it must not contradict when the default changes."""
    from lightning_pet.insertion.method import METHODS

    for path in sorted((CONFIGS / "method").glob("*.yaml")):
        if path.stem not in METHODS:
            continue  # a combination: what it changes is its point
        (method,) = yaml.safe_load(path.read_text(encoding="utf-8"))["pet"]
        shown = method["init_args"]
        if path.stem == "trainable_tokens":  # which tokens has to be said
            assert shown.pop("token_indices")
        defaults = METHODS[path.stem]().config()
        assert {option: defaults[option] for option in shown} == shown, path


def test_the_default_configuration_exists() -> None:
    assert config_folder().is_dir()
    assert default_config().is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_code_and_configurations_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"lightning_pet/configs/{path.relative_to(CONFIGS).as_posix()}" for path in [*TASKS, *PARTS]}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_pet").rglob("*.py")}
    assert shipped | modules | {"lightning_pet/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_pet"}


def test_an_installed_wheel_finds_its_configurations(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lightning_pet.cli.lightning_cli import default_config\n"
        "from lightning_pet.recipes import config_folder\n"
        "assert default_config().is_file()\n"
        "print(config_folder())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == tmp_path / "lightning_pet" / "configs"
