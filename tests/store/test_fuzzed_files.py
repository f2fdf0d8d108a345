"""Damage and forgery at random: a mutant is refused by :class:`DeltaFileError`, or has lost nothing.

Half of the mutants are blind damage (cuts, flips, copies of parts), half know the format: they change
the header's JSON or, as a forger would, the manifest together with its digest.
"""

import json
import random
import time
from dataclasses import replace

import pytest
from store_samples import join, manifest_of, resign, same, save, split, tensors_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.delta_file import read_delta, write_delta
from lightning_pet.store.fingerprint import describe
from lightning_pet.store.manifest import encode_manifest

WORDS = [None, True, False, 0, 1, -1, 2**63, 10**400, 1.5, -0.0, "", "x", "F32", "../x", "os.system", "\ud800", [], {}]
WORDS += [[[]], {"a": {}}, float("nan"), float("inf"), "A" * 300, [0, 4], "__metadata__", "encoder.layer.0.index"]


def cut(draw, data):
    return data[: draw.randrange(len(data))]


def extend(draw, data):
    return data + draw.randbytes(draw.randint(1, 64))


def flip(draw, data):
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zero(draw, data):
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randint(1, 256))
    return data[:start] + bytes(end - start) + data[end:]


def splice(draw, data):
    start, target, length = draw.randrange(len(data)), draw.randrange(len(data)), draw.randint(1, 200)
    part = data[start : start + length]
    return data[:target] + part + data[target + draw.choice((0, len(part))) :]


def new_length(draw, data):
    size = draw.choice((0, 1, 2, len(data) - 8, len(data), 2**32, 2**63, 2**64 - 1, draw.randrange(len(data))))
    return size.to_bytes(8, "little") + data[8:]


def flip_header(draw, data):
    length = int.from_bytes(data[:8], "little")
    position = 8 + draw.randrange(length)
    return data[:position] + bytes([draw.randrange(32, 127)]) + data[position + 1 :]


def places(value, path=()):
    """Every place inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def edit(draw, value):
    """Change one place of a JSON value: another value, gone, renamed, or doubled."""
    *path, last = draw.choice(list(places(value)))
    parent = value
    for key in path:
        parent = parent[key]
    action = draw.choice(("set", "set", "set", "delete", "rename", "grow"))
    if action == "delete":
        del parent[last]
    elif action == "rename" and isinstance(parent, dict):
        parent[draw.choice(("x", "_class_path", "r", "../x", "format"))] = parent.pop(last)
    elif action == "grow" and isinstance(parent, list):
        parent.extend([parent[last]] * draw.choice((1, 3, 3000)))
    elif action == "grow" and isinstance(parent[last], str):
        parent[last] *= draw.choice((2, 300))
    else:
        parent[last] = draw.choice(WORDS)
    return value


def edit_header(draw, data):
    header, values = split(data)
    return join(json.dumps(edit(draw, header)).encode(), values)


def forge_manifest(draw, data):
    header, values = split(data)
    manifest = json.loads(header["__metadata__"]["pet.manifest"])
    for _ in range(draw.choice((1, 1, 2))):
        manifest = edit(draw, manifest)
    return join(resign(header, manifest), values)


def forge_text(draw, data):
    header, values = split(data)
    text = header["__metadata__"]["pet.manifest"]
    position = draw.randrange(len(text))
    changed = (
        text[:position] + chr(draw.choice((0, 34, 44, 48, 57, 91, 93, 125, 0xD800, 0x1F600))) + text[position + 1 :]
    )
    return join(resign(header, changed), values)


MUTATIONS = (cut, extend, flip, zero, splice, new_length, flip_header, edit_header, forge_manifest, forge_text)
FORGERIES = (forge_manifest, forge_text)


def attempt(path, mutation, mutant, expected):
    """Read one mutant; returns whether it was refused."""
    path.write_bytes(mutant)
    start, refusal = time.process_time(), None
    try:
        found = read_delta(path)
    except DeltaFileError as error:
        refusal = str(error)
    assert time.process_time() - start < 0.5
    if refusal is None:
        # Nothing else than a forged manifest may have changed, and what it says must be storable again.
        same(found.tensors, tensors_of(0))
        assert mutation in FORGERIES or found.manifest == expected
        encode_manifest(found.manifest)
        return False
    assert str(path) in refusal
    assert len(refusal) < 1500
    return True


def campaign(tmp_path, count, seed):
    path, draw = tmp_path / "x.pet.safetensors", random.Random(seed)
    save(path)
    data, expected = path.read_bytes(), replace(manifest_of(), tensors=describe(tensors_of(0)))
    assert read_delta(path).manifest == expected
    refused = {mutation: 0 for mutation in MUTATIONS}
    for index in range(count):
        mutation = MUTATIONS[index % len(MUTATIONS)]
        mutant = mutation(draw, data)
        try:
            refused[mutation] += mutant == data or attempt(path, mutation, mutant, expected)
        except BaseException:
            print(f"seed {seed}, mutant {index} by {mutation.__name__}: {mutant!r}")
            raise
    for mutation, number in refused.items():
        floor = 0.5 if mutation in FORGERIES else 0.95
        assert number >= floor * (count // len(MUTATIONS)), (mutation.__name__, number)


def test_mutants_are_refused_or_identical(tmp_path):
    campaign(tmp_path, 1_500, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_mutants_are_refused_or_identical(tmp_path, seed):
    campaign(tmp_path, 10_000, seed)


def test_every_single_bit_counts(tmp_path):
    """Each byte of a small file, changed by one bit, is noticed: no region is left without a check."""
    path = tmp_path / "x"
    write_delta(path, {"t": tensors_of(0)["encoder.layer.0.index"]}, replace(manifest_of(), base=None))
    data, accepted = path.read_bytes(), []
    for position in range(len(data)):
        changed = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        path.write_bytes(changed)
        try:
            read_delta(path)
        except DeltaFileError:
            continue
        accepted.append(position)
    assert accepted == []
