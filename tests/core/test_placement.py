"""From residual sums to hosts, where the sums are unusual."""

import logging

import pytest
import torch
from torch import Tensor, nn

from lightning_pet.errors import TargetError
from lightning_pet.model.structure import Target
from lightning_pet.probe.probe import analyse
from lightning_pet.targets.parameters import norm_parameters
from lightning_pet.targets.placement import resolve_sites

WIDTH = 16


class FeedForward(nn.Module):
    """Norm in front; its dropout acts on the hidden features as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.up(self.norm(x)).relu())
        return x + self.dropout(self.down(hidden))


class Convolution(nn.Module):
    """A convolution over positions that takes and returns [rows, positions, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), Convolution()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.ffn = Convolutional(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(x))


class Stages(nn.Module):
    """Layers in two stages of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.Sequential(Layer(), Layer())}) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage["blocks"](x)
        return self.norm(x)


@pytest.fixture(scope="module")
def stages() -> tuple[nn.Module, object]:
    model = Stages()
    return model, analyse(model, lambda: model(torch.randn(2, 5, WIDTH)))


def test_a_dropout_that_acts_inside_as_well_hosts_nothing(stages) -> None:
    for placement in ("houlsby", "parallel"):
        first = resolve_sites(*stages, placement, sublayers=["ffn"])[0]
        assert first.module == "stages.0.blocks.0.ffn.down"
        assert first.reads == (None if placement == "houlsby" else "stages.0.blocks.0.ffn.norm")
    assert resolve_sites(*stages, "pfeiffer")[0].module == "stages.0.blocks.0.ffn"


def test_the_module_that_returns_features_last_is_the_host(stages) -> None:
    (first, *_) = resolve_sites(*stages, sublayers=["mixer"])
    assert first == Target("stages.0.blocks.0.mixer.mix", "", "mixer.output", sizes=(WIDTH, 0))


def test_layers_are_counted_through_the_stages(stages) -> None:
    depths = [target.sizes[1] for target in resolve_sites(*stages)]
    assert depths == [0, 0, 1, 1, 2, 2, 3, 3]
    left = resolve_sites(*stages, drop_layers=3)
    assert {target.module.partition(".blocks.")[0] for target in left} == {"stages.1"}
    assert len(left) == 2


def test_a_sub_layer_of_the_wrong_kind_is_named(stages) -> None:
    with pytest.raises(TargetError, match=r"no sub-layer of kind 'attention'.*Found: ffn, mixer"):
        resolve_sites(*stages, sublayers=["attention"])


class TwoTowers(nn.Module):
    """The second tower runs on request only."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True)
        self.text, self.image = nn.TransformerEncoder(layer, 1), nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        return self.text(x) if image is None else self.text(x) + self.image(image)


def test_what_did_not_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, x = TwoTowers(), torch.randn(2, 5, WIDTH)
    with caplog.at_level(logging.WARNING, logger="lightning_pet.targets.placement"):
        targets = resolve_sites(model, analyse(model, lambda: model(x)))
        assert {target.module.partition(".")[0] for target in targets} == {"text"}
        assert "image.layers.0.linear2.weight (ffn.down) did not run in the probing forward" in caplog.text
        caplog.clear()
        targets = resolve_sites(model, analyse(model, lambda: model(x, x)))
        assert {target.module.partition(".")[0] for target in targets} == {"text", "image"}
        assert not caplog.records


class Pooled(nn.Module):
    """Layers, and a head whose sum only one position leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Layer(), Layer()), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return (x + self.head(x))[:, 0]


def test_a_place_outside_of_the_layers_may_have_no_host(caplog: pytest.LogCaptureFixture) -> None:
    model = Pooled()
    structure = analyse(model, lambda: model(torch.randn(2, 5, WIDTH)))
    assert resolve_sites(model, structure, sublayers=["ffn"])[-1] == Target("head", "", "ffn.output", sizes=(WIDTH,))
    with caplog.at_level(logging.WARNING, logger="lightning_pet.targets.placement"):
        targets = resolve_sites(model, structure, "pfeiffer")
    assert [target.module for target in targets] == ["layers.0.ffn", "layers.1.ffn"]
    assert "'head' (Linear) is summed where no module returns the sum" in caplog.text


def test_without_a_forward_the_way_out_is_named() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True), 1)
    with pytest.raises(TargetError, match=r"no forward could be run.*example_input_array"):
        resolve_sites(model, analyse(model))


def test_norm_parameters_stay_in_their_scope() -> None:
    model = nn.ModuleDict({"a": Layer(), "b": nn.ModuleDict({"c": Layer()})})
    assert len(norm_parameters(model)) == 8
    assert {name.rpartition(".norm.")[0] for name in norm_parameters(model, "net.b.c")} == {"b.c.mixer", "b.c.ffn"}
    with pytest.raises(TargetError, match="has no norm"):
        norm_parameters(nn.Linear(2, 2))
