"""Digests and exact key sets."""

import pytest
import torch
from store_samples import tensors_of

from lightning_pet.errors import DeltaFileError
from lightning_pet.store.fingerprint import describe, digest, verify_digests

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_depends_on_every_byte_the_shape_and_the_dtype(dtype):
    tensor = torch.zeros(4, 6).to(dtype)
    changed = torch.zeros(4, 6)
    changed[3, 5] = 1
    digests = {digest(tensor), digest(changed.to(dtype)), digest(tensor.reshape(6, 4)), digest(tensor.reshape(24))}
    digests.add(digest(torch.zeros(4, 6, dtype=torch.float64)))
    assert len(digests) == 5
    assert all(len(text) == 32 for text in digests)


def test_digest_ignores_strides_and_gradients():
    tensor = torch.randn(5, 7)
    assert digest(tensor.t().contiguous().t()) == digest(torch.nn.Parameter(tensor)) == digest(tensor)


def test_digests_are_stable_across_versions():
    # A changed digest makes every file written before unreadable.
    assert digest(torch.arange(6, dtype=torch.float32).reshape(2, 3)) == "e20933188a476ce2418266391f2f8755"


def test_verify_names_the_damaged_tensor():
    tensors = tensors_of(0)
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    verify_digests(tensors, digests)
    tensors["encoder.layer.0.index"] += 1
    with pytest.raises(DeltaFileError, match=r"my\.ckpt.*1 damaged tensors: encoder\.layer\.0\.index") as caught:
        verify_digests(tensors, digests, where="my.ckpt")
    assert caught.value.code == "corrupt"


def test_verify_names_missing_and_extra_tensors():
    with pytest.raises(DeltaFileError, match="1 missing tensors: b; 1 extra tensors: a") as caught:
        verify_digests({"a": torch.ones(1)}, {"b": digest(torch.ones(1))})
    assert caught.value.code == "mismatch"


def test_describe_is_sorted_and_speaks_codes():
    records = describe({"b": torch.ones(2, 3), "a": torch.ones(1, dtype=torch.bool)})
    assert [(record.name, record.dtype, record.shape) for record in records] == [
        ("a", "bool", (1,)),
        ("b", "F32", (2, 3)),
    ]


def test_long_lists_are_cut():
    expected = {f"t{i:02d}": digest(torch.ones(1)) for i in range(20)}
    with pytest.raises(DeltaFileError, match=r"20 missing tensors: t00, t01, t02, t03, t04 and 15 more"):
        verify_digests({}, expected)
