"""The file format: round trips, foreign readers, size, what is refused at writing and at reading."""

import os
import pickle
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from store_samples import base_of, generation_in, join, manifest_of, resign, same, save, split, tensors_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.model.structure import Target
from lightning_pet.store.container import Limits
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.fingerprint import DTYPES, describe, fingerprint
from lightning_pet.store.manifest import Manifest, MethodRecord, read_manifest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pet.safetensors"


def test_every_dtype_and_odd_shape_returns_bit_by_bit(path):
    tensors = {f"t.{code}": (torch.arange(15).reshape(3, 5) - 7).to(dtype) for code, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(-0.0), "empty": torch.empty(0, 3), "none": torch.empty(2, 0, dtype=torch.int64)}
    tensors |= {"strided": torch.randn(6, 4).t()[::2], "tiny": torch.tensor([torch.finfo(torch.float32).tiny / 8])}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(2, 2))}
    size = write_delta(path, tensors, manifest_of())
    assert size == path.stat().st_size
    found = read_delta(path)
    same(found.tensors, {name: tensor.detach() for name, tensor in tensors.items()})
    assert torch.signbit(found.tensors["scalar"])
    assert not found.tensors["parameter"].requires_grad


def test_plain_safetensors_reads_the_file(path):
    save(path, 3)
    loaded = load_file(path)
    same(dict(sorted(loaded.items())), tensors_of(3))
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert '"r":4' in file.metadata()["pet.manifest"]


def test_no_tensors_at_all(path):
    write_delta(path, {}, manifest_of())
    assert read_delta(path).tensors == {}
    assert load_file(path) == {}


def test_the_manifest_returns_whole(path):
    save(path, 7)
    expected = replace(manifest_of(7), tensors=describe(tensors_of(7)))
    assert read_manifest(path) == expected
    assert read_delta(path).manifest == expected
    index = read_delta(path).tensors["encoder.layer.0.index"]
    assert (index.dtype, index.shape) == (torch.int64, (5,))


def test_the_same_content_is_the_same_file(path, tmp_path):
    save(path)
    shuffled = dict(reversed(tensors_of(0).items()))
    write_delta(tmp_path / "other", shuffled, manifest_of())
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_tensors_do_not_follow_the_file(path):
    save(path, 1)
    found = read_delta(path)
    with open(path, "r+b") as file:
        file.truncate(10)
    same(found.tensors, tensors_of(1))


def test_the_overhead_stays_small_and_the_manifest_is_quick(path):
    names = [f"encoder.layer.{i // 12:02d}.attention.self.q_{i % 12:02d}.pet.lora_default." for i in range(72)]
    tensors = {(name + part).ljust(70, "x"): torch.randn(8, 768) for name in names for part in ("a", "b")}
    base = {f"encoder.layer.{i // 16:02d}.attention.self.p_{i % 16}.weight": torch.randn(64, 64) for i in range(200)}
    config = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["attention.q", "attention.v"], "bias": "none"}
    targets = tuple(Target(name[:45], role="attention.q") for name in names)
    manifest = Manifest((MethodRecord("lora", "default", config, targets),), base=fingerprint(base.items(), exact=True))
    size = write_delta(path, tensors, manifest)
    assert len(tensors) == 144
    assert {len(name) for name in tensors} == {70}
    assert size - sum(tensor.nbytes for tensor in tensors.values()) <= 32 * 1024
    taken = []
    for _ in range(5):
        start = time.process_time()
        read_manifest(path)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_not_written(path, bad):
    save(path, 1)
    tensors = tensors_of(2)
    tensors["encoder.layer.0.query.pet.lora_default.a"][1, 1] = bad
    with pytest.raises(DeltaFileError, match=r"lora_default\.a'.*1 of 32") as caught:
        write_delta(path, tensors, manifest_of())
    assert caught.value.code == "nonfinite"
    assert generation_in(path) == 1


def test_non_finite_values_are_not_read(path, monkeypatch):
    monkeypatch.setattr("lightning_pet.store.delta_file.require_finite", lambda *_, **__: None)
    write_delta(path, {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")]).half()}, manifest_of())
    monkeypatch.undo()
    with pytest.raises(DeltaFileError, match="'bad'") as caught:
        read_delta(path)
    assert caught.value.code == "nonfinite"


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(2, dtype=torch.bool), "bool"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(path, tensor, text):
    with pytest.raises(DeltaFileError, match=f"'odd'.*{text}") as caught:
        write_delta(path, {"odd": tensor}, manifest_of())
    assert caught.value.code == "schema"
    assert not path.exists()


def test_damage_of_one_tensor_names_it(path):
    save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the narrowest dtype comes last
    path.write_bytes(data)
    with pytest.raises(DeltaFileError, match=r"lora_default\.b'.*SHA-256") as caught:
        read_delta(path)
    assert caught.value.code == "corrupt"
    assert read_manifest(path).step == 0


def test_swapped_bytes_of_two_tensors_are_noticed(path):
    write_delta(path, {"a": torch.ones(4), "b": torch.zeros(4)}, manifest_of())
    header, values = split(path.read_bytes())
    header["a"]["data_offsets"], header["b"]["data_offsets"] = [16, 32], [0, 16]
    path.write_bytes(join(header, values))
    with pytest.raises(DeltaFileError) as caught:
        read_delta(path)
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize(
    ("offsets", "values", "text"),
    [
        (([0, 16], [20, 36]), 36, "'b': starts at byte 20, expected 16"),
        (([0, 16], [8, 24]), 24, "'b': starts at byte 8, expected 16"),
        (([0, 20], [20, 36]), 36, r"'a': found 20 bytes, expected 16 for F32 \[4\]"),
        (([0, 16], [16, 32]), 40, "found 40 bytes of values, expected 32"),
    ],
)
def test_values_cover_the_file_without_hole_overlap_or_tail(path, offsets, values, text):
    write_delta(path, {"a": torch.zeros(4), "b": torch.zeros(4)}, manifest_of())
    header, _ = split(path.read_bytes())
    header["a"]["data_offsets"], header["b"]["data_offsets"] = offsets
    path.write_bytes(join(header, bytes(values)))
    with pytest.raises(DeltaFileError, match=text) as caught:
        read_delta(path)
    assert caught.value.code == "corrupt"


def test_a_foreign_safetensors_file_is_told_apart(path):
    save_file(tensors_of(0), path, metadata={"format": "pt"})
    with pytest.raises(DeltaFileError, match="not written by save_delta") as caught:
        read_delta(path)
    assert caught.value.code == "schema"


def test_a_newer_format_names_the_remedy(path):
    save(path)
    header, values = split(path.read_bytes())
    path.write_bytes(join(resign(header, {"format": 2, "written_by": "lightning_pet 9.0", "new": {}}), values))
    with pytest.raises(DeltaFileError, match=r"lightning_pet 9\.0.*Upgrade") as caught:
        read_manifest(path)
    assert caught.value.code == "version"


def test_limits_are_the_callers(path):
    save(path)
    for limits in (Limits(file_bytes=100), Limits(header_bytes=100), Limits(tensors=2)):
        with pytest.raises(DeltaFileError, match="Raise Limits") as caught:
            read_delta(path, limits=limits)
        assert caught.value.code == "limit"
    read_delta(path, limits=Limits(tensors=3))


def test_a_symbolic_link_is_followed(path, tmp_path):
    save(path, 5)
    (tmp_path / "link").symlink_to(path)
    assert generation_in(tmp_path / "link") == 5


def test_missing_folders_are_made(tmp_path):
    save(tmp_path / "a" / "b" / "x", 4)
    assert generation_in(tmp_path / "a" / "b" / "x") == 4


def test_a_reader_sees_whole_files_while_a_writer_replaces_them(path):
    save(path, 0)
    stop = threading.Event()

    def keep_saving():
        generation = 0
        while not stop.is_set():
            generation = (generation + 1) % 50
            save(path, generation)

    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        seen = {generation_in(path) for _ in range(150)}
    finally:
        stop.set()
        writer.join()
    assert len(seen) > 3


def test_the_error_survives_a_process_boundary(path):
    with pytest.raises(DeltaFileError) as caught:
        read_delta(path)
    assert caught.value.code == "io"
    assert pickle.loads(pickle.dumps(caught.value)).code == "io"


def test_the_base_in_the_manifest_is_the_base(path):
    save(path)
    assert read_manifest(path).base == fingerprint(base_of().items())
    assert os.listdir(path.parent) == [path.name]
