"""Prefix tuning: the battery, golden properties, files, and its own errors."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pet import (
    ArgumentError,
    DeltaFileError,
    PrefixTuningCallback,
    TargetError,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.attention.prefix import AttentionPrefix
from lightning_pet.layers.prefix import PrefixNetwork

from . import zoo
from .battery import SAME_ROUTE, Battery, Case, frozen_output, output_in_a_new_process, perturb

DIRECT: dict[str, Any] = {"length": 3, "projection": False}
NETWORK: dict[str, Any] = {"length": 3, "projection_size": 5}


def case(model: str, options: dict[str, Any], **kwargs: Any) -> Case:
    """A prefix does not start as the base, and nothing could be merged."""
    return Case(model, PrefixTuningCallback, options, False, None, mergeable=False, **kwargs)


def trained(width: int, features: int, sites: int, length: int = 3, size: int = 5) -> int:
    """Numbers that train with one network: l·d + (d·m + m) + (m·F + F) per attention, F its keys and values."""
    return length * width + (width * size + size) + sites * (size * features + features)


class TestPrefixTuning(Battery):
    cases: ClassVar[list[Case]] = [
        case("transformer_encoder", NETWORK, parameters=trained(16, 32, 2)),
        case("bert", DIRECT, parameters=2 * 3 * 2 * 16),
        case("gpt2", {**DIRECT, "layers_to_transform": [1]}, parameters=3 * 2 * 16, not_compiled=SAME_ROUTE),
        case("llama", NETWORK, parameters=trained(16, 16, 2)),
        case("t5", NETWORK, parameters=3 * trained(16, 32, 2), not_compiled=SAME_ROUTE),
        case("vit", DIRECT, parameters=2 * 3 * 2 * 16, not_compiled=SAME_ROUTE),
        case("whisper", {**DIRECT, "attention": "cross"}, parameters=3 * 2 * 16, not_compiled=SAME_ROUTE),
        case("bloom", NETWORK, parameters=trained(16, 32, 2), not_compiled=SAME_ROUTE),
    ]


def prefixes(model: nn.Module) -> list[AttentionPrefix]:
    return [module for module in model.modules() if isinstance(module, AttentionPrefix)]


# --- golden properties ---------------------------------------------------------------------------


def test_folded_away_is_the_same_as_with_the_network() -> None:
    model, run = zoo.llama()
    perturb(apply(model, [PrefixTuningCallback(**NETWORK)]))
    with_network = run(model)
    folded = frozen_output(model, run)
    assert torch.equal(with_network, folded)
    for module in model.modules():
        if isinstance(module, PrefixNetwork):
            module.forward = None  # type: ignore[assignment]  # not called again
    assert torch.equal(frozen_output(model, run), folded)


def test_folded_prefix_follows_every_change() -> None:
    model, run = zoo.bert()
    apply(model, [PrefixTuningCallback(**NETWORK)])
    outputs = [frozen_output(model, run)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        run(model).square().sum().backward()
        optimizer.step()
        outputs.append(frozen_output(model, run))
        assert (outputs[-1] - run(model)).abs().max() < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.9)  # past the version of the parameter
    model.train()
    model.eval()
    assert (frozen_output(model, run) - run(model)).abs().max() < 1e-6
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("attention", ["self", "cross", "both"])
def test_count_is_two_l_d_per_attention(attention: str) -> None:
    sites = {"self": 4, "cross": 2, "both": 6}[attention]
    model, run = zoo.t5()
    adapted = apply(model, [PrefixTuningCallback(**DIRECT, attention=attention)], forward=lambda: run(model))
    assert adapted.plan().trainable == sites * 3 * 2 * 16
    for where, count in (("encoder", 2), ("decoder", 4)):
        model, run = zoo.t5()
        adapted = apply(model, [PrefixTuningCallback(**DIRECT, where=where)], forward=lambda m=model, r=run: r(m))
        assert len(prefixes(model)) == count
        assert {target.module.split(".")[0] for _, target, _ in adapted.record.places()} == {where}


def test_a_budget_picks_the_length() -> None:
    callback = PrefixTuningCallback(projection=False, budget=0.1)
    plan = apply(zoo.bert()[0], [callback]).plan()
    spent = sum(row.parameters for row in plan.rows if row.method == "prefix_tuning")
    assert spent == callback.length * 2 * 2 * 16
    assert spent <= 0.1 * plan.base < spent + 2 * 2 * 16


def tokenizer_folder(folder: Path) -> str:
    """A tokenizer whose tokens are the numbers from 0 to 49."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)
    return str(folder)


WORDS = torch.tensor([[7, 11, 23, 42]])
TEXT = torch.tensor([[5, 9, 30, 3, 17], [8, 8, 21, 40, 6]])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_words_as_a_prefix_are_words_in_front(name: str, projection: bool, tmp_path: Path) -> None:
    model, _ = getattr(zoo, name)()
    model.double()
    # Rotary positions are relative. Learned ones are not: a text behind words has to be told where it is.
    shifted = {"position_ids": torch.arange(4, 9)[None].expand(2, -1)} if name == "gpt2" else {}
    with torch.no_grad():
        expected = model(torch.cat([WORDS.expand(2, -1), TEXT], 1)).logits[:, 4:]
    options = {"init": "text", "init_text": "7 11 23 42", "tokenizer": tokenizer_folder(tmp_path)}
    apply(model, [PrefixTuningCallback(length=4, projection=projection, projection_size=8, **options)])
    for got in (model(TEXT, **shifted).logits, frozen_output(model, lambda m: m(TEXT, **shifted).logits)):
        assert (got - expected).abs().max() < (1e-11 if projection else 1e-13)


def test_text_is_repeated_and_a_vocabulary_sample_is_seeded(tmp_path: Path) -> None:
    tokenizer = tokenizer_folder(tmp_path)
    built = []
    for text in ("7 11", "7 11 7"):
        model, _ = zoo.llama()
        apply(model, [PrefixTuningCallback(**DIRECT, init="text", init_text=text, tokenizer=tokenizer)])
        built.append(prefixes(model)[1].key)
    assert torch.equal(built[0], built[1])
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, _ = zoo.t5()
        torch.manual_seed(seed)
        apply(model, [PrefixTuningCallback(**NETWORK, init="vocabulary")])
        built.append(prefixes(model)[-1].folded()[1])
    assert torch.equal(built[2], built[3])
    assert not torch.equal(built[3], built[4])


@pytest.mark.parametrize("beside", [False, True], ids=["named", "beside the weights"])
def test_a_vocabulary_sample_is_of_tokens_that_are_text(tmp_path: Path, beside: bool) -> None:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(35)), *"abcdefghij"]
    BertTokenizer(vocab={name: index for index, name in enumerate(names)}).save_pretrained(tmp_path)
    model, _ = zoo.bert()
    model.config.name_or_path = str(tmp_path) if beside else ""
    named = {} if beside else {"tokenizer": str(tmp_path)}
    seen: list[Tensor] = []
    model.bert.embeddings.word_embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, [PrefixTuningCallback(length=10, projection=False, init="vocabulary", **named)])
    assert any(sorted(ids.flatten().tolist()) == list(range(40, 50)) for ids in seen)


def test_without_a_tokenizer_the_sample_leaves_out_what_the_configuration_names() -> None:
    model, _ = zoo.llama()
    with pytest.warns(UserWarning, match=r"no tokenizer tells which of the model's 50 rows are text"):
        apply(model, [PrefixTuningCallback(length=20, projection=False, init="vocabulary")])
    with pytest.raises(ArgumentError, match="only 48 rows"):  # all but the first and the last of a sentence
        apply(zoo.llama()[0], [PrefixTuningCallback(length=49, projection=False, init="vocabulary")])


# --- files: the folded prefix, and what it came from ---------------------------------------------


def test_a_new_process_loads_bit_exactly(tmp_path: Path) -> None:
    built, run = zoo.llama()
    perturb(apply(built, [PrefixTuningCallback(**NETWORK)]))
    save_delta(built, tmp_path / "d.pet.safetensors")
    loaded = output_in_a_new_process("llama", tmp_path / "d.pet.safetensors", tmp_path / "out.pt")
    assert torch.equal(loaded, run(built))


def saved(tmp_path: Path, options: dict[str, Any]) -> tuple[str, Tensor]:
    model, run = zoo.bert()
    perturb(apply(model, [PrefixTuningCallback(**options, modules_to_save=[])]))
    save_delta(model, tmp_path / "d.pet.safetensors")
    return str(tmp_path / "d.pet.safetensors"), frozen_output(model, run)


def test_a_file_holds_both_forms_and_either_can_go_on(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, NETWORK)
    model, run = zoo.bert()
    apply(model, [PrefixTuningCallback(**NETWORK, start_from=path, modules_to_save=[])])
    assert torch.equal(frozen_output(model, run), expected)
    model, run = zoo.bert()
    apply(model, [PrefixTuningCallback(**DIRECT, start_from=path, modules_to_save=[])])  # on with the folded prefix
    assert (frozen_output(model, run) - expected).abs().max() < 1e-6
    assert prefixes(model)[0].key.requires_grad


def test_a_network_can_be_fitted_to_a_folded_prefix(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, DIRECT)
    model, run = zoo.bert()
    apply(model, [PrefixTuningCallback(**NETWORK, start_from=path, modules_to_save=[])])
    assert torch.equal(frozen_output(model, run), expected)
    assert (run(model) - expected).abs().max() < 1e-5


def test_a_file_of_another_length_does_not_fit(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, DIRECT)
    for options in ({**DIRECT, "length": 4}, {**NETWORK, "length": 4}):
        model, run = zoo.bert()
        before = run(model)
        with pytest.raises(DeltaFileError, match=r"\(2, 3, 8\), expected \(2, 4, 8\)"):
            apply(model, [PrefixTuningCallback(**options, start_from=path, modules_to_save=[])])
        assert torch.equal(run(model), before)


def test_loading_runs_no_forward(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, NETWORK)
    model, run = zoo.bert()
    forward, model.bert.forward = model.bert.forward, None
    load_delta(model, path)
    model.bert.forward = forward
    assert torch.equal(frozen_output(model, run), expected)


# --- in a Trainer --------------------------------------------------------------------------------


class Task(L.LightningModule):
    """Classification of six tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.bert()[0]

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(steps: int, ckpt_path: Path | None = None) -> tuple[L.Trainer, Task]:
    L.seed_everything(1, verbose=False)
    ids = torch.randint(3, 50, (32, 6), generator=torch.Generator().manual_seed(3))
    module = Task()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PrefixTuningCallback(**NETWORK, init="vocabulary", verbose=False)],
    )
    trainer.fit(module, DataLoader(TensorDataset(ids, ids[:, 0] % 3), batch_size=8), ckpt_path=ckpt_path)
    return trainer, module


def test_training_resumes_exactly_and_its_checkpoint_loads(tmp_path: Path) -> None:
    trainer, module = fit(4)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    save_delta(module, tmp_path / "whole.pet.safetensors")
    half, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(4, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), module.parameters(), strict=True))
    expected = frozen_output(module.eval(), lambda m: m(TEXT))
    for path in ("whole.ckpt", "whole.pet.safetensors"):
        fresh = Task().eval()
        load_delta(fresh, tmp_path / path)
        assert torch.equal(frozen_output(fresh, lambda m: m(TEXT)), expected)


# --- together with others ------------------------------------------------------------------------


def test_two_prefixes_and_a_low_rank_delta_on_one_attention() -> None:
    from lightning_pet import LoRACallback

    model, run = zoo.llama()
    before = frozen_output(model, run)
    both = apply(
        model, [PrefixTuningCallback(**DIRECT), PrefixTuningCallback(**NETWORK, name="second"), LoRACallback()]
    )
    perturb(both)
    run(model).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    expected = frozen_output(model, run)
    one, _ = zoo.llama()
    apply(one, [PrefixTuningCallback(length=6, projection=False), LoRACallback()])
    with torch.no_grad():
        for target, source in zip(one.model.layers, model.model.layers, strict=True):
            for mine, theirs in (
                (target.self_attn.q_proj, source.self_attn.q_proj),
                (target.self_attn.v_proj, source.self_attn.v_proj),
            ):
                mine.pet["lora_default"].load_state_dict(theirs.pet["lora_default"].state_dict())
            parts = [source.self_attn.pet[key].folded() for key in ("prefix_tuning_second", "prefix_tuning_default")]
            target.self_attn.pet["prefix_tuning_default"].set_key_value(
                *(torch.cat(p, 1) for p in zip(*parts, strict=True))
            )
    assert (frozen_output(one, run) - expected).abs().max() < 1e-6
    both.remove()
    assert torch.equal(frozen_output(model, run), before)


@pytest.mark.parametrize("name", ["llama", "transformer_encoder"])
def test_methods_that_come_later_see_the_same_model(name: str) -> None:
    from lightning_pet import LoRACallback

    model, run = getattr(zoo, name)()
    base = frozen_output(model, run)
    apply(model, [PrefixTuningCallback(**DIRECT)], forward=lambda: run(model))
    apply(model, [LoRACallback(r=2)], forward=lambda: run(model))
    both = apply(model, [PrefixTuningCallback(**DIRECT, name="second")], forward=lambda: run(model))
    assert [(a.key, len(a.targets)) for a in both.record.applied] == [
        ("prefix_tuning_default", 2),
        ("lora_default", 4),
        ("prefix_tuning_second", 2),
    ]
    assert [site.site for site in prefixes(model)[:2]] == [prefixes(model)[0].site] * 2
    run(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    both.remove()
    assert torch.equal(frozen_output(model, run), base)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 2.5}, "length=2.5"),
        ({"projection_size": 0}, "projection_size=0"),
        ({"init": "zero"}, "'vocabulary'"),
        ({"attention": "all"}, "'cross'"),
        ({"where": "left"}, "'encoder'"),
        ({"init": "text"}, "init_text"),
        ({"init": "text", "init_text": "so"}, "tokenizer"),
        ({"init_text": "so"}, "init='text'"),
        ({"init": "vocabulary", "projection_size": 8}, "at least length=30"),
        ({"init": "vocabulary", "budget": 0.1}, "words need a length"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        PrefixTuningCallback(**options)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("lstm", {}, "no softmax attention was found in Recurrent"),
        ("conv2d", {}, "use adapters or LoRA"),
        ("bert", {"attention": "cross"}, "attention='cross'"),
        ("gpt2", {"where": "encoder"}, "no cross-attention"),
        ("gpt2", {"layers_to_transform": [5]}, "in layer 5"),
        ("gpt2", {"exclude_modules": ["attnn"]}, "'attnn' hits none"),
        ("gpt2", {"exclude_modules": ["attn"]}, "is left"),
        ("vit", {"init": "vocabulary"}, "no table"),
        ("gpt2", {"init": "vocabulary", "length": 60}, "at least 60"),
        ("gpt2", {"init": "vocabulary", "length": 40}, "could not be run"),
    ],
)
def test_models_and_places_without_a_prefix(model: str, options: dict[str, Any], text: str) -> None:
    built, run = getattr(zoo, model)()
    before, kinds = run(built), [type(m) for m in built.modules()]
    with pytest.raises(TargetError, match=text):
        apply(built, [PrefixTuningCallback(**options)], forward=lambda: run(built))
    assert [type(m) for m in built.modules()] == kinds
    assert torch.equal(run(built), before)


def test_tokenizers_that_do_not_help(tmp_path: Path) -> None:
    text = {"init": "text", "init_text": " "}
    for folder, message in (
        (str(tmp_path / "none"), "cannot be loaded"),
        (tokenizer_folder(tmp_path), "has no tokens"),
    ):
        model, _ = zoo.gpt2()
        with pytest.raises(ArgumentError, match=message):
            apply(model, [PrefixTuningCallback(**DIRECT, **text, tokenizer=folder)])


def test_the_meta_device_has_no_words() -> None:
    model, _ = zoo.gpt2()
    with pytest.raises(TargetError, match="meta"):
        apply(model.to("meta"), [PrefixTuningCallback(**DIRECT, init="vocabulary")])
