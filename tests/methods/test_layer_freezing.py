"""Layer freezing and gradual unfreezing: the battery, what trains when, exact resume, and its own errors."""

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_pet import (
    ArgumentError,
    BitFitCallback,
    LayerFreezingCallback,
    LoRACallback,
    TargetError,
    apply,
)
from tests.engine.models import CLASSES, WIDTH, Module, ckpt, digest, every_step, fit, trainer

from . import zoo
from .battery import Battery, Case


class TestLayerFreezing(Battery):
    cases: ClassVar[list[Case]] = [
        Case("mlp", LayerFreezingCallback, {"train_last": 1}),
        Case("bert", LayerFreezingCallback, {"train_last": 1, "norms": "all"}),
        Case("gpt2", LayerFreezingCallback, {"train_layers": [-1], "norms": "final"}),
    ]


def trained(build: str, **options: Any) -> set[str]:
    """Modules that train, as paths in which a whole layer is one place."""
    model, _ = getattr(zoo, build)()
    adapted = apply(model, [LayerFreezingCallback(**options)])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapted.record.trainable_names)
    return set(adapted.record.trained_names)


def below(build: str, *paths: str) -> set[str]:
    model, _ = getattr(zoo, build)()
    return {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{path}." for path in paths))}


# --- what trains ---------------------------------------------------------------------------------


def test_last_layer_and_the_head() -> None:
    assert trained("bert", train_last=1) == below("bert", "bert.encoder.layer.1", "classifier")
    assert trained("bert", train_last=0) == below("bert", "classifier")
    assert trained("gpt2", train_last=2) == below("gpt2", "transformer.h")
    assert trained("llama", train_last=1) == below("llama", "model.layers.1")


def test_each_stack_on_its_own_and_one_of_them() -> None:
    both = below("t5", "encoder.block.1", "decoder.block.1")
    assert trained("t5", train_last=1) == both
    assert trained("t5", train_last=1, stacks=["decoder"]) == below("t5", "decoder.block.1")
    assert trained("whisper", train_last=1) == below("whisper", "model.encoder.layers", "model.decoder.layers")


def test_indices_and_ranges() -> None:
    assert trained("bert", train_layers=[0], modules_to_save=[]) == below("bert", "bert.encoder.layer.0")
    assert trained("bert", train_layers=["0-1"], modules_to_save=[]) == below("bert", "bert.encoder.layer")
    assert trained("bert", train_layers=[-2], modules_to_save=[]) == below("bert", "bert.encoder.layer.0")


def test_embeddings_and_norms_by_option() -> None:
    last = below("gpt2", "transformer.h.1")
    assert trained("gpt2", train_last=1, norms="final") == last | below("gpt2", "transformer.ln_f")
    norms = below("gpt2", "transformer.ln_f", "transformer.h.0.ln_1", "transformer.h.0.ln_2")
    assert trained("gpt2", train_last=1, norms="all") == last | norms
    tables = below("gpt2", "transformer.wte", "transformer.wpe")
    assert trained("gpt2", train_last=1, embeddings=True) == last | tables
    head = below("vit", "classifier")
    tokens = below("vit", "vit.embeddings")
    assert trained("vit", train_last=0, embeddings=True) == head | tokens
    norms = below(
        "bert",
        "bert.embeddings.LayerNorm",
        *(f"bert.encoder.layer.{i}.{n}.LayerNorm" for i in (0, 1) for n in ("attention.output", "output")),
    )
    assert trained("bert", train_last=0, norms="all", modules_to_save=[]) == norms
    table = {
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        "bert.embeddings.word_embeddings",
    }
    both = trained("bert", train_last=0, norms="all", embeddings=True, modules_to_save=[])
    assert both == norms | below("bert", *table)
    assert trained("vit", train_last=0, norms="final") == head | below("vit", "vit.layernorm")


def test_one_submodule_and_a_head_outside_of_it() -> None:
    model, _ = zoo.bert()
    model.bert.embeddings.requires_grad_(False)
    callback = LayerFreezingCallback(0, module="bert.encoder", modules_to_save=["classifier"])
    assert apply(model, [callback]).record.applied[0].trained == ("classifier.weight", "classifier.bias")
    model, _ = zoo.bert()
    callback = LayerFreezingCallback(1, module="bert.encoder", modules_to_save=["classifier"])
    assert set(apply(model, [callback]).record.applied[0].trained) == below(
        "bert", "bert.encoder.layer.1", "classifier"
    )


def test_only_the_trained_layers_do_backward_work() -> None:
    model, run = zoo.bert()
    apply(model, [LayerFreezingCallback(1)])
    inputs: list[Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    run(model).sum().backward()
    assert [value.requires_grad for value in inputs] == [False, False]


def test_beside_lora_in_the_frozen_layers() -> None:
    model, run = zoo.bert()
    lora = LoRACallback(r=2, layers_to_transform=[0])
    names = apply(model, [LayerFreezingCallback(1), lora]).record.trainable_names
    run(model).sum().backward()
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == set(names) == {n for n, p in model.named_parameters() if p.grad is not None}
    assert trains == below("bert", "bert.encoder.layer.1", "classifier") | {n for n in names if ".pet.lora" in n}


# --- gradual unfreezing --------------------------------------------------------------------------


class Deep(nn.Module):
    """An embedding, three layers and a head, with dropout."""

    def __init__(self, seed: int = 1, head: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(WIDTH, 8)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(3))
            self.head = nn.Linear(8, CLASSES) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Watch(pl.Callback):
    """Which layers changed in each step."""

    def __init__(self) -> None:
        self.moved: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.net.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        moved = {n for n, p in pl_module.net.named_parameters() if not torch.equal(p, self.before[n])}
        places = {place for name in moved for place in name.split(".")[:2]}
        self.moved.append("".join(place for place in ("head", "2", "1", "0", "embed") if place in places))


def gradual(**options: Any) -> LayerFreezingCallback:
    defaults: dict[str, Any] = {"train_last": 3, "embeddings": True, "unfreeze_every": 1, "verbose": False}
    return LayerFreezingCallback(**defaults | options)


STAGES = ["head", "head2", "head21", "head210", "head210embed"]


def decaying(module: Any) -> Any:
    """Weight decay and momentum must not move what is still frozen."""
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.5)


def test_one_more_layer_every_epoch_from_the_top() -> None:
    watch, module = Watch(), Module(Deep(), decaying)
    run = fit(module, gradual(), watch, max_epochs=5)
    assert watch.moved == [stage for stage in STAGES for _ in range(5)]
    assert all(p.requires_grad for p in module.net.parameters())
    assert len(run.optimizers[0].state) == len(list(module.net.parameters()))


@pytest.mark.parametrize("unfreeze_every", [None, 1])
def test_every_layer_learns_slower_than_the_one_above(unfreeze_every: int | None) -> None:
    module, callback = Module(Deep(), decaying), gradual(unfreeze_every=unfreeze_every, lr_decay=0.5)
    run = fit(module, callback, max_epochs=5)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = run.optimizers[0].param_groups
    rates = {names[id(p)]: group["lr"] / groups[0]["lr"] for group in groups for p in group["params"]}
    turns = callback._groups(*callback._applied(callback.adapted.root))
    assert len(turns) > 2
    for turn, group in enumerate(turns):
        assert all(rates[f"net.{name}"] == pytest.approx(0.5**turn) for name in group)


def test_steps_count_optimizer_steps_also_under_accumulation() -> None:
    watch = Watch()
    options = {"unfreeze_every": 1, "unfreeze_interval": "step"}
    fit(Module(Deep(), decaying), gradual(**options), watch, max_epochs=2, accumulate_grad_batches=2)
    assert [stage for stage in watch.moved if stage] == [*STAGES, STAGES[-1]]


def test_without_a_head_the_top_layer_starts() -> None:
    watch = Watch()
    fit(Module(Deep(head=False), decaying), gradual(embeddings=False), watch, max_epochs=3)
    assert watch.moved == [stage for stage in ("2", "21", "210") for _ in range(5)]


@pytest.mark.parametrize("step", [3, 5, 12, 15])
def test_resume_is_exact_in_any_stage(step: int, tmp_path: Path) -> None:
    whole = Module(Deep(), decaying)
    fit(whole, gradual(), every_step(tmp_path), max_epochs=5)
    rest, watch = Module(Deep(), decaying), Watch()
    fit(rest, gradual(), watch, max_epochs=5, ckpt=ckpt(tmp_path, step))
    assert rest.losses == whole.losses[step:]
    assert digest(rest) == digest(whole)
    assert watch.moved == [stage for stage in STAGES for _ in range(5)][step:]


def test_what_another_method_trains_does_not_wait() -> None:
    module, watch = Module(Deep(), decaying), Watch()
    fit(module, gradual(embeddings=False), BitFitCallback(verbose=False), watch, max_epochs=4)
    assert watch.moved[0] == "head210embed"


def test_two_stacks_of_their_own_pace() -> None:
    watch = Watch()
    one = gradual(train_layers=[2], embeddings=False, unfreeze_every=1)
    other = gradual(train_layers=[0], embeddings=False, unfreeze_every=2, name="slow")
    fit(Module(Deep(), decaying), one, other, watch, max_epochs=3)
    assert watch.moved == [stage for stage in ("head", "head2", "head20") for _ in range(5)]


def test_a_stream_of_unknown_length() -> None:
    watch = Watch()
    module = Module(Deep(), decaying)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    run = trainer(gradual(), watch, max_epochs=5)
    run.fit(module, loader)
    assert watch.moved == [stage for stage in STAGES for _ in range(3)]


class Stream(torch.utils.data.IterableDataset):
    """Twelve rows, without saying so."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return iter([(torch.randn(WIDTH, generator=generator), i % CLASSES) for i in range(12)])


def test_a_second_fit_starts_from_the_top_again() -> None:
    module, watch = Module(Deep(), decaying), Watch()
    callback = gradual(embeddings=False)
    fit(module, callback, max_epochs=4)
    fit(module, callback, watch, max_epochs=4)
    assert watch.moved[0] == "head"


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train_last": -1}, "train_last=-1"),
        ({"train_last": 1.5}, "train_last=1.5"),
        ({"train_layers": []}, "train_layers is empty"),
        ({"train_layers": ["3"]}, "'3' is neither"),
        ({"train_layers": ["4-"]}, "'4-' is neither"),
        ({"norms": "some"}, "'final'"),
        ({"unfreeze_every": 0}, "unfreeze_every=0"),
        ({"lr_decay": 0}, "lr_decay=0"),
        ({"lr_decay": 2.6}, "lr_decay=2.6"),
        ({"unfreeze_interval": "batch"}, "'step'"),
        ({"budget": 0.1}, "no width"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        LayerFreezingCallback(**options)


@pytest.mark.parametrize(
    ("build", "options", "text"),
    [
        ("bert", {"train_last": 3}, "has only 2 layers"),
        ("bert", {"train_layers": [2]}, "layers 0 to 1"),
        ("bert", {"train_layers": ["1-2"]}, "layers 0 to 1"),
        ("bert", {"train_layers": ["1-0"]}, "layers 0 to 1"),
        ("bert", {"train_layers": [-3]}, "layers 0 to 1"),
        ("t5", {"stacks": ["decodr"]}, "decoder"),
        ("gpt2", {"train_last": 0}, "nothing left to train"),
        ("embedding", {}, "no numbered layers"),
    ],
)
def test_bad_places_leave_the_model_untouched(build: str, options: dict[str, Any], text: str) -> None:
    model, run = getattr(zoo, build)()
    before = run(model)
    with pytest.raises(TargetError, match=text):
        apply(model, [LayerFreezingCallback(**options)])
    assert torch.equal(run(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "run", "text"),
    [
        ({}, {"max_epochs": 4}, "after 4 epochs, but the run ends after 4"),
        ({}, {"max_epochs": 9, "max_steps": 12}, "after 4 epochs, but the run ends after 3"),
        (
            {"unfreeze_every": 3, "unfreeze_interval": "step"},
            {"max_epochs": 2},
            "after 12 steps, but the run ends after 10",
        ),
    ],
)
def test_a_run_that_ends_before_the_last_layer_trains(options: dict[str, Any], run: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        fit(Module(Deep()), gradual(**options), **run)
