"""New vocabularies and replaced layers: refused before anything changes, named, or carried through a run's set-up."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from models import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pet import (
    Adapted,
    DiffPruningCallback,
    LoRACallback,
    PETError,
    PromptTuningCallback,
    TargetError,
    apply,
)

OLD, NEW = 20, 26
ON_THE_VOCABULARY = {
    "delta on both": lambda: LoRACallback(r=2, target_modules="embed_tokens,lm_head", verbose=False),
    "trained": lambda: LoRACallback(r=2, modules_to_save="embed_tokens,lm_head", verbose=False),
    "prompt": lambda: PromptTuningCallback(length=2, verbose=False),
    "every weight": lambda: DiffPruningCallback(structured=False, verbose=False),
}


def language_model(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=OLD, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    return LlamaForCausalLM(config).eval()


class Grows(pl.LightningModule):
    """Takes the new words in when a stage begins."""

    def __init__(self) -> None:
        super().__init__()
        self.model = language_model()

    def setup(self, stage: str) -> None:
        self.model.resize_token_embeddings(NEW)

    def training_step(self, batch, index):
        return self.model(batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", list(ON_THE_VOCABULARY))
def test_a_new_size_under_a_delta_is_refused(kind, tied):
    model = language_model(tied)
    adapted = apply(model, ON_THE_VOCABULARY[kind]())
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    with pytest.raises(TargetError, match=r"resize_token_embeddings\(26\).*embed_tokens.*before the deltas"):
        model.resize_token_embeddings(NEW)
    assert {name: (id(p), p.shape) for name, p in model.named_parameters()} == before
    model.resize_token_embeddings(OLD)  # no new size
    model.resize_token_embeddings()
    adapted.remove()
    model.resize_token_embeddings(NEW)
    assert model.get_input_embeddings().num_embeddings == NEW


def test_elsewhere_it_is_none_of_our_business():
    model = language_model()
    adapted = apply(model, LoRACallback(r=2))
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.get_output_embeddings().out_features == 24
    assert len(adapted.state_dict()) == 4
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.resize_token_embeddings(NEW)
        assert (twin.lm_head.out_features, model.lm_head.out_features) == (NEW, 24)


@pytest.mark.parametrize("kind", [*ON_THE_VOCABULARY, "elsewhere"])
def test_a_module_may_resize_in_setup(kind, tmp_path):
    def callback():
        return ON_THE_VOCABULARY.get(kind, lambda: LoRACallback(r=2, verbose=False))()

    data = DataLoader(TensorDataset(torch.randint(3, NEW, (4, 5))), batch_size=2)
    options = {"max_epochs": 1, "enable_checkpointing": False, "default_root_dir": tmp_path}
    module, method = Grows(), callback()
    trainer(method, **options).fit(module, data)
    assert module.model.lm_head.out_features == NEW
    if kind == "delta on both":
        assert [row.detail for row in Adapted(module).plan().rows] == [f"2×{NEW} 8×2", f"2×8 {NEW}×2"]
    trainer(method, **options).fit(module, data)  # setup runs again, with the same size
    late, method = Grows(), callback()
    apply(late, method)  # these deltas are the user's, and may be trained: they are not made anew
    if kind != "elsewhere":
        with pytest.raises(TargetError, match="resize_token_embeddings"):
            trainer(method, **options).fit(late, data)


@pytest.mark.parametrize("replace", ["module", "in place"])
def test_replaced_layers_are_named_wherever_the_delta_is_used(replace):
    model = nn.Sequential(nn.Embedding(OLD, 8), nn.Linear(8, 3))
    adapted = apply(model, LoRACallback(r=2, target_modules="0,1", modules_to_save=[]))
    if replace == "module":
        model[0] = nn.Embedding(NEW, 8)
    else:
        model[0].weight.data, model[0].num_embeddings = torch.zeros(NEW, 8), NEW
    for use in (adapted.plan, adapted.state_dict, adapted.merge_, lambda: adapted.disabled().__enter__()):
        with pytest.raises(PETError, match=r"(^|: )0(\.pet.*gone| of Sequential had another size).*before the deltas"):
            use()
    adapted.remove()
    assert not any("pet" in name for name, _ in model.named_modules())
