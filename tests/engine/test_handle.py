"""The handle, wherever the user stands: in the LightningModule, in the callback; and what both say of themselves."""

import copy
import pickle

import pytest
import torch
from models import Module, Net, fit, lora
from torch import nn

import lightning_pet
from lightning_pet import Adapted, apply
from lightning_pet.errors import PETError

METHODS = [getattr(lightning_pet, name) for name in lightning_pet.__all__ if name.endswith("Callback")]


def test_the_handle_is_found_from_whatever_contains_the_model():
    module = Module(Net())
    fit(module, lora(), max_epochs=1)
    wrapped = nn.ModuleDict({"inside": torch.compile(module, backend="eager")})
    roots = [Adapted(model).root for model in (module.net, module, wrapped)]
    assert all(root is module.net for root in roots)
    x = torch.randn(3, 6)
    module.eval()
    expected = module(x)
    Adapted(module).merge_()
    assert torch.allclose(module(x), expected, atol=1e-6)


def test_the_handle_says_why_there_is_none():
    with pytest.raises(PETError, match="nothing was applied to this Module, nor to anything inside"):
        Adapted(Module(Net()))
    pair = nn.ModuleDict({"teacher": Net(), "student": Net(seed=2)})
    for net in pair.values():
        apply(net, [lora()])
    with pytest.raises(PETError, match=r"2 models inside of this ModuleDict .* teacher, student\. Pass the one"):
        Adapted(pair)
    assert Adapted(pair["student"]).root is pair["student"]


def test_the_callback_has_the_handle_during_and_after_a_fit():
    class Looks(Module):
        def on_train_start(self):
            self.during = [method.adapted.root for method in self.trainer.callbacks if hasattr(method, "adapted")]

    first, second = lora(), lora(name="two")
    with pytest.raises(PETError, match="LoRACallback was in no run of this process yet"):
        first.adapted  # noqa: B018
    module = Looks(Net())
    fit(module, first, second, max_epochs=1)
    assert all(root is module.net for root in [*module.during, first.adapted.root, second.adapted.root])
    assert len(module.during) == 2
    fit(other := Module(Net()), first, max_epochs=1)
    assert first.adapted.root is other.net
    first.adapted.remove()
    with pytest.raises(PETError, match="nothing was applied"):
        first.adapted  # noqa: B018


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_a_copy_of_a_callback_does_not_carry_the_model(again):
    method = lora()
    fit(Module(Net()), method, max_epochs=1)
    with pytest.raises(PETError, match="in no run"):
        again(method).adapted  # noqa: B018
    assert again(method).config() == method.config()


def test_the_handle_describes_itself():
    net = Net(head=False)
    adapted = apply(net, [lora(), lora(name="two", r=1, target_modules=["fc2"])])
    said = "Adapted(Net: lora on 2 places, lora:two on 1 place, trains 76 of 128 numbers{})"
    assert repr(adapted) == said.format("")
    with adapted.disabled():
        assert repr(adapted) == said.format(", switched off now")
    adapted.remove()
    assert repr(adapted) == "Adapted(Net: merged or removed)"


def test_a_callback_describes_itself_by_what_was_given():
    assert repr(lora()) == "LoRACallback(r=2, target_modules=['fc1', 'fc2'], verbose=False)"
    assert repr(lora(r=8, verbose=True, target_modules=["attention.q", "attention.v"])) == "LoRACallback()"


@pytest.mark.parametrize("cls", [cls for cls in METHODS if hasattr(cls, "method")], ids=lambda cls: cls.__name__)
def test_every_callback_is_rebuilt_by_what_it_says(cls):
    assert repr(cls()) == f"{cls.__name__}()"
    named = cls(name="two", verbose=False)
    assert repr(named) == f"{cls.__name__}(name='two', verbose=False)"
    assert eval(repr(named), {cls.__name__: cls}).config() == named.config()
