"""Finding and reading models: folders, packages, digests, and never the network for a local folder."""

import hashlib
import socket
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_pet.errors import ArgumentError
from lightning_pet.modules.pretrained import check_digest, find_model, load_model, load_tokenizer
from tests.modules.tiny import BERT, WORDS, write_bert


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections fail, and nothing tells transformers to stay offline."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError(f"network access: {args}")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose import fails, with a model in it."""
    root = tmp_path / "site" / "packed_bert"
    write_bert(root / "model")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_folder_is_read_without_network(bert: Path, no_network: None):
    model = load_model("AutoModel", str(bert))
    weights = load_file(bert / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    assert model.training
    assert load_tokenizer(str(bert))("a good film")["input_ids"][1:-1] == [5, 6, 8]
    assert len(load_tokenizer("bytes")) == 259


def test_package_is_found_without_importing_it(package: Path, no_network: None):
    assert find_model("package:packed_bert/model") == package.resolve() / "model"
    load_model("AutoModel", "package:packed_bert/model")
    assert "packed_bert" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:packed_bert/models", "has no folder 'models'"),
        ("package:packed_bert/../../..", "has no folder"),
        ("package:no_such_thing/model", "pip install no-such-thing"),
        ("package:packed.bert/model", "expected 'package:<top-level module>"),
        ("package:", "expected 'package:<top-level module>"),
        ("builtin:times", r"known: \['date_chat', 'dates'\]"),
        ("./missing", "there is no folder"),
        ("some/long/path", "there is no folder"),
    ],
)
def test_bad_names_are_explained(package: Path, name: str, message: str):
    with pytest.raises(ArgumentError, match=message):
        find_model(name)


def test_digest_is_compared(bert: Path):
    digest = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    check_digest(bert, digest)
    check_digest(bert, digest.upper())
    with pytest.raises(ArgumentError, match=f"has sha256 {digest}, not the pinned 0000"):
        load_model("AutoModel", str(bert), sha256="0" * 64)


def test_digest_without_weights_file(tmp_path: Path):
    with pytest.raises(ArgumentError, match="has none; remove sha256"):
        check_digest(tmp_path, "0" * 64)
    with pytest.raises(ArgumentError, match="describes a new one"):
        load_model("AutoModel", {"model_type": "bert"}, sha256="0" * 64)


def test_weights_of_another_architecture_are_refused(tmp_path: Path):
    folder = write_bert(tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "attention.self.query" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=r"lack 2 tensors of BertModel.*attention.self.query"):
        load_model("AutoModel", str(folder))
    with pytest.raises(ArgumentError, match="lack 2 tensors of BertForSequenceClassification"):
        load_model("AutoModelForSequenceClassification", str(folder), num_labels=3)


def test_pickled_weights_are_refused(tmp_path: Path):
    folder = write_bert(tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model("AutoModel", str(folder))


def test_new_model_from_a_configuration():
    model = load_model("AutoModel", {"model_type": "bert", "vocab_size": len(WORDS), **BERT})
    assert model.config.hidden_size == 16
    with pytest.raises(ArgumentError, match="needs 'model_type'"):
        load_model("AutoModel", {"vocab_size": 3})
