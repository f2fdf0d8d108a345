"""What a constructor is given is looked at by type, before anything is computed with it."""

import collections

import pytest
from torch import nn

import lightning_pet as pet
from lightning_pet.insertion.method import METHODS

WRONG = {bool: ["no", "yes", 1, None], int: ["8", None, [8]], float: ["0.1", None, {}]}


def options():
    """Every switch and number of every method, of its own and of all methods."""
    for cls in METHODS.values():
        for base in cls.__mro__:
            if issubclass(base, pet.PETCallback):
                for name, kind in base.__init__.__annotations__.items():
                    if kind in WRONG:
                        yield cls, name, kind


@pytest.mark.parametrize(("cls", "option", "kind"), sorted(set(options()), key=str))
def test_every_switch_and_number(cls, option, kind):
    for value in WRONG[kind]:
        with pytest.raises(pet.ArgumentError, match=f"{option}="):
            cls(**{option: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_pattern": {3: 4}},
        {"rank_pattern": [("q", 4)]},
        {"alpha_pattern": {"q": "4"}},
        {"target_modules": [None]},
        {"target_modules": [["q"]]},
        {"modules_to_save": [""]},
        {"name": 3},
        {"budget": "0.1"},
    ],
    ids=str,
)
def test_what_else_is_of_the_wrong_type(arguments):
    with pytest.raises(pet.ArgumentError):
        pet.LoRACallback(**arguments)


def test_other_mappings_are_kept_as_plain_ones():
    ranks = collections.UserDict(fc=2)
    assert type(pet.LoRACallback(rank_pattern=ranks).config()["rank_pattern"]) is dict


@pytest.mark.parametrize("policy", ["erorr", "", None, False])
def test_a_base_check_that_is_none(policy, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    pet.apply(model, [pet.LoRACallback(r=1, target_modules=["0"])])
    pet.save_delta(model, tmp_path / "d.pet.safetensors")
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(pet.ArgumentError, match="base_check="):
        pet.load_delta(other, tmp_path / "d.pet.safetensors", base_check=policy)
    assert type(other[0]) is nn.Linear
    assert not hasattr(other[0], "pet")
