"""Docstrings of Python's standard library, by chapter of the library reference: real texts with nothing to download."""

import ast
import hashlib
import json
import os
import platform
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_pet.data.reference import untouched
from lightning_pet.data.tables import Table, read_splits
from lightning_pet.data.text_classification import TextClassificationData
from lightning_pet.errors import ArgumentError
from lightning_pet.modules.cache import cached_folder

# Modules that every supported Python has, by chapter; those that a distribution leaves out are passed over.
_CHAPTERS: Mapping[str, str] = {
    "concurrency": """_threading_local queue sched selectors signal socketserver subprocess threading asyncio
        concurrent multiprocessing""",
    "data types": """_collections_abc _py_abc abc bisect calendar contextlib copy copyreg dataclasses datetime enum
        functools graphlib heapq operator pprint reprlib types typing weakref collections zoneinfo""",
    "files and archives": """_pyio bz2 configparser csv filecmp fileinput fnmatch genericpath glob gzip io linecache
        lzma mailbox netrc ntpath os pathlib pickle pickletools plistlib posixpath shelve shutil stat tarfile
        tempfile zipapp zipfile zipimport dbm sqlite3""",
    "internet": """base64 ftplib hashlib hmac imaplib ipaddress mimetypes poplib quopri secrets smtplib socket ssl
        uuid webbrowser email http urllib wsgiref xmlrpc""",
    "language and packaging": """__future__ ast compileall dis modulefinder opcode pkgutil platform py_compile pyclbr
        runpy symtable sysconfig tabnanny ctypes importlib""",
    "markup and text": """argparse cmd codecs difflib getopt gettext keyword locale optparse rlcompleter shlex string
        stringprep textwrap tokenize encodings html json re xml""",
    "numeric": "_pydecimal _strptime colorsys fractions numbers random statistics",
    "testing and debugging": """bdb cProfile code codeop doctest inspect pdb profile pstats pydoc site timeit trace
        traceback tracemalloc warnings logging unittest""",
}
TOPICS: tuple[str, ...] = tuple(_CHAPTERS)
"""The eight classes, in the order of their numbers."""

_TOPIC_OF = {module: topic for topic, modules in _CHAPTERS.items() for module in modules.split()}
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "idle_test"}
_SHORTEST = 40  # characters
_PER_MODULE, _PER_TOPIC = 80, 320
_VERSION = 1  # of the recipe; part of the cache's key


class _Document(NamedTuple):
    text: str
    topic: str
    file: str


def _rank(text: str) -> str:
    # A fixed hash orders and splits: the same on every machine, and independent of the random state.
    return hashlib.sha1(text.encode()).hexdigest()


class DocstringTopics(TextClassificationData):
    """Find the chapter of the library reference that a docstring belongs to (8 classes).

    The texts are read from the installed standard library by parsing, without importing it, and cached.
    Training and validation texts come from different source files, with the same share of each topic.

    Args:
        train_size: number of training texts; fewer if the library has fewer.
        val_size: number of validation texts, likewise.
        max_length: longest text in tokens; longer ones are cut.
        batch_size: texts per batch and process.
        num_workers: processes that form batches.

    Raises:
        ArgumentError: a size is below 8.

    Example:
        >>> DocstringTopics().labels[:2]
        ['concurrency', 'data types']
    """

    metric = "val/accuracy"

    def __init__(
        self,
        train_size: int = 960,
        val_size: int = 400,
        max_length: int = 32,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__("", labels=list(TOPICS), max_length=max_length, batch_size=batch_size, num_workers=num_workers)
        if min(train_size, val_size) < len(TOPICS):
            raise ArgumentError(f"train_size={train_size} and val_size={val_size} must be at least {len(TOPICS)}")
        self.train_size = train_size
        self.val_size = val_size

    def prepare_data(self) -> None:
        """Read the standard library (a few seconds) unless the cache has its texts."""
        self._folder()

    def _folder(self) -> Path:
        library = Path(sysconfig.get_paths()["stdlib"])
        sizes = (self.train_size, self.val_size)
        files = [(str(path.relative_to(library)), path.stat().st_size) for path in _source_files(library)]
        key = _rank(json.dumps([_VERSION, platform.python_version(), sizes, files]))[:12]
        return cached_folder(f"docstring_topics-{key}", lambda folder: write_topics(library, folder, *sizes))

    def read(self) -> dict[str, Table]:
        """Read the texts from the cache."""
        return read_splits(str(self._folder()))

    def reference_points(self, module: Any) -> dict[str, float]:
        """Accuracy of the most frequent topic, and of a linear probe on the frozen encoder's features.

        Args:
            module: a :class:`~lightning_pet.modules.text_classification.TextClassifier` before tuning.

        Returns:
            Two points, ``"majority"`` and ``"linear probe"``.
        """
        self.encode_splits(module, ["train", "val"])
        with untouched(module):
            train, val = (self._features(module, split) for split in ("train", "val"))
            majority = train[1].bincount().argmax()
            probe = linear_probe(*train, classes=len(TOPICS))
            hits = probe(val[0]).argmax(-1) == val[1]
        return {"majority": float((val[1] == majority).float().mean()), "linear probe": float(hits.float().mean())}

    def _features(self, module: Any, split: str) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        for batch in self.loader(split):
            features.append(module.features(move_data_to_device(batch, module.device)).float().cpu())
            labels.append(batch["labels"])
        return torch.cat(features), torch.cat(labels)


def linear_probe(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Train a linear classifier on fixed features.

    Args:
        features: (examples, width).
        labels: (examples,), integers below ``classes``.
        classes: number of classes.

    Returns:
        The layer, after 20 epochs of AdamW.
    """
    with torch.enable_grad():
        probe = nn.Linear(features.shape[1], classes)
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=5e-3, weight_decay=0.05)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            order = torch.randperm(len(features), generator=generator)
            for rows in torch.split(order, 64):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(probe(features[rows]), labels[rows]))
                optimizer.step()
    return probe


def write_topics(library: Path, folder: Path, train_size: int, val_size: int) -> None:
    """Write ``train.jsonl`` and ``val.jsonl`` with the texts of a standard library.

    Args:
        library: folder of the library.
        folder: where to write.
        train_size: number of training texts.
        val_size: number of validation texts.
    """
    for name, documents in zip(("train", "val"), split_by_file(_choose(library), train_size, val_size), strict=True):
        rows = ({"text": document.text, "label": document.topic} for document in documents)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def split_by_file(
    documents: list[_Document], train_size: int, val_size: int
) -> tuple[list[_Document], list[_Document]]:
    """Split documents so that no file is in both parts, and every topic has the same share of both.

    Args:
        documents: all documents.
        train_size: documents of the first part; fewer if the files do not allow more.
        val_size: documents of the second part, likewise.
    """
    parts: tuple[list[_Document], list[_Document]] = ([], [])
    seen = 0
    for topic in TOPICS:
        rows = [document for document in documents if document.topic == topic]
        before, seen = seen / len(documents), seen + len(rows)
        after = seen / len(documents)
        # Differences of rounded sums, so that the parts have exactly the sizes asked for.
        wanted = [round(after * size) - round(before * size) for size in (train_size, val_size)]
        files: dict[str, list[_Document]] = defaultdict(list)
        for document in rows:
            files[document.file].append(document)
        held_out: set[str] = set()
        count = 0
        for file in sorted(files, key=lambda name: _rank(f"{name} split")):
            enough_left = len(rows) - count - len(files[file]) >= wanted[0]
            if count < wanted[1] and (enough_left or not held_out):
                held_out.add(file)
                count += len(files[file])
        for part, size, held in zip(parts, wanted, (False, True), strict=True):
            part += [document for document in rows if (document.file in held_out) == held][:size]
    for part in parts:
        part.sort(key=lambda document: _rank(f"order {document.text}"))
    return parts


def _choose(library: Path) -> list[_Document]:
    # Limits keep one large module from standing for its whole topic.
    by_text = {document.text: document for document in reversed(list(_documents(library)))}
    chosen: list[_Document] = []
    count: Counter[str] = Counter()
    for text in sorted(by_text, key=_rank):
        document = by_text[text]
        module = _module_of(document.file)
        if count[f"module {module}"] < _PER_MODULE and count[document.topic] < _PER_TOPIC:
            count.update((f"module {module}", document.topic))
            chosen.append(document)
    return chosen


def _documents(library: Path) -> Iterator[_Document]:
    for path in _source_files(library):
        file = path.relative_to(library).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old sources
                tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a file that is not meant to be run, such as a template
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= _SHORTEST:
                    yield _Document(text, _TOPIC_OF[_module_of(file)], file)


def _source_files(library: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(library):
        top = Path(place) == library
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and (not top or name in _TOPIC_OF))
        for name in sorted(files):
            if name.endswith(".py") and (not top or name.removesuffix(".py") in _TOPIC_OF):
                yield Path(place) / name


def _module_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")
