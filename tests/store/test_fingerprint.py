"""Which changes of a base are recognised, and which casts are accepted."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from store_samples import base_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.fingerprint import Verdict, compare, fingerprint
from lightning_pet.store.manifest import from_plain, to_plain
from lightning_pet.store.strict_json import canonical, pack, parse_packed

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def cast(base, dtype):
    return {name: tensor.to(dtype) for name, tensor in base.items()}


def noisy(base):
    return {name: tensor + 1e-6 * tensor.abs().clamp(min=1) for name, tensor in base.items()}


def one_changed(base, change):
    return {**base, "layer.2.weight": change(base["layer.2.weight"])}


CHANGES = {
    "another seed": lambda base: base_of(1),
    "noise of 1e-6 everywhere": noisy,
    "noise of 1e-6 in one tensor": lambda base: one_changed(base, lambda t: t * (1 + 1e-6)),
    "permuted rows": lambda base: one_changed(base, lambda t: t.roll(1, 0)),
    "a merged low-rank update": lambda base: one_changed(
        base, lambda t: t + 1e-3 * torch.ones(48, 1) @ torch.ones(1, 32)
    ),
    "zeroed tensor": lambda base: one_changed(base, torch.zeros_like),
    "one scalar": lambda base: {**base, "scale": base["scale"] + 1e-6},
    "two tensors exchanged": lambda base: {
        **base,
        "layer.0.weight": base["layer.1.weight"],
        "layer.1.weight": base["layer.0.weight"],
    },
    "another seed, cast": lambda base: cast(base_of(1), torch.bfloat16),
    "one tensor off by 2 %, cast": lambda base: cast(one_changed(base, lambda t: t * 1.02), torch.bfloat16),
    "NaN": lambda base: one_changed(base, lambda t: t * float("nan")),
    "NaN, cast": lambda base: cast(one_changed(base, lambda t: t * float("nan")), torch.float16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_base_is_recognised(change):
    found = compare(fingerprint(base_of().items()), change(base_of()).items())
    assert found.verdict is Verdict.DIFFERENT, found
    assert found.tensors
    assert found.tensors[0] in found.explanation


def test_the_changed_tensor_is_named():
    found = compare(fingerprint(base_of().items()), CHANGES["noise of 1e-6 in one tensor"](base_of()).items())
    assert found.tensors == ("layer.2.weight",)
    assert "1 of 9 base tensors differ: layer.2.weight" in found.explanation


@pytest.mark.parametrize(("then", "now"), list(itertools.permutations(FLOATS, 2)), ids=str)
def test_a_cast_is_accepted(then, now):
    # Values over many magnitudes, with float16 subnormals and ties of bfloat16 among them.
    base = base_of()
    base["layer.0.weight"] *= torch.logspace(-7, 3, 48)[:, None]
    base["layer.1.weight"] = 1 + torch.arange(48 * 32).reshape(48, 32) / 512
    old = cast(base, then)
    assert compare(fingerprint(old.items()), cast(old, now).items()).verdict is Verdict.CAST


@pytest.mark.parametrize("now", FLOATS[2:])
def test_no_cast_is_mistaken_over_many_seeds(now):
    for seed in range(30):
        base = base_of(seed)
        assert compare(fingerprint(base.items()), cast(base, now).items()).verdict is Verdict.CAST


def test_a_partly_cast_base_is_accepted():
    base = base_of()
    mixed = {name: tensor if tensor.ndim < 2 else tensor.bfloat16() for name, tensor in base.items()}
    found = compare(fingerprint(base.items()), mixed.items())
    assert found.verdict is Verdict.CAST
    assert "4 of 9" in found.explanation
    assert "F32 then, BF16 now" in found.explanation


def test_the_same_dtype_is_compared_by_bits():
    base = cast(base_of(), torch.bfloat16)
    next_up = {name: torch.nextafter(tensor, torch.tensor(9.0).bfloat16()) for name, tensor in base.items()}
    assert compare(fingerprint(base.items()), next_up.items()).verdict is Verdict.DIFFERENT


def test_equal_whatever_order_strides_and_container():
    base = base_of()
    strided = {name: torch.nn.Parameter(tensor.t().contiguous().t()) for name, tensor in reversed(base.items())}
    assert not strided["layer.0.weight"].is_contiguous()
    assert fingerprint(strided.items(), exact=True) == fingerprint(base.items(), exact=True)
    found = compare(fingerprint(base.items()), strided.items())
    assert found.verdict is Verdict.SAMPLED_EQUAL
    assert found.tensors == ()


def test_exact_finds_what_no_sample_sees():
    base = base_of()
    expected = fingerprint(base.items(), exact=True)
    found = compare(expected, base.items(), exact=True)
    assert found.verdict is Verdict.EXACT
    flat = base["layer.3.weight"].flatten()
    for index in range(flat.numel()):
        changed = {**base, "layer.3.weight": flat.index_add(0, torch.tensor([index]), torch.ones(1)).view(48, 32)}
        if compare(expected, changed.items()).verdict is Verdict.SAMPLED_EQUAL:
            break
    else:
        pytest.fail("every single value was sampled")
    assert compare(expected, changed.items(), exact=True).verdict is Verdict.DIFFERENT


def test_exact_without_a_digest_says_so():
    found = compare(fingerprint(base_of().items()), base_of().items(), exact=True)
    assert found.verdict is Verdict.SAMPLED_EQUAL
    assert "no digest of every byte" in found.explanation


def test_exact_of_a_cast_base_is_a_cast():
    found = compare(fingerprint(base_of().items(), exact=True), cast(base_of(), torch.float16).items(), exact=True)
    assert found.verdict is Verdict.CAST


def test_the_structure_is_compared_by_name():
    base = base_of()
    expected = fingerprint(base.items())
    changed = {name: tensor for name, tensor in base.items() if not name.startswith("layer.3")}
    changed |= {"head.weight": torch.ones(2), "layer.0.weight": torch.ones(48, 31)}
    found = compare(expected, changed.items())
    assert found.verdict is Verdict.DIFFERENT
    for text in ("2 missing: layer.3.bias, layer.3.weight", "1 extra: head.weight", "[48, 32] then, [48, 31] now"):
        assert text in found.explanation
    assert found.tensors == ("layer.3.bias", "layer.3.weight", "head.weight", "layer.0.weight")


def test_meta_tensors_are_unverified_but_their_shapes_count():
    expected = fingerprint(base_of().items())
    meta = {name: tensor.to("meta") for name, tensor in base_of().items()}
    found = compare(expected, meta.items())
    assert found.verdict is Verdict.UNVERIFIED
    assert "F32 then, opaque:meta now" in found.explanation
    assert compare(expected, {**meta, "scale": torch.ones(2)}.items()).verdict is Verdict.DIFFERENT
    assert compare(fingerprint(meta.items(), exact=True), base_of().items()).verdict is Verdict.UNVERIFIED


def test_quantised_tensors_are_unverified_whatever_their_shape():
    base = base_of()
    packed = one_changed(base, lambda t: torch.randint(0, 255, (t.numel() // 2, 1), dtype=torch.uint8))
    found = compare(fingerprint(base.items()), packed.items())
    assert found.verdict is Verdict.UNVERIFIED
    assert found.tensors == ("layer.2.weight",)
    assert compare(fingerprint(packed.items()), base.items()).verdict is Verdict.UNVERIFIED
    assert compare(fingerprint(packed.items()), packed.items()).verdict is Verdict.SAMPLED_EQUAL
    other = {**packed, "layer.2.weight": packed["layer.2.weight"] + 1}
    assert compare(fingerprint(packed.items()), other.items()).verdict is Verdict.UNVERIFIED
    # What is not quantised still counts.
    assert compare(fingerprint(base.items()), {**packed, "scale": torch.ones(())}.items()).verdict is Verdict.DIFFERENT


def test_a_tensor_subclass_is_not_read():
    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert "take" not in str(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    wrapped = one_changed(base_of(), lambda t: t.as_subclass(Quantised))
    found = compare(fingerprint(base_of().items()), wrapped.items())
    assert found.verdict is Verdict.UNVERIFIED
    assert "opaque:Quantised now" in found.explanation


def test_empty_tensors_and_empty_bases():
    base = {"a": torch.empty(0, 3), "b": torch.ones(1)}
    assert compare(fingerprint(base.items(), exact=True), base.items(), exact=True).verdict is Verdict.EXACT
    assert compare(fingerprint([]), []).verdict is Verdict.SAMPLED_EQUAL


def test_random_state_is_left_alone_and_no_gradient_is_needed():
    before = torch.get_rng_state()
    fingerprint([("w", torch.nn.Parameter(torch.ones(600)))])
    assert torch.equal(before, torch.get_rng_state())


def test_fingerprints_are_stable_across_versions():
    # A changed sampling rule makes every base look different from the one trained on.
    base = {"w": torch.arange(6000, dtype=torch.float32).reshape(60, 100), "b": torch.arange(3.0).bfloat16()}
    found = fingerprint(base.items(), exact=True)
    assert found.structure == "0fa801f8bb13da5ea50a6dc13a8f17f74595cdeeda686e1562276ce8f3d21780"
    assert found.sample == "be275757bd572894260a2bb07bcf0221dd6f23e9f9eab42c4297ab3e054422fc"
    assert found.exact == "7ad7c9d2a3b2fb57b43f5464df2d2a51e8f5f00275a2f245ccd17ad8ab4f9cfa"
    assert found.dtypes == {"BF16": 1, "F32": 1}


def test_its_work_grows_with_the_number_of_parameters_not_with_their_size():
    """Calls are counted: a clock would say something of the machine."""

    def calls(count: int, side: int) -> int:
        base = [(f"h.{i}.weight", torch.ones(side, side)) for i in range(count)]
        fingerprint(base)
        seen = []
        sys.setprofile(lambda frame, event, arg: seen.append(event) if event.endswith("call") else None)
        fingerprint(base)
        sys.setprofile(None)
        return len(seen)

    few, many, large = calls(50, 8), calls(100, 8), calls(50, 512)
    assert many <= 2.2 * few
    assert large <= 1.5 * few
    assert few <= 50 * 100


def test_plain_round_trip():
    for exact in (False, True):
        found = fingerprint(base_of().items(), exact=exact)
        assert from_plain(to_plain(found), "x") == found


LAYOUT = parse_packed(fingerprint(base_of().items()).layout, "x")
DUPLICATE = pack(canonical([LAYOUT[0], *LAYOUT]).encode())
WIDE = pack(canonical([["a", "F32", [1] * 17]]).encode())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"structure": "0" * 64}, "structure: is not the digest"),
        ({"structure": "0" * 63}, "structure: found"),
        ({"sample": None}, "sample: found"),
        ({"exact": 5}, "exact: found 5"),
        ({"leaves": "AAAA"}, "leaves: found 3 bytes, expected 36"),
        ({"sketch": pack(b"\0\0")}, "sketch: found 1 values"),
        ({"sketch": pack(b"\0")}, "sketch: found 1 bytes"),
        ({"sketch": "x"}, "sketch: found no base64"),
        ({"dtypes": {"F32": 8}}, "dtypes: does not count"),
        ({"dtypes": {"F32": "9"}}, "dtypes.'F32': found '9'"),
        ({"layout": DUPLICATE}, "out of order"),
        ({"layout": WIDE}, "17 dimensions"),
        ({"layout": pack(b"[[1,2,3]]")}, "layout: found 1"),
        ({"layout": pack(b"[[1,2]]")}, "row of 2 fields"),
        ({"layout": pack(b"[]")}, "structure: is not the digest"),
        ({"extra": 1}, "unknown fields: 'extra'"),
    ],
)
def test_an_inconsistent_fingerprint_is_refused(change, text):
    plain = to_plain(fingerprint(base_of().items())) | change
    with pytest.raises(DeltaFileError, match=text) as caught:
        from_plain(plain, "x.file")
    assert caught.value.code in ("schema", "limit")


def test_a_collision_of_all_leaves_is_still_different():
    expected = replace(fingerprint(base_of().items()), sample="0" * 64)
    assert compare(expected, base_of().items()).verdict is Verdict.DIFFERENT
