"""Deltas in a folder, a few of them in memory: who leaves, who stays, what is verified, and what is left as it was."""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import (
    Adapted,
    AdapterBiasCallback,
    AdapterCallback,
    ArgumentError,
    BaseMismatchError,
    BitFitCallback,
    CompacterCallback,
    DeltaFileError,
    DeltaLibrary,
    DiffPruningCallback,
    IA3Callback,
    IntrinsicDimensionCallback,
    LoRACallback,
    PETError,
    PrefixTuningCallback,
    PromptTuningCallback,
    apply,
    load_delta,
)
from lightning_pet.layers.low_rank import LowRankLinear
from lightning_pet.operations.library import base as base_of_library
from lightning_pet.operations.library import folder as files_of_library

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(30, (5, 6), generator=torch.Generator().manual_seed(4))


class Net(nn.Module):
    """Has a head."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        torch.manual_seed(1)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(X) if isinstance(net, Net) else net(IDS).logits if hasattr(net, "config") else X


def write(path: Path, seed: int, method: object, outputs: int = 3, net: nn.Module | None = None) -> Tensor:
    """A delta that is trained, as it were; what it computes alone."""
    net = Net(outputs).eval() if net is None else net
    adapted = apply(net, method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapted.save(path)
    return output(net)


def lora(r: int = 2, **options: object) -> LoRACallback:
    return LoRACallback(r=r, target_modules=["a", "b"], **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("library")
    solo = {f"u{i}": write(folder / f"u{i}.pet.safetensors", i, lora()) for i in range(6)}
    return folder, solo


@pytest.fixture
def folder(written: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "files"))


@pytest.fixture
def solo(written: tuple[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    return written[1]


def used(library: DeltaLibrary, net: nn.Module, name: str, **options: bool) -> Tensor:
    with library.using(name, **options):
        return output(net)


def test_a_mapping_from_names_to_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("not a delta")
    (folder / ".hidden.pet.safetensors").write_text("")
    library = DeltaLibrary(Net(), folder, resident=2)
    assert list(library) == list(library.names()) == [f"u{i}" for i in range(6)]
    assert (len(library), "u1" in library, library["u1"]) == (6, True, folder / "u1.pet.safetensors")
    for name in ("v1", "../files/u1", "", ".hidden", "u1\0", None, 3):
        assert name not in library
    with pytest.raises(ArgumentError, match=r"no delta 'u11' in .*Did you mean 'u1'"):
        library["u11"]
    with pytest.raises(ArgumentError, match=r"no delta '\.\./files/u1'"), library.using("../files/u1"):
        pass
    assert repr(library).endswith("0 of at most 2 in memory, 0 slots in Net)")
    shutil.copy(folder / "u1.pet.safetensors", folder / "late.pet.safetensors")
    assert "late" in library  # asked for by name
    for wrong in (0, True, "3"):
        with pytest.raises(ArgumentError, match="resident="):
            DeltaLibrary(Net(), folder, resident=wrong)  # type: ignore[arg-type]
    with pytest.raises(DeltaFileError, match="Give a folder"):
        DeltaLibrary(Net(), folder / "nowhere")
    with pytest.raises(ArgumentError, match="base_check"):
        DeltaLibrary(Net(), folder, base_check="of")


def test_never_more_than_so_many_and_the_least_recently_used_leave(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    base, keys = output(net), list(net.state_dict())
    library = DeltaLibrary(net, folder, resident=3)
    generator = torch.Generator().manual_seed(0)
    order: list[str] = []
    for number in torch.randint(6, (40,), generator=generator).tolist():
        name = f"u{number}"
        expected_hit = name in order[-3:]
        hits = library.info().hits
        assert torch.equal(used(library, net, name), solo[name])  # bit for bit, however often it left and came back
        order = [*(n for n in order if n != name), name]
        assert library.resident == tuple(order[-3:])
        assert (library.info().hits > hits) == expected_hit
        assert torch.equal(output(net), base)
    info = library.info()
    assert (info.maxsize, info.currsize, info.slots, info.hits + info.misses) == (3, 3, 1, 40)
    assert info.verified == len({*order})  # each file once, as none has changed
    library.clear()
    assert library.resident == ()
    assert list(net.state_dict()) == keys
    assert torch.equal(used(library, net, "u1"), solo["u1"])


def test_pinned_ones_and_those_in_use_stay(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=3)
    library.pin("u0")
    with library.using("u1"):
        for name in ("u2", "u3", "u4"):
            assert torch.equal(used(library, net, name), solo[name])
            assert {"u0", "u1"} < {*library.resident}
            assert torch.equal(output(net), solo["u1"])
        with library.using("u5"):
            with pytest.raises(PETError, match="all deltas in memory are in use or pinned, so 'u2' cannot"):
                used(library, net, "u2")
            assert torch.equal(output(net), solo["u5"])
        assert torch.equal(output(net), solo["u1"])
    assert library.pinned == ("u0",)
    with pytest.raises(ArgumentError, match="'u1' is not pinned; 'u0' is"):
        library.unpin("u1")
    library.unpin()
    for name in ("u2", "u3", "u4"):
        used(library, net, name)
    assert "u0" not in library.resident
    with pytest.raises(PETError, match="4 deltas were asked for at once"), library.rows(["u0", "u1", "u2", "u3"]):
        pass
    with pytest.raises(ArgumentError, match="expected a list"), library.rows("u0"):
        pass


def test_rows_of_many_users(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    base = output(net)
    library = DeltaLibrary(net, folder, resident=4)
    for names in (["u0", "u1", None, "u2", "u0"], ["u3", "u4", "u5", "u4", None], [None] * 5, ["u1"] * 5):
        with library.rows(names):
            found = output(net)
        expected = torch.stack([(base if name is None else solo[name])[row] for row, name in enumerate(names)])
        assert torch.allclose(found, expected, atol=1e-6)
    assert library.info().slots == 3
    assert set(library.resident) == {"u1", "u3", "u4", "u5"}


def test_deltas_of_the_model_act_beside_those_of_the_folder(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    load_delta(net, folder / "u0.pet.safetensors", name="own", heads=False)
    adapted, own = Adapted(net), output(net)
    library = DeltaLibrary(adapted, folder, resident=2)
    with library.using("own", "u1"):
        assert not torch.equal(output(net), solo["u1"])
    with library.rows(["own", "u1", "own", "u1", None]):
        found = output(net)
    assert torch.allclose(found[:2], torch.stack([own[0], solo["u1"][1]]), atol=1e-6)
    assert torch.equal(output(net), own)
    assert adapted.active == ("own",)
    adapted.remove()  # the slots, too
    assert torch.equal(used(library, net, "u1"), solo["u1"])


METHODS = {
    "ia3": lambda: IA3Callback(),
    "adapter": lambda: AdapterCallback(reduction_factor=2),
    "parallel": lambda: AdapterCallback(reduction_factor=2, placement="parallel"),
    "compacter": lambda: CompacterCallback(phm_dim=2, reduction_factor=2),
    "adapter bias": lambda: AdapterBiasCallback(),
    "prefix": lambda: PrefixTuningCallback(length=3),
    "prompt": lambda: PromptTuningCallback(length=3),
    "bitfit": lambda: BitFitCallback(),
    "diff": lambda: DiffPruningCallback(structured=False, density=0.1),
    "intrinsic": lambda: IntrinsicDimensionCallback(d=60),
    "dora": lambda: LoRACallback(r=2, use_dora=True),
    "pissa": lambda: LoRACallback(r=2, init="pissa"),
    "two": lambda: [LoRACallback(r=2), IA3Callback(), PrefixTuningCallback(length=2)],
}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32, num_labels=3)).eval()


@pytest.mark.parametrize("kind", METHODS)
def test_every_kind_of_delta_takes_turns(kind: str, tmp_path: Path) -> None:
    solo = {
        name: write(tmp_path / f"{name}.pet.safetensors", seed, METHODS[kind](), net=bert())
        for seed, name in enumerate("xyz")
    }
    net = bert()
    base = output(net)
    library = DeltaLibrary(net, tmp_path, resident=2)
    for name in "xyzxzyx":
        assert torch.equal(used(library, net, name), solo[name])
        assert torch.equal(output(net), base)
    if kind != "prompt":  # the base has none, and rows of one batch need the same number
        with library.rows(["x", "y", None, "y", "x"]):
            found = output(net)
        expected = torch.stack([solo["x"][0], solo["y"][1], base[2], solo["y"][3], solo["x"][4]])
        assert torch.allclose(found, expected, atol=1e-5)
    assert library.info().slots <= 2


def test_other_forms_get_slots_of_their_own_and_smaller_ranks_get_zeros(folder: Path, solo: dict[str, Tensor]) -> None:
    more = {
        "wide": write(folder / "wide.pet.safetensors", 7, lora(5, alpha=3)),
        "one": write(folder / "one.pet.safetensors", 8, lora(1, alpha=5)),
        "five": write(folder / "five.pet.safetensors", 9, lora(), outputs=5),
        "dora": write(folder / "dora.pet.safetensors", 10, lora(1, use_dora=True)),
    }
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=9, base_check="off")
    for name, slots in (("wide", 1), ("one", 1), ("u1", 1), ("five", 2), ("dora", 3), ("wide", 3), ("u2", 3)):
        expected = (solo | more)[name]
        assert torch.allclose(used(library, net, name), expected, atol=1e-6), name
        assert library.info().slots == slots, name
    with library.rows(["wide", "one", "u1", "dora", None]):
        found = output(net)
    expected = [(solo | more)[name][row] for row, name in enumerate(["wide", "one", "u1", "dora"])]
    assert torch.allclose(found[:4], torch.stack(expected), atol=1e-6)
    small = DeltaLibrary(Net().eval(), folder, resident=2, base_check="off")
    for name in ("wide", "five", "dora", "wide", "u1", "five"):
        used(small, small.root, name)
        assert small.info().slots <= 2
    assert torch.equal(used(small, small.root, "five"), more["five"])


def _broken(path: Path) -> Iterator[str]:
    sound = path.read_bytes()
    path.write_bytes(sound[:-7])
    yield "corrupt"
    path.write_bytes(sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
    yield "corrupt"
    path.write_bytes(b"\x80\x04 a pickle")
    yield "unsafe"
    path.unlink()
    yield "io"
    other = Net()
    other.b.bias.data.add_(1.0)
    write(path, 1, lora(), net=other)
    yield "base"
    write(path, 1, LoRACallback(r=2, target_modules=["c"]), net=nn.ModuleDict({"c": nn.Linear(6, 8)}))
    yield "base"
    path.write_bytes(sound)


def test_a_damaged_file_leaves_everything_as_it_was(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=2)
    for name in ("u0", "u1"):
        used(library, net, name)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    kinds = [type(module) for module in net.modules()]
    for code in _broken(folder / "u2.pet.safetensors"):
        with pytest.raises((DeltaFileError, ArgumentError)) as caught:
            used(library, net, "u2")
        assert getattr(caught.value, "code", code) in (code, "mismatch")
        assert library.resident == ("u0", "u1")
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        assert [type(module) for module in net.modules()] == kinds
        assert torch.equal(used(library, net, "u0"), solo["u0"])
        assert torch.equal(used(library, net, "u1"), solo["u1"])
    assert torch.equal(used(library, net, "u2"), solo["u2"])


def test_a_file_that_does_not_fit_is_not_kept(folder: Path, solo: dict[str, Tensor]) -> None:
    write(
        folder / "u9.pet.safetensors",
        1,
        LoRACallback(r=2, target_modules=["c"]),
        net=nn.ModuleDict({"c": nn.Linear(6, 8)}),
    )
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=2, base_check="off")
    for name in ("u0", "u1"):
        used(library, net, name)
    for _ in range(2):
        with pytest.raises(DeltaFileError, match="does not have"):
            used(library, net, "u9")
        assert library.resident == ("u0", "u1")
        assert library.info().slots == 1
    assert torch.equal(used(library, net, "u1"), solo["u1"])


def test_changes_of_files_are_noticed_when_that_is_asked_for(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=4)
    library.pin("u0", "u1")
    os.replace(folder / "u2.pet.safetensors", folder / "u0.pet.safetensors")
    assert torch.equal(used(library, net, "u0"), solo["u0"])
    with library.using("u0"):
        assert torch.equal(used(library, net, "u0", refresh=True), solo["u2"])
        assert torch.equal(output(net), solo["u0"])  # the block goes on with what it has
        assert library.info().currsize == 3
    assert torch.equal(used(library, net, "u0"), solo["u2"])
    assert library.info().currsize == 2
    shutil.copy(folder / "u3.pet.safetensors", folder / "new.pet.safetensors")
    shutil.copy(folder / "u4.pet.safetensors", folder / "u1.pet.safetensors")
    (folder / "u5.pet.safetensors").unlink()
    assert library.refresh() == (("new",), ("u1",), ("u2", "u5"))
    assert torch.equal(used(library, net, "u1"), solo["u4"])
    assert "u1" in library.pinned
    used(library, net, "new")
    (folder / "u1.pet.safetensors").write_bytes(b"damaged")
    with pytest.raises(DeltaFileError):
        used(library, net, "u1", refresh=True)
    with pytest.raises(DeltaFileError):
        used(library, net, "u1")  # the one before is not taken for it
    assert library.refresh() == ((), ("u1",), ())
    assert library.refresh() == ((), (), ())


def test_a_file_is_verified_once_until_it_is_another_one(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=1)
    with patch.object(files_of_library, "read_delta", wraps=files_of_library.read_delta) as verified:
        for _ in range(3):
            for name in ("u0", "u1"):
                assert torch.equal(used(library, net, name), solo[name])
        assert verified.call_count == library.info().verified == 2
        os.utime(folder / "u0.pet.safetensors", ns=(1, 1))
        used(library, net, "u0")
        assert verified.call_count == 3
        shutil.copy(folder / "u2.pet.safetensors", folder / "u0.pet.safetensors")
        used(library, net, "u1")
        assert torch.equal(used(library, net, "u0"), solo["u2"])
        assert verified.call_count == 4


def test_the_fingerprint_of_the_base_is_taken_once_until_the_base_changes(folder: Path) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=2)
    with patch.object(base_of_library, "fingerprint", wraps=base_of_library.fingerprint) as taken:
        for name in ("u0", "u1", "u2", "u0"):
            used(library, net, name)
        assert taken.call_count == 1
        net.load_state_dict(net.state_dict())  # the same values: it is looked at, and accepted
        used(library, net, "u3")
        assert taken.call_count == 2
        with torch.no_grad():
            net.b.weight.add_(1.0)
        for name in ("u4", "u4", "u0", "u3"):  # those in memory, too, once it was noticed
            with pytest.raises(BaseMismatchError, match="another base model"):
                used(library, net, name)
        with torch.no_grad():
            net.b.weight.copy_(Net().b.weight)
        used(library, net, "u4")
        net.b.weight.data = net.b.weight.data + 1.0
        with pytest.raises(BaseMismatchError, match="another base model"):
            used(library, net, "u5")
    net = Net().eval()
    load_delta(net, folder / "u0.pet.safetensors", name="own", heads=False)
    library = DeltaLibrary(net, folder, resident=2)
    used(library, net, "u1")
    with pytest.warns(UserWarning, match="'own' is a part of the base now"):
        Adapted(net)["own"].merge_()
    with pytest.raises(BaseMismatchError, match="another base model"):
        used(library, net, "u2")


def test_two_libraries_of_one_model_in_two_threads(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    libraries = [DeltaLibrary(net, folder, resident=3), DeltaLibrary(net, folder, resident=2)]
    wrong: list[object] = []

    def work(library: DeltaLibrary, own: list[str]) -> None:
        try:
            for turn in range(16):
                name = own[turn % len(own)]
                if not torch.equal(used(library, net, name), solo[name]):
                    wrong.append(name)
        except Exception as error:
            wrong.append(error)

    lists = (["u0", "u1", "u2", "u3"], ["u4", "u0", "u5"])
    threads = [threading.Thread(target=work, args=pair) for pair in zip(libraries, lists, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("resident", [3, 6])
def test_threads_each_with_deltas_of_their_own(folder: Path, solo: dict[str, Tensor], resident: int) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=resident)
    wrong: list[object] = []

    def work(own: list[str]) -> None:
        try:
            for turn in range(24):
                name = own[turn % len(own)]
                if not torch.equal(used(library, net, name, refresh=turn % 5 == 0), solo[name]):
                    wrong.append(name)
                if turn % 6 == 0 and resident == 6:
                    with library.rows([name, own[0], None, name, own[0]]):
                        if not torch.allclose(output(net)[3], solo[name][3], atol=1e-6):
                            wrong.append((name, "rows"))
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=work, args=(own,)) for own in (["u0", "u1"], ["u2", "u3"], ["u4", "u0", "u5"])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert library.info().currsize <= resident
    for name in ("u5", "u0"):
        assert torch.equal(used(library, net, name), solo[name])


class Graphs:
    """A compiler that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: object) -> object:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_compiled_anew(folder: Path, solo: dict[str, Tensor], mode: type) -> None:
    def compiled() -> tuple[nn.Module, Graphs, nn.Module]:
        torch._dynamo.reset()
        net, graphs = Net().eval(), Graphs()
        return net, graphs, torch.compile(net, backend=graphs, fullgraph=True)

    net, graphs, fast = compiled()
    library = DeltaLibrary(net, folder, resident=2)
    with mode():
        for name in ("u0", "u1", "u2", "u0", "u5"):
            with library.using(name):
                assert torch.allclose(fast(X), solo[name], atol=1e-6)
    assert graphs.count == 1
    for way in ("activate", "using"):  # once for each that acts, and known when it comes back
        net, graphs, fast = compiled()
        for name in ("u0", "u1", "u2"):
            load_delta(net, folder / f"{name}.pet.safetensors", name=name)
        adapted = Adapted(net)
        with mode():
            for name in ("u0", "u1", "u2", "u1", "u0", "u2"):
                if way == "activate":
                    adapted.activate(name)
                    assert torch.allclose(fast(X), solo[name], atol=1e-6)
                else:
                    with adapted.using(name):
                        assert torch.allclose(fast(X), solo[name], atol=1e-6)
        assert graphs.count == 3


def test_the_eighth_set_of_deltas_that_is_compiled_is_warned_of(folder: Path) -> None:
    torch._dynamo.reset()
    net = Net().eval()
    for number in range(7):
        load_delta(net, folder / f"u{number % 6}.pet.safetensors", name=f"u{number}")
    adapted, fast = Adapted(net), torch.compile(net, backend="eager")
    sets = [(), *((f"u{number}",) for number in range(7))]
    with torch.no_grad():
        for names in sets[:-1]:
            adapted.activate(*names)
            fast(X)
        adapted.activate(*sets[-1])
        with pytest.warns(UserWarning, match="8th set of deltas that a model is compiled for"):
            fast(X)


def test_values_that_a_graph_needs_are_not_written_over_without_a_word(folder: Path) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=2)
    x = X.clone().requires_grad_()
    with library.using("u0"):
        loss = net(x).square().sum()
    used(library, net, "u1")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_slots_are_deltas_that_others_leave_alone(folder: Path, solo: dict[str, Tensor]) -> None:
    net = Net().eval()
    library = DeltaLibrary(net, folder, resident=3)
    with library.using("u0"), library.using("u1"):
        adapted = Adapted(net)
        assert list(adapted) == ["slot-0", "slot-1"]
        with pytest.raises(PETError, match="cannot be removed now"):
            adapted["slot-1"].remove()
    assert not any(parameter.requires_grad for parameter in net.a.pet.parameters())
    adapted.activate("slot-0")  # whoever knows it may use it: nobody writes there meanwhile
    assert torch.equal(output(net), solo["u0"])
    for name in ("u2", "u3", "u4"):
        assert torch.equal(used(library, net, name), solo[name])
    assert torch.equal(output(net), solo["u0"])
    adapted.activate()
    adapted["slot-1"].remove()
    assert torch.equal(used(library, net, "u5"), solo["u5"])
    deltas = [module for module in net.modules() if isinstance(module, LowRankLinear)]
    assert len(deltas) == 2 * library.info().slots
