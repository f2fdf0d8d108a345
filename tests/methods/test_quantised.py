"""Every method on bases that torchao and bitsandbytes quantised for real, on the CPU."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_pet import (
    AdaLoRACallback,
    AdapterBiasCallback,
    AdapterCallback,
    BitFitCallback,
    CompacterCallback,
    DiffPruningCallback,
    FullFineTuningCallback,
    HiRACallback,
    HRACallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LayerFreezingCallback,
    LoRACallback,
    MiSSCallback,
    NotMergeableError,
    OFTCallback,
    PrefixTuningCallback,
    PromptTuningCallback,
    SHiRACallback,
    TargetError,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.insertion.commit import refresh
from lightning_pet.model.quantised import format_of, is_quantised, numbers_in
from tests.quantised_models import FORMATS, dense_twin, int8_activations

from . import zoo
from .battery import perturb

DOCS = Path(__file__).parents[2] / "docs" / "quantisation.md"
METHODS = {
    "LoRA": lambda: LoRACallback(r=2, target_modules="all-linear"),
    "LoRA, DoRA": lambda: LoRACallback(r=2, use_dora=True),
    "LoRA, PiSSA": lambda: LoRACallback(r=2, init="pissa"),
    "LoRA, OLoRA": lambda: LoRACallback(r=2, init="olora"),
    "AdaLoRA": lambda: AdaLoRACallback(init_r=2, target_r=1),
    "(IA)³": lambda: IA3Callback(),
    "MiSS": lambda: MiSSCallback(r=4),
    "OFT": lambda: OFTCallback(oft_block_size=4),
    "HRA": lambda: HRACallback(r=4),
    "adapter, Houlsby": lambda: AdapterCallback(bottleneck_size=4),
    "adapter, Pfeiffer": lambda: AdapterCallback(bottleneck_size=4, placement="pfeiffer"),
    "adapter, parallel": lambda: AdapterCallback(bottleneck_size=4, placement="parallel"),
    "Compacter": lambda: CompacterCallback(reduction_factor=2, phm_dim=2),
    "AdapterBias": lambda: AdapterBiasCallback(),
    "prefix tuning": lambda: PrefixTuningCallback(length=3, projection=False),
    "prompt tuning": lambda: PromptTuningCallback(length=3),
    "BitFit": lambda: BitFitCallback(),
    "diff pruning": lambda: DiffPruningCallback(),
    "HiRA": lambda: HiRACallback(r=2),
    "SHiRA": lambda: SHiRACallback(r=1),
    "intrinsic dimension (SAID)": lambda: IntrinsicDimensionCallback(d=60),
    "intrinsic dimension (DID)": lambda: IntrinsicDimensionCallback(d=60, structure_aware=False),
    "layer freezing": lambda: LayerFreezingCallback(train_last=1),
    "full fine-tuning": lambda: FullFineTuningCallback(),
}
VALUES = ["torchao int8", "bitsandbytes nf4"]


def bert(quantise):
    model, run = zoo.bert()
    quantise(model).eval()
    for module in model.modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
            module.train()  # in evaluation one quantises its input too, and the other wants more features than these
    return model, run


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outcome(method, name):
    """What the table of the documentation says, found out."""
    model, run = bert(FORMATS[name])
    twin, before = dense_twin(model), run(model).detach()
    base = model.bert.encoder.layer[0].attention.self.query.weight
    torch.manual_seed(3)
    try:
        adapted = apply(model, [method()])
    except TargetError as error:
        found = re.search(r"is stored as (.+?)(?: and |, )", str(error))
        return "refused" if found and found[1] == format_of(base) and torch.equal(run(model), before) else str(error)
    torch.manual_seed(3)
    other = apply(twin, [method()])
    for each in (adapted, other):
        perturb(each, 0.1)
    ours, theirs = (trained(m) for m in (model, twin))
    assert ours.keys() == theirs.keys() or method is METHODS["BitFit"]
    assert {p.dtype for p in ours.values()} == {torch.float32}
    outputs = [run(m) for m in (model, twin)]
    assert torch.allclose(*outputs, atol=1e-5)
    if method is not METHODS["BitFit"]:  # whose deltas lie elsewhere in the twin
        for output in outputs:
            output.sin().sum().backward()
        for parameter, same in zip(ours.values(), theirs.values(), strict=True):
            scale = 1 + same.grad.abs().max()
            assert torch.allclose(parameter.grad, same.grad, atol=1e-5 * scale), "the quantised layers lose gradient"
    with adapted.disabled():
        assert torch.equal(run(model), before)
    moved, found = run(model).detach(), merging(adapted, model)
    if found == "no merge":
        adapted.remove()
        assert torch.equal(run(model), before)
        assert not any(".pet" in name for name, _ in model.named_modules())
    else:
        assert torch.allclose(run(model), moved, atol=1e-5)
    return found


def merging(adapted, model):
    weights = {name for name, p in model.named_parameters() if is_quantised(p)}
    try:
        adapted.merge_()
    except NotMergeableError:
        try:
            adapted.merge_(dequantize=True)
        except NotMergeableError:
            return "no merge"
        assert {name for name, p in model.named_parameters() if is_quantised(p)} < weights
        return "merges, dequantised"
    assert {name for name, p in model.named_parameters() if is_quantised(p)} == weights
    return "merges"


def table():
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in DOCS.read_text().splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == "method")
    return {
        row[0]: dict(zip(rows[start][1:], row[1:], strict=True)) for row in rows[start + 2 : start + 2 + len(METHODS)]
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_method_does_what_the_documentation_says(name):
    documented = table()
    assert list(documented) == list(METHODS)
    assert {label: outcome(method, name) for label, method in METHODS.items()} == {
        label: cells[name] for label, cells in documented.items()
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_fresh_delta_changes_nothing(name):
    model, run = bert(FORMATS[name])
    with torch.no_grad():
        before = run(model)
        for options in ({}, {"use_dora": True}, {"init": "pissa"}):
            adapted = apply(model, [LoRACallback(r=2, **options)])
            assert torch.equal(run(model), before), options
            adapted.remove()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = run(model)
            apply(model, [LoRACallback(r=2)])
            assert torch.equal(run(model), mixed)


def test_packed_weights_are_counted_by_what_they_stand_for():
    model, _ = bert(FORMATS["bitsandbytes nf4"])
    plain, _ = zoo.bert()
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert (tuple(weight.shape), numbers_in(weight), format_of(weight)) == ((192, 1), 384, "bitsandbytes nf4")
    plans = [apply(m, [LoRACallback(budget=0.05, verbose=False)]).plan() for m in (model, plain)]
    assert plans[0].base == plans[1].base == sum(p.numel() for p in zoo.bert()[0].parameters())
    assert plans[0].trainable == plans[1].trainable


@pytest.mark.parametrize("name", VALUES)
def test_a_file_loads_onto_the_quantised_and_onto_the_float_base(name, tmp_path, recwarn):
    path = tmp_path / "d.pet.safetensors"
    model, run = bert(FORMATS[name])
    perturb(apply(model, [LoRACallback(r=2), BitFitCallback()]))
    save_delta(model, path, exact=True)
    again, _ = bert(FORMATS[name])
    load_delta(again, path, base_check="exact")  # every byte of every part
    assert torch.equal(run(again), run(model))
    assert not [w for w in recwarn if "could not be compared" in str(w.message)]
    plain, _ = zoo.bert()
    with pytest.warns(match="could not be compared"):
        adapted = load_delta(plain, path)
    assert (run(plain) - run(model)).abs().max() < 0.5 * run(model).abs().max()
    adapted.merge_()
    other, _ = bert(FORMATS[name])
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(ValueError, match="was trained on another base model"):
        load_delta(other, path)


def test_a_file_of_a_float_base_loads_onto_a_quantised_one(tmp_path):
    plain, run = zoo.bert()
    perturb(apply(plain, [LoRACallback(r=2), BitFitCallback()]))
    save_delta(plain, tmp_path / "d.pet.safetensors")
    for name in VALUES:
        model, _ = bert(FORMATS[name])
        with pytest.warns(match="could not be compared"):
            load_delta(model, tmp_path / "d.pet.safetensors")
        assert (run(plain) - run(model)).abs().max() < 0.5 * run(plain).abs().max()


@pytest.mark.parametrize("name", VALUES)
def test_biases_train_in_full_precision_whatever_the_layer_computes_in(name):
    model, run = bert(FORMATS[name])
    apply(model, [BitFitCallback()])
    with torch.autocast("cpu", torch.bfloat16):
        run(model.train()).float().sum().backward()
    assert {(p.dtype, p.grad is not None) for p in trained(model).values()} == {(torch.float32, True)}
    assert sum(p.numel() for p in trained(model).values()) == apply(zoo.bert()[0], [BitFitCallback()]).plan().trainable


def test_a_weight_that_is_read_and_not_called_is_refused_by_name():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.first(x), self.inner.weight)

    model, x = FORMATS["torchao int8"](Reading()), torch.randn(2, 8)
    before = model(x)
    message = r"inner\.weight is stored as torchao Int8Tensor.*read without a call"
    with pytest.raises(TargetError, match=message):
        apply(model, [LoRACallback(r=2, target_modules=["inner"])], forward=lambda: model(x))
    assert torch.equal(model(x), before)


def test_a_weight_that_is_quantised_under_a_delta_that_adds_to_it_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapted = apply(model, [DiffPruningCallback(density=0.5)], forward=lambda: model(torch.ones(1, 8)))
    FORMATS["torchao int8"](model)
    with pytest.raises(TargetError, match=r"0\.weight is stored as torchao Int8Tensor"):
        refresh(adapted.root)


def test_heads_that_are_quantised_are_refused_and_may_be_left_as_they_are():
    model, _ = zoo.bert()
    FORMATS["torchao int8"](model, skip=())
    with pytest.raises(TargetError, match=r"classifier\.weight is stored as torchao Int8Tensor and cannot train.*head"):
        apply(model, [LoRACallback(r=2)])
    assert apply(model, [LoRACallback(r=2, modules_to_save=[])]).record.trained_names == ()


def test_an_evaluation_does_not_end_the_training_of_what_is_before():
    """bitsandbytes would repack the weights on this occasion, on CPUs that have the instructions for it."""
    linear = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = FORMATS["bitsandbytes nf4"](linear)
    flags = [layer.support_avx512bf16_for_cpu for layer in model]
    x = torch.randn(3, 64)
    before = [layer.weight.data.clone() for layer in model]
    adapted = apply(model, [LoRACallback(r=2, target_modules=["0"])], forward=lambda: model(x))
    perturb(adapted)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert model[0].pet["lora_default"].a.grad.abs().max() > 0
    assert all(torch.equal(layer.weight.data, data) for layer, data in zip(model, before, strict=True))
    adapted.remove()
    assert [layer.support_avx512bf16_for_cpu for layer in model] == flags
    assert not any("_pet" in name for layer in model for name in vars(layer))


def test_merging_says_what_to_do_instead():
    model, _ = bert(int8_activations)
    with pytest.warns(match="used, but not trained: .*no gradient with respect to its input"):
        apply(model, [LoRACallback(r=2)])
    with pytest.raises(NotMergeableError, match=r"stored as torchao Int8Tensor.*merge_\(dequantize=True\)"):
        apply(model, [LoRACallback(r=2, name="second")]).merge_()
