"""Files of kohya and LyCORIS on a small model with the names of a diffusion model; the expected weights by formula."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_pet import ArgumentError, DeltaFileError, import_delta, inspect_delta, load_delta, save_delta


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](self.to_q(x).tanh() * self.to_v(x))
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv_shortcut = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 1)
        self.attentions = nn.ModuleList([Attention(width)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_shortcut(self.conv1(x).relu())
        out: Tensor = self.attentions[0](x.movedim(1, -1)).movedim(-1, 1)
        return out


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(8), Block(8)])
        self.conv_out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.down_blocks:
            x = x + block(x)
        out: Tensor = self.conv_out(x)
        return out


class Pipeline(nn.Module):
    """Both models in one; the text encoder has a layer whose underscored name two paths have."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = Diffusion(), nn.ModuleDict({"q_proj": nn.Linear(6, 8)})
        self.text_encoder_2 = nn.ModuleDict({"q_proj": nn.Linear(6, 8)})

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        shift = self.text_encoder["q_proj"](words) + self.text_encoder_2["q_proj"](words)
        out: Tensor = self.unet(x + shift[:, :, None, None])
        return out


QUERY, CONV, SHORTCUT = "down_blocks.1.attentions.0.to_q", "down_blocks.0.conv1", "down_blocks.0.conv_shortcut"
OUT = "down_blocks.0.attentions.0.to_out.0"
INPUT = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(build: Callable[[], nn.Module] = Diffusion) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


def name_of(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.3


Made = tuple[dict[str, Tensor], Tensor]
"""Tensors of one layer, and the change of its weight."""


def lora(weight: Tensor, r: int, alpha: float | None) -> Made:
    kernel = weight.shape[2:]
    down, up = random(r, *weight.shape[1:]), random(weight.shape[0], r, *(1 for _ in kernel))
    change = (up.flatten(1) @ down.flatten(1)).view(weight.shape) * (1.0 if alpha is None else alpha / r)
    return {"lora_down.weight": down, "lora_up.weight": up} | _alpha(alpha), change


def loha(weight: Tensor, r: int, alpha: float, core: bool = False) -> Made:
    out, inputs = weight.shape[0], weight[0].numel()
    if not core:
        own = {"w1_a": random(out, r), "w1_b": random(r, inputs), "w2_a": random(out, r), "w2_b": random(r, inputs)}
        change = (own["w1_a"] @ own["w1_b"]) * (own["w2_a"] @ own["w2_b"])
    else:
        own, halves = {}, []
        for i in (1, 2):
            own |= {f"t{i}": random(r, r, *weight.shape[2:]), f"w{i}_a": random(r, out)}
            own[f"w{i}_b"] = random(r, weight.shape[1])
            halves.append(torch.einsum("ijkl,jr,ip->prkl", own[f"t{i}"], own[f"w{i}_b"], own[f"w{i}_a"]))
        change = halves[0] * halves[1]
    return {f"hada_{n}": t for n, t in own.items()} | _alpha(alpha), change.view(weight.shape) * alpha / r


def lokr(weight: Tensor, first: tuple[int, int], r: int | None, alpha: float, core: bool = False) -> Made:
    w1 = random(*first)
    k, n, kernel = weight.shape[0] // first[0], weight.shape[1] // first[1], weight.shape[2:]
    own: dict[str, Tensor] = {"lokr_w1": w1}
    if r is None:  # whatever alpha says
        own["lokr_w2"] = w2 = random(k, n, *kernel)
    elif core:
        own |= {"lokr_t2": random(r, r, *kernel), "lokr_w2_a": random(r, k), "lokr_w2_b": random(r, n)}
        w2 = torch.einsum("ijkl,ip,jr->prkl", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    else:
        own |= {"lokr_w2_a": random(k, r), "lokr_w2_b": random(r, weight[0].numel() // first[1])}
        w2 = (own["lokr_w2_a"] @ own["lokr_w2_b"]).view(k, n, *kernel)
    change = torch.kron(w1.view(*first, *(1 for _ in kernel)), w2.contiguous()) * (1.0 if r is None else alpha / r)
    return own | _alpha(alpha), change


def _alpha(alpha: float | None) -> dict[str, Tensor]:
    return {} if alpha is None else {"alpha": torch.tensor(alpha)}


CASES: dict[str, dict[str, Callable[[Tensor], Made]]] = {
    "lora": {
        QUERY: lambda w: lora(w, 2, 3.0),
        CONV: lambda w: lora(w, 3, None),
        SHORTCUT: lambda w: lora(w, 2, 1.0),
        OUT: lambda w: lora(w, 2, 3.0),
    },
    "loha": {QUERY: lambda w: loha(w, 2, 3.0), CONV: lambda w: loha(w, 2, 1.0), SHORTCUT: lambda w: loha(w, 3, 3.0)},
    "loha core": {QUERY: lambda w: loha(w, 2, 3.0), CONV: lambda w: loha(w, 2, 1.0, core=True)},
    "lokr": {
        QUERY: lambda w: lokr(w, (2, 2), 1, 3.0),
        CONV: lambda w: lokr(w, (4, 2), 1, 2.0),
        SHORTCUT: lambda w: lokr(w, (2, 4), 1, 2.0),
    },
    "lokr core": {CONV: lambda w: lokr(w, (4, 2), 1, 2.0, core=True)},
    "lokr whole": {QUERY: lambda w: lokr(w, (4, 4), None, 64.0), CONV: lambda w: lokr(w, (4, 4), None, 64.0)},
    "several": {
        QUERY: lambda w: lora(w, 2, 3.0),
        CONV: lambda w: loha(w, 2, 1.0),
        OUT: lambda w: lokr(w, (2, 2), 1, 3.0),
    },
}


def write(case: str, model: nn.Module, path: Path, **more: Tensor) -> nn.Module:
    """The file, and the model with changed weights."""
    torch.manual_seed(2)
    twin, tensors = copy.deepcopy(model), dict(more)
    for place, make in CASES[case].items():
        weight = twin.get_submodule(place).weight
        own, change = make(weight.detach())
        tensors |= {f"{name_of(place)}.{name}": tensor for name, tensor in own.items()}
        weight.data += change
    save_file(tensors, path, metadata={"ss_network_dim": "2"})
    return twin


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_formula(case: str, tmp_path: Path) -> None:
    model, path = made(), tmp_path / "style.safetensors"
    expected, before = write(case, model, path)(INPUT), model(INPUT)
    adapted = load_delta(model, path, name="style")
    assert (model(INPUT) - expected).abs().max() <= 1e-12
    assert (expected - before).abs().max() > 1e-3
    save_delta(model, tmp_path / "style.pet.safetensors", name="style")
    adapted["style"].remove()
    load_delta(model, tmp_path / "style.pet.safetensors")
    assert (model(INPUT) - expected).abs().max() <= 1e-12


def test_import_knows_its_base(tmp_path: Path) -> None:
    model = made()
    expected = write("lokr", model, tmp_path / "style.safetensors")(INPUT)
    with pytest.raises(DeltaFileError, match="together with its base"):
        import_delta(tmp_path / "style.safetensors", tmp_path / "x.pet.safetensors")
    import_delta(tmp_path / "style.safetensors", tmp_path / "x.pet.safetensors", base=model)
    manifest = inspect_delta(tmp_path / "x.pet.safetensors")
    assert "kohya" in json.dumps(manifest, default=str)
    load_delta(model, tmp_path / "x.pet.safetensors")
    assert (model(INPUT) - expected).abs().max() <= 1e-12


def test_dora_of_outputs(tmp_path: Path) -> None:
    model, path = made(), tmp_path / "dora.safetensors"
    twin = copy.deepcopy(model)
    weight = twin.get_submodule(CONV).weight
    own, change = lora(weight.detach(), 2, 3.0)
    scale = random(16, 1, 1, 1).abs() + 0.5
    changed = weight.detach() + change
    weight.data = changed * (scale / changed.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    save_file({f"{name_of(CONV)}.{n}": t for n, t in (own | {"dora_scale": scale}).items()}, path)
    load_delta(model, path)
    assert (model(INPUT) - twin(INPUT)).abs().max() <= 1e-12
    save_file({f"{name_of(CONV)}.{n}": t for n, t in (own | {"dora_scale": random(1, 8, 1, 1)}).items()}, path)
    with pytest.raises(DeltaFileError, match="for each input"):
        load_delta(made(), path)


def test_a_linear_layer_as_a_convolution_and_back(tmp_path: Path) -> None:
    """The same layer is a product in one program's model, and a kernel of size 1 in another's."""
    for place, shape in ((OUT, (1, 1)), (SHORTCUT, ())):
        model, path = made(), tmp_path / "style.safetensors"
        twin = copy.deepcopy(model)
        weight = twin.get_submodule(place).weight
        own, change = lora(weight.detach(), 2, 3.0)
        weight.data += change
        save_file(
            {f"{name_of(place)}.{n}": t if n == "alpha" else t.reshape(*t.shape[:2], *shape) for n, t in own.items()},
            path,
        )
        load_delta(model, path)
        assert (model(INPUT) - twin(INPUT)).abs().max() <= 1e-12


def test_names_that_fit_two_modules_are_refused(tmp_path: Path) -> None:
    model, path = made(Pipeline), tmp_path / "style.safetensors"
    own, change = lora(model.text_encoder["q_proj"].weight.detach(), 2, 3.0)
    unet, moved = lora(model.unet.get_submodule(QUERY).weight.detach(), 2, 3.0)
    tensors = {f"lora_te2_q_proj.{n}": t for n, t in own.items()} | {
        f"{name_of(QUERY)}.{n}": t for n, t in unet.items()
    }
    save_file(tensors, path)
    with pytest.raises(DeltaFileError, match=r"text_encoder\.q_proj or text_encoder_2\.q_proj"):
        load_delta(model, path)
    twin, words = copy.deepcopy(model), torch.randn(2, 6, dtype=torch.float64)
    twin.text_encoder_2["q_proj"].weight.data += change
    twin.unet.get_submodule(QUERY).weight.data += moved
    with pytest.raises(ArgumentError, match="begins with 'lora_te9_'"):
        load_delta(model, path, rename={"lora_te2_": "text_encoder_2.", "lora_te9_": "x."})
    load_delta(model, path, rename={"lora_te2_": "text_encoder_2."})
    assert (model(INPUT, words) - twin(INPUT, words)).abs().max() <= 1e-12


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    model, path = made(), tmp_path / "style.safetensors"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lora_unet_mid_block.lora_down.weight": random(2, 8)}, "makes no change"),
        ({f"{name_of(OUT)}.diff": random(8, 8)}, "no counterpart"),
        ({f"{name_of(CONV)}.lora_mid.weight": random(2, 2, 3, 3)}, "no counterpart"),
        ({f"{name_of(CONV)}.hada_w1_a": random(2, 2)}, "at once"),
        ({"lora_te_q_proj.lora_down.weight": random(2, 8), "lora_te_q_proj.lora_up.weight": random(8, 2)}, "no layer"),
        ({f"{name_of(CONV)}.alpha": torch.tensor(-1.0)}, "above zero"),
        ({f"{name_of(OUT)}.dora_scale": random(8, 1)}, "other layers have none"),
    ]
    for more, text in cases:
        write("lora", model, path)
        tensors = {
            f"{name_of(p)}.{n}": t
            for p, m in CASES["lora"].items()
            for n, t in m(model.get_submodule(p).weight.detach())[0].items()
        }
        save_file(tensors | more, path)
        with pytest.raises(DeltaFileError, match=text):
            load_delta(model, path)
    tensors = {
        f"{name_of(QUERY)}.{n}": t
        for n, t in lokr(model.get_submodule(QUERY).weight.detach(), (8, 2), 1, 1.0)[0].items()
    }
    save_file(tensors, path)
    with pytest.raises(DeltaFileError, match="decompose_factor"):
        load_delta(model, path)
    assert not any(hasattr(module, "pet") for module in model.modules())
