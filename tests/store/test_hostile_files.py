"""Files made to harm: each is refused with its code, soon, with little memory, and without running anything."""

import json
import os
import pickle
import resource
import socket
import struct
import sys
import time
import zlib

import pytest
import torch
from store_samples import join, manifest_of, resign, save, split, tensors_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.store import delta_file
from lightning_pet.store.delta_file import read_delta
from lightning_pet.store.manifest import read_manifest
from lightning_pet.store.strict_json import encode64, pack

SECONDS, MEGABYTES = 2.0, 256
_audited: list[str] | None = None


def _audit(event, arguments):
    if _audited is not None and event.split(".")[0] not in ("open", "object", "sys"):
        _audited.append(f"{event} {arguments}")


sys.addaudithook(_audit)


class Exploit:
    def __reduce__(self):
        return (os.system, ("touch exploited",))


@pytest.fixture
def good(tmp_path):
    save(tmp_path / "good")
    return (tmp_path / "good").read_bytes()


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def with_manifest(data, change):
    header, values = split(data)
    manifest = json.loads(header["__metadata__"]["pet.manifest"])
    change(manifest)
    return join(resign(header, manifest), values)


def with_text(data, text):
    header, values = split(data)
    return join(resign(header, text), values)


def with_method(data, **fields):
    return with_manifest(data, lambda manifest: manifest["methods"][0].update(fields))


def with_tensor(data, name, **fields):
    header, values = split(data)
    header[name] = entry(**fields)
    return join(header, values)


def with_metadata(data, **fields):
    header, values = split(data)
    header["__metadata__"].update(fields)
    return join(header, values)


def many(count):
    return json.dumps({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(count)}).encode()


def config_of(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return {"r": value}


ROWS = json.dumps([[f"m.{i}", "weight", None, False, [[j, j + 1] for j in range(0, 256, 8)]] for i in range(20_000)])
BOMB = encode64(zlib.compress(b"0" * 300_000_000, 9))
NESTED = pack(b"[" + b"[]," * 2_700_000 + b"[]]")
LAYOUT = pack(b'[["a","F32",[' + b"9223372036854775807," * 300_000 + b"1]]]")

HOSTILE = {
    "empty file": ("corrupt", lambda good: b""),
    "eight bytes": ("corrupt", lambda good: good[:8]),
    "header cut": ("corrupt", lambda good: good[:100]),
    "values cut": ("corrupt", lambda good: good[:-1]),
    "one byte more": ("corrupt", lambda good: good + b"\0"),
    "polyglot with a zip behind": ("corrupt", lambda good: good + b"PK\x03\x04payload"),
    "header length of 2**63": ("corrupt", lambda good: struct.pack("<Q", 2**63) + good[8:]),
    "header length of 0": ("corrupt", lambda good: struct.pack("<Q", 0) + good[8:]),
    "header beyond its limit": ("limit", lambda good: join(b"{" + b" " * (5 << 20) + b"}")),
    "header of random bytes": ("corrupt", lambda good: join(b"{\xff\xfe\xfd}")),
    "header is a list": ("corrupt", lambda good: join(b"[]")),
    "header with a byte order mark": ("corrupt", lambda good: join(b"\xef\xbb\xbf{}")),
    "deep header": ("limit", lambda good: join(b'{"a":' * 500_000)),
    "deep lists in the header": ("limit", lambda good: join(b'{"a":' + b"[" * 3_000_000)),
    "duplicate tensor": ("schema", lambda good: join(b'{"a":1,"a":1}')),
    "duplicate among many": ("schema", lambda good: join(many(45_000)[:-1] + b',"t44999":0}')),
    "many empty tensors": ("limit", lambda good: join(many(60_000))),
    "just too many empty tensors": ("limit", lambda good: join(many(21_000))),
    "no metadata": ("schema", lambda good: join({"a": entry()}, b"0000")),
    "metadata is a list": ("schema", lambda good: join({"__metadata__": []})),
    "metadata holds a number": ("schema", lambda good: with_metadata(good, format=3)),
    "metadata of another library": ("schema", lambda good: with_metadata(good, extra="x")),
    "another manifest digest": ("corrupt", lambda good: with_metadata(good, **{"pet.sha256": "0" * 64})),
    "no digest": ("corrupt", lambda good: with_metadata(good, **{"pet.sha256": ""})),
    "huge shape": ("limit", lambda good: with_tensor(good, "a", shape=(2**62, 2**62))),
    "huge empty shape": ("limit", lambda good: with_tensor(good, "a", shape=(0, 2**62, 2**62), offsets=(0, 0))),
    "shape beyond 64 bits": ("limit", lambda good: with_tensor(good, "a", shape=(10**30,))),
    "negative shape": ("limit", lambda good: with_tensor(good, "a", shape=(-1,))),
    "fractional shape": ("schema", lambda good: with_tensor(good, "a", shape=(1.0,))),
    "true as a shape": ("schema", lambda good: with_tensor(good, "a", shape=(True,))),
    "nine dimensions": ("limit", lambda good: with_tensor(good, "a", shape=(1,) * 9)),
    "offsets beyond the file": ("corrupt", lambda good: with_tensor(good, "a", offsets=(2**40, 2**40 + 4))),
    "overlapping tensors": ("corrupt", lambda good: with_tensor(good, "a", offsets=(0, 4))),
    "backward offsets": ("corrupt", lambda good: with_tensor(good, "a", offsets=(8, 4))),
    "three offsets": ("limit", lambda good: with_tensor(good, "a", offsets=(0, 4, 8))),
    "unknown dtype": ("schema", lambda good: with_tensor(good, "a", dtype="BOOL")),
    "dtype as a list": ("schema", lambda good: with_tensor(good, "a", dtype=["F32"])),
    "absolute tensor name": ("unsafe", lambda good: with_tensor(good, "/etc/passwd")),
    "tensor name that climbs": ("unsafe", lambda good: with_tensor(good, "../../x")),
    "empty tensor name": ("unsafe", lambda good: with_tensor(good, "")),
    "control characters in a name": ("schema", lambda good: with_tensor(good, "a\x1b[2Jb")),
    "newline in a name": ("unsafe", lambda good: with_tensor(good, "a\nb")),
    "long tensor name": ("limit", lambda good: with_tensor(good, "a" * 300)),
    "a tensor more than signed": ("corrupt", lambda good: with_tensor(good, "z", shape=(0,), offsets=(116, 116))),
    "manifest of deep lists": ("limit", lambda good: with_text(good, "[" * 3_000_000)),
    "manifest with surrogates": ("schema", lambda good: with_manifest(good, lambda m: m.update(root="\ud800"))),
    "manifest is null": ("schema", lambda good: with_text(good, "null")),
    "manifest is no JSON": ("corrupt", lambda good: with_text(good, "__import__('os')")),
    "duplicate key in the manifest": ("schema", lambda good: with_text(good, '{"format":1,"format":1}')),
    "NaN in the manifest": ("schema", lambda good: with_text(good, '{"format":NaN}')),
    "newer format": ("version", lambda good: with_manifest(good, lambda m: m.update(format=99))),
    "a class to import": ("schema", lambda good: with_manifest(good, lambda m: m.update(_class_path="os.system"))),
    "a class in a method": ("schema", lambda good: with_method(good, _instantiator="os.system")),
    "absolute delta name": ("unsafe", lambda good: with_method(good, name="/tmp/x")),
    "delta name that climbs": ("unsafe", lambda good: with_method(good, name="..")),
    "method of a module": ("unsafe", lambda good: with_method(good, method="os.system")),
    "deep configuration": ("limit", lambda good: with_method(good, config=config_of(7))),
    "deeper configuration": ("limit", lambda good: with_method(good, config=config_of(900))),
    "infinite configuration": ("schema", lambda good: with_method(good, config={"alpha": float("inf")})),
    "long text": ("limit", lambda good: with_method(good, config={"x": "a" * 3_000_000})),
    "long list": ("limit", lambda good: with_method(good, config={"x": [0] * 1_000_000})),
    "targets that inflate": ("limit", lambda good: with_method(good, targets=BOMB)),
    "targets of empty lists": ("limit", lambda good: with_method(good, targets=NESTED)),
    "more ranges than fit": ("limit", lambda good: with_method(good, targets=pack(ROWS.encode()))),
    "many methods": ("limit", lambda good: with_manifest(good, lambda m: m["methods"].extend([{}] * 20_000))),
    "base with a huge layout": ("limit", lambda good: with_manifest(good, lambda m: m["base"].update(layout=LAYOUT))),
    "base with a bomb": ("limit", lambda good: with_manifest(good, lambda m: m["base"].update(sketch=BOMB))),
    "base of another structure": (
        "schema",
        lambda good: with_manifest(good, lambda m: m["base"].update(structure="0" * 64)),
    ),
    "too few digests": ("schema", lambda good: with_manifest(good, lambda m: m["tensors"].update(digests=""))),
    "exchanged digests": ("corrupt", lambda good: with_manifest(good, lambda m: m["tensors"].update(digests="A" * 64))),
    "pickle, protocol 2": ("unsafe", lambda good: pickle.dumps(Exploit(), protocol=2)),
    "pickle, protocol 4": ("unsafe", lambda good: pickle.dumps(Exploit(), protocol=4)),
    "pickle, protocol 5": ("unsafe", lambda good: pickle.dumps([Exploit(), "x" * 100_000], protocol=5)),
    "pickle, protocol 0": ("corrupt", lambda good: pickle.dumps(Exploit(), protocol=0)),
    "another format": ("corrupt", lambda good: b"\x89PNG\r\n\x1a\n" + bytes(100)),
}


def refuse(path, code):
    """Read ``path`` and check how it is refused; return the message."""
    global _audited
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _audited = []
    try:
        with pytest.raises(DeltaFileError) as caught:
            read_delta(path)
    finally:
        events, _audited = _audited, None
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024
    assert events == []
    assert caught.value.code == code, caught.value
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(("code", "make"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, good, code, make):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pet.safetensors"
    path.write_bytes(make(good))
    assert str(path) in refuse(path, code)
    if make is not HOSTILE["exchanged digests"][1]:  # the one fault that shows in the values only
        with pytest.raises(DeltaFileError) as caught:
            read_manifest(path)
        assert caught.value.code == code
    assert not (tmp_path / "exploited").exists()


def test_a_checkpoint_is_refused_by_its_content(tmp_path):
    for name in ("x.ckpt", "x.bin", "x.pet.safetensors"):
        torch.save({"state_dict": tensors_of(0)}, tmp_path / name)
        assert "pickle" in refuse(tmp_path / name, "unsafe")


def test_special_files_are_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "to_pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        refuse(tmp_path / "socket", "io")
    assert "pipe" in refuse(tmp_path / "pipe", "unsafe")
    assert "pipe" in refuse(tmp_path / "to_pipe", "unsafe")
    assert "folder" in refuse(tmp_path / "folder", "unsafe")
    refuse("/dev/zero", "unsafe")
    refuse(tmp_path / "loop", "io")
    refuse(tmp_path / "dangling", "io")
    refuse(tmp_path / "none", "io")
    refuse(f"{tmp_path}/a\0b", "io")


def test_a_sparse_file_beyond_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(9 << 30)
    refuse(tmp_path / "x", "limit")


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch, good):
    path = tmp_path / "x"
    path.write_bytes(good)
    original = delta_file.read_header

    def shrink(*arguments):
        header = original(*arguments)
        os.truncate(path, len(good) - 20)
        return header

    monkeypatch.setattr(delta_file, "read_header", shrink)
    with pytest.raises(DeltaFileError, match="the file ended after") as caught:
        read_delta(path)
    assert caught.value.code == "corrupt"


def test_the_good_file_is_accepted(tmp_path):
    save(tmp_path / "good")
    assert read_delta(tmp_path / "good").manifest.methods == manifest_of().methods
