"""The writers under test, each with a way to say which generation its file holds, or that it is torn."""

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from models import Data, Module, Net, lora, trainer
from torch import nn

from lightning_pet.operations.delta import merge_into_folder, save_delta
from lightning_pet.store.reader import load_checkpoint, read


def other_file_system() -> Path | None:
    """A folder on another file system than that of temporary files; ``None`` if there is none."""
    here = os.stat(tempfile.gettempdir()).st_dev
    places = (Path("/dev/shm"), Path("/var/tmp"))
    return next((place for place in places if place.is_dir() and place.stat().st_dev != here), None)


class Writer(ABC):
    """Saves a generation under one name, over the one before."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / self.file
        folder.mkdir(parents=True)

    file = "x"
    keeps_old = True
    """Whether there is a file of the generation before; else the name is free."""

    @abstractmethod
    def save(self, generation: int) -> None:
        """Write a generation."""

    @abstractmethod
    def found(self) -> int:
        """The generation that is there (0: none); an error if it is torn."""

    def largest(self) -> int:
        """Bytes of the largest file that a save writes."""
        return self.path.stat().st_size

    def hidden(self) -> list[str]:
        """Temporary files and folders beside the target."""
        return [name for name in os.listdir(self.folder) if name.startswith(".")]


class Delta(Writer):
    """``save_delta``."""

    name, file = "delta file", "x.pet.safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.module = Module(Net(norm=True))
        fitted = trainer(lora(), max_steps=1)
        fitted.fit(self.module, datamodule=Data())
        self.trainer = fitted

    def _fill(self, generation: int) -> None:
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    parameter.fill_(float(generation))

    def save(self, generation: int) -> None:
        """Fill the delta with the generation's number."""
        self._fill(generation)
        save_delta(self.module, self.path)

    def found(self) -> int:
        """Read and verify; all numbers must be those of one generation."""
        if not self.path.exists():
            return 0
        tensors = {name: t for name, t in read(self.path).tensors.items() if t.is_floating_point() and ".pet." in name}
        values = {float(value) for tensor in tensors.values() for value in (tensor.min(), tensor.max())}
        assert len(values) == 1, f"{self.path} mixes generations {values}"
        return int(values.pop())


class Checkpoint(Delta):
    """``trainer.save_checkpoint`` of a run that has trained."""

    name, file = "checkpoint", "x.ckpt"

    def save(self, generation: int) -> None:
        """As a run would."""
        self._fill(generation)
        self.trainer.save_checkpoint(self.path)

    def found(self) -> int:
        """With the state of the optimizer."""
        generation = super().found()
        assert generation == 0 or load_checkpoint(self.path)["optimizer_states"]
        return generation


class Stock(Checkpoint):
    """The same by Lightning's own writer, with its temporary files on another file system where there is one."""

    name = "Lightning's own writer"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.trainer.strategy.checkpoint_io = TorchCheckpointIO()

    def save(self, generation: int) -> None:
        """By way of the temporary folder."""
        tempfile.tempdir = str(other_file_system() or tempfile.gettempdir())
        super().save(generation)

    def hidden(self) -> list[str]:
        """They are elsewhere."""
        return []


class Folder(Writer):
    """``merge_into_folder``: a folder of transformers. The name is free before."""

    name, file, keeps_old = "merged folder", "merged", False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=16, **sizes))
        self.base, self.delta = folder.with_name(f"{folder.name}-base"), folder.with_name(f"{folder.name}.pet")
        model.save_pretrained(self.base)
        module = _adapted(model)
        save_delta(module, self.delta)
        self.whole = folder.with_name(f"{folder.name}-whole")
        merge_into_folder(self.delta, self.base, self.whole)

    def save(self, generation: int) -> None:
        """Load the base, merge, write."""
        merge_into_folder(self.delta, self.base, self.path)

    def found(self) -> int:
        """Compare with a folder that nobody disturbed, byte by byte."""
        return int(self._equal(self.path)) if self.path.exists() else 0

    def _equal(self, path: Path) -> bool:
        there, whole = ({p.name: self._bytes(p) for p in folder.iterdir()} for folder in (path, self.whole))
        assert there == whole, f"{path} is torn"
        return True

    @staticmethod
    def _bytes(path: Path) -> bytes:
        """Of a file; the card says what its folder is called."""
        found = path.read_bytes()
        if path.name == "README.md":
            named = (b"# ", b"model_name:", b"model = ", b"- name:")
            found = b"\n".join(line for line in found.splitlines() if not line.strip().startswith(named))
        return found

    def largest(self) -> int:
        """The weights."""
        return max(path.stat().st_size for path in self.whole.iterdir())

    def clear(self) -> None:
        """Free the name."""
        shutil.rmtree(self.path, ignore_errors=True)


def _adapted(model: nn.Module) -> nn.Module:
    from lightning_pet import LoRACallback, apply

    apply(model, [LoRACallback(r=2, verbose=False)])
    return model
