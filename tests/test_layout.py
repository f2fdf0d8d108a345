"""The structure of the package is a promise too: layers, sizes, four places per method, cheap imports."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_pet"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Arrows point down only. Those of one line may not import each other, unless a pair says so.
LAYERS = (
    ("cli",),
    ("report",),
    ("recipes",),
    ("modules", "data", "callbacks"),
    ("training",),
    ("operations",),
    ("strategies",),
    ("exchange",),
    ("store",),
    ("insertion",),
    ("targets",),
    ("probe",),
    ("attention",),
    ("model",),
    ("layers",),
    ("arguments",),
    ("errors", "version"),
)
SIDEWAYS = {("data", "modules")}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
LOCAL_IMPORTS_ALLOWED = {"__init__.py", "main.py", "lightning_cli.py"}
MAX_LINES, MAX_FUNCTION = 500, 50
MAX_FILES = 20  # of a room
ROOMY = {"layers": 48, "callbacks": 40}  # one file per piece of mathematics, one per method
MAX_CALLS_AT_IMPORT = 1000  # 344 when this was written

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def part_of(module: str) -> str:
    """``lightning_pet.probe.graph`` → ``probe``; ``lightning_pet.errors`` → ``errors``."""
    return module.split(".")[1]


def imports(node: ast.AST, local: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every imported module with its line, and whether the import is inside a function; those for types count, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, local) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield (full if full in MODULES else str(child.module), child.lineno, local)
        else:
            yield from imports(child, local or isinstance(child, (*FUNCTIONS, ast.Lambda)))


def own_imports(path: Path) -> list[tuple[str, int, bool]]:
    return [found for found in imports(TREES[path]) if found[0].split(".")[0] == "lightning_pet"]


def everything(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes at module level and methods of public classes whose names have no underscore."""
    todo: list[ast.Module | ast.ClassDef] = [tree]
    while todo:
        for node in todo.pop().body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    todo.append(node)


# -- imports ----------------------------------------------------------------------------------------


def test_arrows_point_down_only() -> None:
    wrong = []
    for path in FILES:
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        own = part_of(name_of(path))
        for target, line, _ in own_imports(path):
            if target == "lightning_pet":
                continue  # reported by the next test
            other = part_of(target)
            down = LEVEL[own] < LEVEL[other]
            if own != other and not down and (own, other) not in SIDEWAYS:
                wrong.append(f"{everything(path)}:{line} ({own}) imports {target}")
    assert not wrong, wrong


def test_every_module_has_a_layer() -> None:
    assert {part_of(name) for name in MODULES if name != "lightning_pet"} == set(LEVEL)


def test_nobody_imports_through_a_package() -> None:
    """Names come from the module that defines them: re-exports are what makes import cycles."""
    wrong = [
        f"{everything(path)}:{line} imports from {target}"
        for path in FILES
        for target, line, _ in own_imports(path)
        if target in PACKAGES and path != PACKAGE / "__init__.py"
    ]
    assert not wrong, wrong


def test_subpackages_re_export_nothing() -> None:
    for name in PACKAGES - {"lightning_pet"}:
        assert not list(imports(TREES[MODULES[name]])), name


BASES = ("base", "on_layers")  # of callbacks


def test_callbacks_do_not_import_each_other() -> None:
    def method_of(module: str) -> str:
        return module.split(".")[2]

    wrong = [
        f"{everything(path)}:{line} imports {target}"
        for path in sorted((PACKAGE / "callbacks").rglob("*.py"))
        for target, line, _ in own_imports(path)
        if target.startswith("lightning_pet.callbacks.") and method_of(target) not in (*BASES, method_of(name_of(path)))
    ]
    assert not wrong, wrong


def test_own_imports_are_at_the_head_of_the_file() -> None:
    wrong = [
        f"{everything(path)}:{line} imports {target} inside a function"
        for path in FILES
        for target, line, local in own_imports(path)
        if local and path.name not in LOCAL_IMPORTS_ALLOWED
    ]
    assert not wrong, wrong


def test_there_is_no_import_cycle() -> None:
    graph = {name: {t for t, _, local in own_imports(path) if not local} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("part", ["layers", "model", "attention", "probe", "targets", "insertion", "store"])
def test_lower_layers_are_pure_torch(part: str) -> None:
    allowed = {"torch", "lightning_pet", *({"safetensors"} if part == "store" else ())}
    wrong = [
        f"{everything(path)}:{line} imports {target}"
        for path in sorted((PACKAGE / part).rglob("*.py"))
        for target, line, local in imports(TREES[path])
        if (top := target.split(".")[0]) not in allowed | sys.stdlib_module_names
        and not (local and top == "transformers")
    ]
    assert not wrong, wrong


def test_transformers_is_imported_only_where_it_is_used() -> None:
    wrong = [
        f"{everything(path)}:{line}"
        for path in FILES
        for target, line, local in imports(TREES[path])
        if target.split(".")[0] in ("transformers", "datasets", "peft", "matplotlib") and not local
    ]
    assert not wrong, wrong


def own_attributes() -> set[str]:
    """Every attribute that this package defines: methods, class attributes, and what is assigned on self."""
    names: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                body = [n for n in node.body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
                names.update(n.name for n in body)
                targets = [t for n in node.body if isinstance(n, ast.Assign) for t in n.targets]
                targets += [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
                names.update(t.id for t in targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                # On self only: an assignment to another object's private name does not make it ours.
                names.update({node.attr} if ast.unparse(node.value) in ("self", "cls") else ())
    return names


def test_private_names_of_others_are_listed_in_one_file() -> None:
    """What Lightning or torch may rename is listed in strategies/private.py: one place to look at after an upgrade."""
    listed = (PACKAGE / "strategies" / "private.py").read_text(encoding="utf-8")
    ours = own_attributes()
    wrong = []
    for path in FILES:
        if path.name == "private.py":
            continue
        for node in ast.walk(TREES[path]):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lightning_pet"):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            for name in names:
                private = name.startswith("_") and not name.startswith("__") and name != "_"
                if private and name not in ours and not re.search(rf"\b{name}\b", listed):
                    wrong.append(f"{everything(path)}:{node.lineno} uses {name}")
    assert not wrong, wrong


# -- sizes and docstrings ---------------------------------------------------------------------------


def test_files_are_short() -> None:
    lengths = {everything(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_rooms_are_small() -> None:
    rooms = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in FILES if path.name != "__init__.py")
    assert not {room: files for room, files in rooms.items() if files > ROOMY.get(room, MAX_FILES)}


def test_functions_are_short() -> None:
    long = {
        f"{everything(path)}:{node.lineno} {node.name}": lines
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and (lines := code_lines(node)) > MAX_FUNCTION
    }
    assert not long, long


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which may be as long as it needs to be."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def test_everything_public_has_a_docstring() -> None:
    wrong = [f"{everything(path)}: the module" for path, tree in TREES.items() if ast.get_docstring(tree) is None]
    wrong += [
        f"{everything(path)}:{node.lineno} {node.name}"
        for path, tree in TREES.items()
        for node in public_definitions(tree)
        if ast.get_docstring(node) is None
    ]
    assert not wrong, wrong


def test_text_speaks_of_the_project_alone() -> None:
    """No path of a machine, in any file that is shipped."""
    files = [
        path for top in ("lightning_pet", "docs", "examples", "configs", "tests") for path in (ROOT / top).rglob("*")
    ]
    for path in [*files, ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "constraints.txt"]:
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt") and "_build" not in path.parts:
            found = re.search(r"(?<![\w.])/(?:work|home|root|opt|mnt)/\w+", path.read_text(encoding="utf-8"))
            assert found is None, f"{everything(path)}: {found.group() if found else ''}"


# -- four places per method -------------------------------------------------------------------------

# One file per method; a method with organs of its own has a folder, in which callback.py is that file.
# What is beside the methods is none: bases of them, what lets several deltas train, and what measures.
NO_METHODS = ("__init__", "base", "drift", "on_layers", "tasks")
METHOD_FILES = {p.stem: p for p in (PACKAGE / "callbacks").glob("*.py") if p.stem not in NO_METHODS}
METHOD_FILES |= {p.parent.name: p for p in (PACKAGE / "callbacks").glob("*/callback.py")}
METHOD_NAMES = sorted(METHOD_FILES)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("place", ["configs/method/{}.yaml", "tests/methods/test_{}.py", "docs/methods/{}.md"])
def test_a_method_has_four_places(method: str, place: str) -> None:
    assert (ROOT / place.format(method)).is_file()


@pytest.mark.parametrize(("folder", "pattern"), [("configs/method", "{}.yaml"), ("docs/methods", "{}.md")])
def test_no_place_is_left_without_its_method(folder: str, pattern: str) -> None:
    combinations = {"mam.yaml", "unipelt.yaml"}  # lists of several methods
    known = {pattern.format(method) for method in METHOD_NAMES} | combinations
    assert {path.name for path in (ROOT / folder).iterdir()} <= known


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_method_file_holds_one_final_callback(method: str) -> None:
    tree = TREES[METHOD_FILES[method]]
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Callback")]
    assert len(classes) == 1
    assert classes[0].lower() == f"{method.replace('_', '')}callback"


# -- what importing costs ---------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What is imported, and how many of our own functions (module and class bodies included) run on the way.
IMPORTED = """
import json, sys
import lightning.pytorch
before, calls = set(sys.modules), []
def note(frame, event, _):
    if event == "call" and "lightning_pet" in frame.f_code.co_filename:
        calls.append(frame.f_code.co_qualname)
sys.setprofile(note)
import lightning_pet
sys.setprofile(None)
print(json.dumps([sorted(set(sys.modules) - before), calls]))
"""


def test_importing_is_cheap() -> None:
    """On every machine: after Lightning nothing is imported but what defines the public names, and little of it runs.

    Seconds would say the same on a quiet machine only.
    """
    new, calls = json.loads(python(IMPORTED).splitlines()[-1])
    foreign = [name for name in new if name.partition(".")[0] != "lightning_pet"]
    assert not foreign, f"newly imported besides this package: {foreign}"
    parts = {part_of(name) for name in new if name != "lightning_pet"}
    assert not parts & {"cli", "report", "recipes", "modules", "data"}
    assert len(calls) <= MAX_CALLS_AT_IMPORT, Counter(calls).most_common(20)


def test_help_needs_no_lightning() -> None:
    code = """
import sys
sys.argv = ["lightning-pet", *{argv!r}]
from lightning_pet.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = sorted({{"lightning", "torch", "transformers"}} & set(sys.modules))
print("heavy:", heavy)
"""
    for argv in (
        ["--help"],
        ["inspect", "--help"],
        ["merge", "--help"],
        ["init", "--help"],
        ["list"],
        ["intrinsic-dimension", "--help"],
        ["plan", "-h"],
    ):
        assert python(code.format(argv=argv)).splitlines()[-1] == "heavy: []", argv
