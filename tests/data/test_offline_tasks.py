"""The tasks that need no download: docstrings by topic, and dates."""

import hashlib
import random
import re
from collections import Counter
from datetime import date
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_pet.callbacks.lora import LoRACallback
from lightning_pet.data.date_chat import DateChat
from lightning_pet.data.dates import Dates
from lightning_pet.data.docstring_topics import TOPICS, DocstringTopics, linear_probe, write_topics
from lightning_pet.data.reference import ReferencePoints
from lightning_pet.data.tables import read_splits
from lightning_pet.errors import ArgumentError
from lightning_pet.model.adaptation import adapted_root
from lightning_pet.modules import date_model
from lightning_pet.modules.cache import cached_folder
from lightning_pet.modules.causal_lm import CausalLMModule
from lightning_pet.modules.date_model import draw_days, write_date
from lightning_pet.modules.seq2seq import Seq2SeqModule
from lightning_pet.modules.text_classification import TextClassifier
from lightning_pet.operations.apply import apply
from tests.modules.tiny import T5

# -- cache ------------------------------------------------------------------------------------------


def test_cache_builds_once(cache: Path):
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "a.txt").write_text("made")

    assert cached_folder("thing-1", build) == cached_folder("thing-1", build) == cache / "thing-1"
    assert len(calls) == 1
    assert [path.name for path in cache.iterdir()] == ["thing-1"]


def test_a_failed_build_leaves_nothing(cache: Path):
    def build(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing-1", build)
    assert list(cache.iterdir()) == []


def test_the_first_of_two_builders_wins(cache: Path):
    def build(folder: Path) -> None:
        (folder / "a.txt").write_text("second")
        other = cache / "thing-1"
        other.mkdir()
        (other / "a.txt").write_text("first")

    assert (cached_folder("thing-1", build) / "a.txt").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["thing-1"]


# -- docstrings -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small standard library: 40 files of 8 topics, with what must be passed over."""
    folder = tmp_path_factory.mktemp("library")
    modules = ["asyncio", "collections", "dbm", "email", "importlib", "json", "numbers", "unittest"]
    for module in modules:
        for number in range(5):
            text = f'"""The file {number} of {module}, described in a rather long sentence."""\n'
            methods = "".join(
                f'    def m{i}(self):\n        """Method {i} of file {number} in {module},\n'
                f'        which does things."""\n'
                for i in range(4)
            )
            path = folder / module / f"f{number}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{text}class A:\n{methods}")
    (folder / "json" / "test").mkdir()
    (folder / "json" / "test" / "f.py").write_text('"""A test must not be read, however long its docstring is."""')
    (folder / "tkinter").mkdir()
    (folder / "tkinter" / "f.py").write_text('"""This module is on no list, so nobody may find this text."""')
    (folder / "numbers" / "bad.py").write_text('"""This file does not parse, for it is a template."""\n{% x %}')
    (folder / "queue.py").write_text(
        '"""Too short."""\ndef f():\n    """   The file queue.py belongs to\n    concurrency too."""'
    )
    return folder


def topics(library: Path, folder: Path, train: int, val: int) -> dict[str, list[tuple[str, str]]]:
    folder.mkdir()
    write_topics(library, folder, train, val)
    tables = read_splits(str(folder))
    return {s: list(zip(t.columns["text"], t.columns["label"], strict=True)) for s, t in tables.items()}


def test_documents_are_read_collapsed_and_chosen(library: Path, tmp_path: Path):
    splits = topics(library, tmp_path / "a", 1000, 1000)
    texts = dict(splits["train"] + splits["val"])
    assert len(texts) == 8 * 5 * 5 + 1
    assert texts["The file queue.py belongs to concurrency too."] == "concurrency"
    assert texts["Method 3 of file 4 in json, which does things."] == "markup and text"
    assert not [text for text in texts if "test" in text.split() or "nobody" in text or "template" in text]


def test_split_is_by_file_stratified_and_exact(library: Path, tmp_path: Path):
    splits = topics(library, tmp_path / "a", 100, 41)
    assert (len(splits["train"]), len(splits["val"])) == (100, 41)
    for split, each in (("train", 12.5), ("val", 5.1)):
        counts = Counter(label for _, label in splits[split])
        assert set(counts) == set(TOPICS)
        assert all(abs(count - each) <= 1.5 for count in counts.values()), counts
    files = [{re.sub(r".*file (\d) (?:of|in) (\w+).*", r"\2/\1", text) for text, _ in splits[s]} for s in splits]
    assert not files[0] & files[1]


def test_a_rebuild_gives_the_same_bytes(library: Path, tmp_path: Path):
    digests = []
    for name, seed in (("a", 1), ("b", 2)):
        random.seed(seed)
        torch.manual_seed(seed)
        topics(library, tmp_path / name, 100, 40)
        digests.append(hashlib.sha256((tmp_path / name / "train.jsonl").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_docstring_topics_of_the_installed_library(cache: Path, bert: Path):
    data = DocstringTopics(train_size=160, val_size=40)
    classifier = TextClassifier(str(bert), labels=data.labels)
    assert isinstance(data, ReferencePoints)
    before = torch.get_rng_state()
    points = data.reference_points(classifier)
    assert torch.equal(torch.get_rng_state(), before)
    assert classifier.training
    assert set(points) == {"majority", "linear probe"}
    assert 0.1 <= points["majority"] <= 0.15  # stratified: near 1/8
    assert len(data.tables["train"]) == 160
    again = DocstringTopics(train_size=160, val_size=40)
    assert again.tables["val"] == data.tables["val"]
    assert len(list(cache.iterdir())) == 1


def test_too_few_documents_are_refused():
    with pytest.raises(ArgumentError, match="val_size=7"):
        DocstringTopics(val_size=7)


def test_linear_probe_learns_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 8, generator=generator)
    labels = features[:, :3].argmax(-1)
    with torch.no_grad():
        probe = linear_probe(features, labels, classes=3)
    assert (probe(features).argmax(-1) == labels).float().mean() > 0.9
    assert all(p.grad is None or p.requires_grad for p in probe.parameters())


# -- dates ------------------------------------------------------------------------------------------


def test_numeric_orders_differ():
    day = date(2021, 3, 4)
    assert write_date(day, "us", random.Random(0)) == "3/4/2021"
    assert write_date(day, "eu", random.Random(0)) == "4/3/2021"


def test_long_forms_name_the_month_in_english():
    forms = {write_date(date(2021, 3, 4), "long", random.Random(seed)) for seed in range(60)}
    assert forms == {
        "4 March 2021", "March 4, 2021", "Thursday 4 Mar 2021", "Thu, 04 Mar 2021", "2021/3/4", "Mar 4 '21",
    }  # fmt: skip


def test_held_out_days_are_a_tenth_and_never_trained():
    trained = set(islice(draw_days(random.Random(0), held_out=False), 20_000))
    held = set(islice(draw_days(random.Random(1), held_out=True), 2_000))
    assert not trained & held
    days = [day for day in map(date.fromordinal, range(719163, 719163 + 3650))]
    share = sum(hashlib.sha256(day.isoformat().encode()).digest()[0] % 10 == 0 for day in days) / len(days)
    assert 0.08 < share < 0.13


def test_dates_are_deterministic_and_do_not_leak():
    first, second = Dates(seed=3).tables, Dates(seed=3).tables
    assert first == second
    assert Dates(seed=4).tables["train"] != first["train"]
    assert not set(first["train"].columns["target"]) & set(first["val"].columns["target"])
    assert Dates(order="eu").eval_names == ("eu", "us", "long")


@pytest.mark.parametrize("arguments", [{"order": "uk"}, {"train_size": 0}, {"val_size": 0}])
def test_dates_arguments_are_checked(arguments: dict[str, Any]):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        Dates(**arguments)


def test_reference_point_of_dates_counts_exact_matches():
    data = Dates(val_size=5, batch_size=2)

    class Guess(nn.Module):
        device = torch.device("cpu")

        def generate(self, batch: dict[str, torch.Tensor]) -> list[str]:
            return [data.tables["us"].columns["target"][0]] * len(batch["input_ids"])

    assert data.reference_points(Guess()) == {"base model": 0.2}


def test_reference_points_refuse_an_adapted_module():
    module = Seq2SeqModule(model={"model_type": "t5", **T5}, tokenizer="bytes", max_new_tokens=2)
    apply(module, [LoRACallback(r=2, target_modules=["q"])])
    assert adapted_root(module) is not None
    with pytest.raises(ArgumentError, match="before fit"):
        Dates(val_size=2).reference_points(module)


def test_date_model_is_trained_once_and_read_back(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(date_model._RECIPE, "steps", 12)
    before = torch.get_rng_state()
    module = Seq2SeqModule("builtin:dates", max_new_tokens=11)
    assert torch.equal(torch.get_rng_state(), before)
    (folder,) = cache.iterdir()
    assert (folder / "model.safetensors").is_file()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = Seq2SeqModule("builtin:dates", max_new_tokens=11)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert len(module.tokenizer) == 259
    assert set(Dates(val_size=4).reference_points(module)) == {"base model"}


def test_dates_namespace_is_a_reference_protocol():
    assert isinstance(Dates(), ReferencePoints)
    assert not isinstance(SimpleNamespace(), ReferencePoints)


def test_the_date_chat_learns_the_order_of_its_delta() -> None:
    """The shipped task, as the command runs it, but for the progress bar."""
    torch.manual_seed(0)
    module = CausalLMModule("builtin:date_chat", max_new_tokens=12, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=4, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=4,
        callbacks=[LoRACallback(r=8, alpha=16, target_modules="all-linear", verbose=False)],
    )  # fmt: skip
    (before,) = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, DateChat())[:1]
    trainer.fit(module, DateChat())
    after = trainer.callback_metrics
    assert before["val/exact_match"] < 0.9
    assert after["val/exact_match"] >= 0.97
    assert after["val/long/exact_match"] >= 0.95
    assert after["val/eu/exact_match"] < 0.9
