"""Small deltas, bases and files that the tests of the store share."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from lightning_pet.model.structure import Target
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.fingerprint import fingerprint
from lightning_pet.store.manifest import Manifest, MethodRecord

SUFFIX = ".pet.safetensors"


def tensors_of(generation: int, width: int = 8) -> dict[str, Tensor]:
    """Tensors that tell their generation, in three dtypes."""
    source = torch.Generator().manual_seed(generation)
    return {
        "encoder.layer.0.query.pet.lora_default.a": torch.randn(4, width, generator=source),
        "encoder.layer.0.query.pet.lora_default.b": torch.randn(width, 4, generator=source).bfloat16(),
        "encoder.layer.0.index": torch.randint(0, 99, (5,), generator=source),
    }


def base_of(seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    weights = {f"layer.{i}.weight": torch.randn(48, 32, generator=source) for i in range(4)}
    biases = {f"layer.{i}.bias": torch.randn(48, generator=source) for i in range(4)}
    return {**weights, **biases, "scale": torch.randn((), generator=source)}


def manifest_of(step: int = 0) -> Manifest:
    targets = (
        Target("encoder.layer.0.query", role="attention.q"),
        Target("encoder.layer.0.c_attn", role="attention.v", cross=True, rows=((0, 8), (16, 24))),
        Target("", "embedding"),
    )
    config = {"r": 4, "alpha": 8.0, "bias": None, "target_modules": ["attention.q"], "rank_pattern": {"x": {"y": 1}}}
    return Manifest(
        methods=(MethodRecord("lora", "default", config, targets), MethodRecord("bitfit", "b-2")),
        base=fingerprint(base_of().items()),
        root="model",
        step=step,
        notes={"task": "naïve\ntext"},
        written_by="lightning_pet 0.1.0",
    )


def save(path: Path, generation: int = 0) -> int:
    return write_delta(path, tensors_of(generation), manifest_of(generation))


def generation_in(path: Path) -> int:
    """The generation that a file holds; fails if its parts are of different ones."""
    found = read_delta(path)
    assert found.manifest.step is not None
    same(found.tensors, tensors_of(found.manifest.step))
    return found.manifest.step


def same(found, expected) -> None:
    assert list(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and values of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict | bytes, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def resign(header: dict, manifest: dict | str) -> dict:
    """The header with another manifest and a digest that fits it, as a forger would write it."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    metadata = {**header["__metadata__"], "pet.manifest": text, "pet.sha256": digest}
    return {**header, "__metadata__": metadata}
