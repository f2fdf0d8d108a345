"""The documentation builds without a warning, and every example in it gives what it says."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "lightning_pet").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("page", [p for p in PAGES if ">>>" in p.read_text(encoding="utf-8")], ids=lambda p: p.stem)
def test_examples_in_pages(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # The fence that closes a block would count as its last example's output.
    text = re.sub(r"^```.*$", "", page.read_text(encoding="utf-8"), flags=re.M)
    test = doctest.DocTestParser().get_doctest(text, {"__name__": page.stem}, page.name, str(page), 0)
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test)
    assert result.failed == 0


def test_every_callback_beside_that_of_another_library_can_be_built() -> None:
    import lightning_pet

    text = (DOCS / "coming_from.md").read_text(encoding="utf-8")
    built = re.findall(r"`(?:callbacks=)?(\[?\w+Callback\([^`…]*\)\]?)`", text)
    names = {name: getattr(lightning_pet, name) for name in re.findall(r"\w+Callback", text)}
    assert len(built) >= 10
    for line in built:
        eval(line, dict(names))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        str(tmp_path / "doctrees"),
    ]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for page in ("index", "quickstart", "concepts", "methods/lora", "checkpoints", "cli", "troubleshooting", "api"):
        assert (tmp_path / "html" / f"{page}.html").is_file()
    assert "LoRACallback" in (tmp_path / "html" / "api.html").read_text(encoding="utf-8")


def test_every_option_of_a_method_is_on_its_page() -> None:
    from lightning_pet.insertion.method import METHODS

    for page in sorted((DOCS / "methods").glob("*.md")):
        if page.stem in METHODS:
            text = page.read_text(encoding="utf-8")
            cls = METHODS[page.stem]
            own = [name for name in cls().config() if name in cls.__init__.__annotations__]
            assert not [name for name in own if f"`{name}`" not in text]


def test_every_method_is_in_every_list() -> None:
    """The table of the README, the page of names, and the page that helps to choose."""
    import lightning_pet

    readme, api, choosing = (
        path.read_text(encoding="utf-8") for path in (PAGES[0], DOCS / "api.md", DOCS / "choosing.md")
    )
    for name in lightning_pet.__all__:
        if name.endswith("Callback") and name not in ("PETCallback", "TasksCallback", "DriftCallback"):
            method = getattr(lightning_pet, name).method
            page = (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")
            title = page.splitlines()[0].removeprefix("# ").partition(" (")[0]
            assert f"| `{name}` |" in readme, name
            assert f".. autoclass:: lightning_pet.{name}\n" in api, name
            assert f"methods/{method}.md" in choosing or title.lower() in choosing.lower(), name


def test_every_error_is_in_troubleshooting() -> None:
    import lightning_pet

    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert not [
        name for name in lightning_pet.__all__ if name.endswith("Error") and name not in ("PETError", *text.split("`"))
    ]


def test_no_table_is_left_open() -> None:
    """A place to fill in later is marked, and named here, so that none is forgotten."""
    marked = {page.name for page in PAGES if "not measured yet" in page.read_text(encoding="utf-8")}
    assert marked <= {"performance.md"}
