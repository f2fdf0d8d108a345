"""The manifest's closed schema: what it accepts returns whole, everything else is refused by name."""

import copy
import json
import math
from dataclasses import replace

import pytest
from store_samples import manifest_of, tensors_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.model.structure import Target
from lightning_pet.store.fingerprint import describe
from lightning_pet.store.manifest import Manifest, MethodRecord, decode_manifest, encode_manifest
from lightning_pet.store.strict_json import canonical, pack, parse


def plain() -> dict:
    return json.loads(encode_manifest(manifest_of()))


def refused(value: dict | str, text: str, code: str) -> None:
    with pytest.raises(DeltaFileError, match=text) as caught:
        decode_manifest(value if isinstance(value, str) else json.dumps(value), where="x.file")
    assert caught.value.code == code
    assert str(caught.value).startswith("x.file")


def test_round_trip():
    assert decode_manifest(encode_manifest(manifest_of())) == manifest_of()


def test_round_trip_with_tensors():
    records = describe(tensors_of(0))
    manifest = replace(manifest_of(), tensors=records)
    layout = [(record.name, record.dtype, record.shape) for record in records]
    assert decode_manifest(encode_manifest(manifest), reversed(layout)) == manifest


def test_the_text_is_canonical():
    text = encode_manifest(manifest_of())
    assert text == canonical(json.loads(text))
    assert text.isascii()
    assert '"config":{"alpha":8.0,"bias":null,"r":4' in text


def test_tuples_in_a_config_become_lists():
    manifest = Manifest((MethodRecord("m", "n", {"stages": (0.6, 0.4), "pattern": {"a": (1, 2)}}),))
    found = decode_manifest(encode_manifest(manifest)).methods[0].config
    assert found == {"stages": [0.6, 0.4], "pattern": {"a": [1, 2]}}


@pytest.mark.parametrize(
    ("field", "value", "text", "code"),
    [
        ("format", 2, "Upgrade", "version"),
        ("format", 10**30, "Upgrade", "version"),
        ("format", 0, "format: found 0, expected 1", "limit"),
        ("format", True, "format: found True", "schema"),
        ("format", "1", "format: found '1'", "schema"),
        ("step", -1, "step: found -1", "limit"),
        ("step", 1.0, "step: found 1.0", "schema"),
        ("step", False, "step: found False", "schema"),
        ("root", "a..b", "root", "unsafe"),
        ("root", "/etc", "root", "unsafe"),
        ("root", 3, "root: found 3", "schema"),
        ("written_by", "x" * 300, "written_by: found 300 characters", "limit"),
        ("written_by", "a\x1b[2Jb", "control characters", "schema"),
        ("notes", {"a": "x" * 5000}, "notes", "limit"),
        ("notes", {"a": "ä" * 2100}, "notes: found 4201 bytes", "limit"),
        ("notes", {"a": 1}, "notes: found 1", "schema"),
        ("notes", {"a": "\ud800"}, "control characters", "schema"),
        ("methods", [], "found 0 methods", "limit"),
        ("methods", [{}] * 65, "found 65 methods", "limit"),
        ("methods", {}, "methods: found dict", "schema"),
        ("methods", [3], r"methods\[0\]: found 3", "schema"),
        ("base", 5, "base: found 5", "schema"),
        ("base", {}, "base: missing fields: structure", "schema"),
        ("tensors", {"count": 0, "layout": "", "digests": ""}, "64 hexadecimal", "schema"),
        ("tensors", None, "tensors: found NoneType", "schema"),
    ],
)
def test_every_field_is_checked(field, value, text, code):
    refused(plain() | {field: value}, text, code)


@pytest.mark.parametrize(
    ("field", "value", "text", "code"),
    [
        ("method", "../x", "letters, digits", "unsafe"),
        ("method", "", "letters, digits", "unsafe"),
        ("name", "/abs/path", "letters, digits", "unsafe"),
        ("name", "a.b", "letters, digits", "unsafe"),
        ("name", "é", "letters, digits", "unsafe"),
        ("name", "x" * 65, "letters, digits", "unsafe"),
        ("name", ["n"], "name: found list", "schema"),
        ("config", [], "config: found list", "schema"),
        ("config", {"r": {"a": {"b": {"c": {"d": 1}}}}}, "deeper than 8", "limit"),
        ("config", {"t": ["x"] * 20_001}, "20001 items", "limit"),
        ("config", {"r": 10**19}, "beyond 64 bits", "limit"),
        ("config", {"init_text": "x" * 70_000}, "70000 characters", "limit"),
        ("config", {"k" * 300: 1}, "300 characters", "limit"),
        ("targets", "!!", "base64", "schema"),
        ("targets", "AAAA", "zlib", "schema"),
        ("targets", pack(b"\xff\xfe"), "UTF-8", "schema"),
        ("targets", pack(b"[" * 100_000), "deeper than 8", "limit"),
        ("targets", pack(b"[[]" + b",[]" * 200_000 + b"]"), "200002 lists and objects", "limit"),
        ("targets", pack(b"0" * 9_000_000), "inflates to more", "limit"),
        ("targets", pack(b"{}"), "targets: found dict", "schema"),
        ("targets", pack(b"[[]]"), "found 0 fields", "schema"),
        ("targets", pack(b"[" + b"0," * 20_000 + b"0]"), "20001 targets", "limit"),
        ("targets", pack(b'[["a","w","os.system",false,null,null,[]]]'), "role 'os.system'", "schema"),
        ("targets", pack(b'[["a","w",["x"],false,null,null,[]]]'), "role", "schema"),
        ("targets", pack(b'[["a","w",null,0,null,null,[]]]'), "cross: found 0", "schema"),
        ("targets", pack(b'[["a","b.",null,false,null,null,[]]]'), "parameter: found 'b.'", "unsafe"),
        ("targets", pack(b'[["a","w",null,false,null,"a..b",[]]]'), "reads: found 'a..b'", "unsafe"),
        ("targets", pack(b'[["a","w",null,false,null,null,["1"]]]'), "sizes: found '1'", "schema"),
        ("targets", pack(b'[["a","w",null,false,null,null,[-1]]]'), "found -1", "limit"),
        ("targets", pack(b'[["a","w",null,false,null,null,[' + b"1," * 16 + b"1]]]"), "found 17 sizes", "limit"),
        ("targets", pack(b'[["a..b","w",null,false,null,null,[]]]'), "module: found 'a..b'", "unsafe"),
        ("targets", pack(b'[["a","w",null,false,[],null,[]]]'), "found 0 ranges", "limit"),
        ("targets", pack(b'[["a","w",null,false,[[4,4]],null,[]]]'), "first < end", "schema"),
        ("targets", pack(b'[["a","w",null,false,[[-1,4]],null,[]]]'), "found -1", "limit"),
        ("targets", pack(b'[["a","w",null,false,[[1]],null,[]]]'), "no pair", "schema"),
    ],
)
def test_every_field_of_a_method_is_checked(field, value, text, code):
    found = plain()
    found["methods"][0][field] = value
    refused(found, text, code)


def test_missing_and_unknown_fields_are_named():
    found = plain()
    del found["root"]
    found["_class_path"] = "os.system"
    refused(found, "missing fields: root; unknown fields: '_class_path'", "schema")


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ('{"format":1,"format":1}', "'format' twice", "schema"),
        ('{"a":NaN}', "number NaN", "schema"),
        ('{"a":-Infinity}', "number -Infinity", "schema"),
        ('{"a":', "no valid JSON", "corrupt"),
        ("", "no valid JSON", "corrupt"),
        ("[" * 100_000, "deeper", "limit"),
        ('{"a":' * 100_000, "deeper", "limit"),
        ("[" * 200_000, "200000 lists", "limit"),
        ("[]", "found list", "schema"),
        ("9" * 5000, "no valid JSON", "corrupt"),
    ],
)
def test_the_json_is_strict(text, message, code):
    refused(text, message, code)


def test_a_float_that_overflows_is_refused():
    text = encode_manifest(manifest_of()).replace('"alpha":8.0', '"alpha":1e999')
    refused(text, "number inf", "schema")


def test_the_same_name_of_one_method_is_refused():
    found = plain()
    found["methods"].append(copy.deepcopy(found["methods"][0]))
    refused(found, "'lora' named 'default' twice", "schema")


def test_other_tensors_than_at_writing_are_refused():
    records = describe(tensors_of(0))
    text = encode_manifest(replace(manifest_of(), tensors=records))
    layout = [(record.name, record.dtype, record.shape) for record in records]
    for changed in (layout[1:], [("x", *layout[0][1:]), *layout[1:]], [(*layout[0][:2], (9,)), *layout[1:]]):
        with pytest.raises(DeltaFileError, match="not the 3 the manifest was written with") as caught:
            decode_manifest(text, changed)
        assert caught.value.code == "corrupt"


@pytest.mark.parametrize(
    "manifest",
    [
        Manifest(()),
        Manifest((MethodRecord("m", "a.b"),)),
        Manifest((MethodRecord("m", "n", {"alpha": math.nan}),)),
        Manifest((MethodRecord("m", "n", {"alpha": math.inf}),)),
        Manifest((MethodRecord("m", "n", {"f": print}),)),
        Manifest((MethodRecord("m", "n", {3: 4}),)),
        Manifest((MethodRecord("m", "n", {}, (Target("a\x00b"),)),)),
        Manifest((MethodRecord("m", "n", {}, (Target("a", role="other"),)),)),
        Manifest((MethodRecord("m", "n"),), notes={"a": "x" * 5000}),
        Manifest((MethodRecord("m", "n"),), step=-1),
        Manifest((MethodRecord("m", "n"),), format=2),
    ],
)
def test_what_could_not_be_read_is_not_written(manifest):
    with pytest.raises(DeltaFileError):
        encode_manifest(manifest)


def test_a_cyclic_config_ends():
    config: dict = {}
    config["self"] = config
    with pytest.raises(DeltaFileError, match="deeper than 8"):
        encode_manifest(Manifest((MethodRecord("m", "n", config),)))


def test_a_duplicate_among_many_keys_is_found_quickly():
    text = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":1}'
    with pytest.raises(DeltaFileError, match="'99999' twice"):
        parse(text, "x")
