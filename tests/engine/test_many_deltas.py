"""Several deltas by name in one model: loaded, chosen, saved and taken out one by one, each with what it trained."""

import contextlib
import copy
import pickle
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_pet import (
    Adapted,
    ArgumentError,
    BaseMismatchError,
    BitFitCallback,
    DeltaFileError,
    LoRACallback,
    NotMergeableError,
    PETError,
    TargetError,
    apply,
    load_delta,
    save_delta,
)
from lightning_pet.model.naming import delta_of

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Has a head, and buffers that change with the delta."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        torch.manual_seed(1)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.norm(self.a(x)))))


def methods(kind: str) -> list:
    return {
        "a": [LoRACallback(r=2, target_modules=["a", "b"])],
        "b": [LoRACallback(r=3, target_modules=["b"]), BitFitCallback()],
        "plain": [LoRACallback(r=2, target_modules=["a"], modules_to_save=[])],
        "more": [LoRACallback(r=1, target_modules=["a", "b"], modules_to_save=[])],
        "dora": [LoRACallback(r=2, target_modules=["a"], use_dora=True, modules_to_save=[])],
    }[kind]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Trained deltas, and what each computes alone."""
    folder = tmp_path_factory.mktemp("deltas")
    found = {}
    for seed, (name, kind, outputs) in enumerate(
        [
            ("a", "a", 3),
            ("b", "b", 3),
            ("five", "a", 5),
            ("plain", "plain", 3),
            ("more", "more", 3),
            ("dora", "dora", 3),
        ]
    ):
        net = Net(outputs)
        adapted = apply(net, methods(kind))
        torch.manual_seed(seed + 5)
        with torch.no_grad():
            for _, parameter in net.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        if kind in ("a", "b"):
            net.train()(torch.randn(7, 6))
        net.eval()
        adapted.save(folder / f"{name}.pet.safetensors")
        found[name] = (folder / f"{name}.pet.safetensors", output(net))
    return found


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(X)


def loaded(files, *names: str) -> tuple[Net, Adapted]:
    net = Net().eval()
    for name in names:
        load_delta(net, files[name][0], name=name, base_check="off" if name == "five" else "error")
    return net, Adapted(net)


def test_a_second_one_changes_nothing_until_it_is_chosen(files):
    net = Net().eval()
    adapted = load_delta(net, files["a"][0], name="a")
    assert torch.equal(output(net), files["a"][1])
    assert adapted.active == ("a",)
    second = adapted.load("b", files["b"][0])
    assert torch.equal(output(net), files["a"][1])
    assert list(adapted) == ["a", "b"]
    assert len(adapted) == 2
    assert "b" in adapted
    assert adapted.active == ("a",)
    assert "b" in repr(second)
    assert not second.acts
    assert {str(delta_of(name)) for name in adapted.record.delta_names} == {"a", "b"}


@pytest.mark.parametrize("order", [("a", "b", "five"), ("five", "b", "a"), ("b", "five", "a")])
def test_switching_is_exact_in_any_order(files, order):
    net = Net().eval()
    base, keys = output(net), list(net.state_dict())
    flags, kinds = [p.requires_grad for p in net.parameters()], [type(m) for m in net.modules()]
    for name in order:
        load_delta(net, files[name][0], name=name, base_check="off")
    adapted = Adapted(net)
    for name in [*order, *reversed(order), *order]:
        adapted.activate(name)
        assert torch.equal(output(net), files[name][1])
        assert net.head.out_features == net.head.weight.shape[0] == (5 if name == "five" else 3)
        for other in order:
            with adapted.using(other):
                assert adapted.active == (other,)
                assert torch.equal(output(net), files[other][1])
        with adapted.disabled():
            assert torch.equal(output(net), base)
    adapted.activate()
    assert adapted.active == ()
    assert torch.equal(output(net), base)
    adapted.activate(order[1])
    for position, name in enumerate(order):
        adapted[name].remove()
        left = [*order[position + 1 :]]
        expected = files[order[1]][1] if order[1] in left else base
        assert torch.equal(output(net), expected)
    assert list(net.state_dict()) == keys
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [type(m) for m in net.modules()] == kinds
    assert torch.equal(output(net), base)


def test_one_of_several_is_saved_as_if_it_were_alone(files, tmp_path):
    net, adapted = loaded(files, "a", "b", "plain")
    for active in (("a",), ("b",), (), ("plain", "a"), ("b", "plain")):
        adapted.activate(*active)
        for name in ("a", "b", "plain"):
            adapted[name].save(tmp_path / "again.pet.safetensors")
            assert (tmp_path / "again.pet.safetensors").read_bytes() == files[name][0].read_bytes()
    save_delta(net, tmp_path / "again.pet.safetensors", name="a")
    assert (tmp_path / "again.pet.safetensors").read_bytes() == files["a"][0].read_bytes()
    adapted.activate("a", "plain")
    with pytest.raises(ArgumentError, match="deltas 'a', 'b', 'plain'; say which one is meant"):
        save_delta(net, tmp_path / "again.pet.safetensors")
    assert {delta_of(name) for name in adapted["b"].state_dict()} == {"b", None}
    assert [row.method for row in adapted["plain"].plan().rows] == ["lora@plain"]


def test_several_act_together_in_the_order_that_is_given(files):
    net, adapted = loaded(files, "a", "plain", "more")
    adapted.activate("plain", "more")
    both = output(net)
    adapted.activate("more", "plain")
    assert torch.allclose(output(net), both, atol=1e-6)
    order = [[key for key in net.a.pet.acting().activation]]
    assert order == [["lora_default@more", "lora_default@plain"]]
    with adapted.using("plain", "more"):
        assert net.a.pet.acting().activation == ("lora_default@plain", "lora_default@more")
    adapted.activate("a", "plain")  # a head, and none
    assert not torch.equal(output(net), files["a"][1])
    adapted.activate("a")
    assert torch.equal(output(net), files["a"][1])


def test_what_cannot_be_is_refused_by_name(files):
    net, adapted = loaded(files, "a", "b", "plain", "dora")
    with pytest.raises(ArgumentError, match=r"'a' and 'b' have each its own values for head\.weight and"):
        adapted.activate("a", "b")
    with pytest.raises(ArgumentError, match="'a' and 'b' have each"), adapted.using("a", "b"):
        pass
    with pytest.raises(TargetError, match="'a' would have DoRA and another"):
        adapted.activate("plain", "dora")
    with pytest.raises(ArgumentError, match=r"no delta 'plane' in this model, it has .* Did you mean 'plain'"):
        adapted.activate("plane")
    with pytest.raises(ArgumentError, match="no delta 'c'"):
        adapted["c"]
    with pytest.raises(ArgumentError, match="'a' is named twice"):
        adapted.activate("a", "a")
    with pytest.raises(ArgumentError, match="a delta of this name in this model already"):
        load_delta(net, files["b"][0], name="a")
    with pytest.raises(ArgumentError, match="1 to 64 letters"):
        load_delta(net, files["b"][0], name="a.b")
    net.b.weight.data.add_(1.0)
    with pytest.raises(BaseMismatchError, match="another base model"):
        load_delta(net, files["b"][0], name="new")
    net.b.weight.data.sub_(1.0)
    assert adapted.active == ("a",)
    assert list(adapted) == ["a", "b", "plain", "dora"]
    with pytest.raises(ArgumentError, match="say which one is meant"):
        adapted.merge_()


def test_removal_waits_for_blocks_that_use_the_delta(files):
    net, adapted = loaded(files, "a", "b")
    inside, go, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        with adapted.using("b"):
            inside.set()
            go.wait(10)
            seen.append(output(net))

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    with pytest.raises(PETError, match="'b' cannot be removed now: 1 block of"):
        adapted["b"].remove()
    adapted.activate()  # others may go on choosing for themselves
    adapted.activate("a")
    go.set()
    thread.join()
    assert torch.equal(seen[0], files["b"][1])
    assert torch.equal(output(net), files["a"][1])
    adapted["b"].remove()
    assert list(adapted) == ["a"]


def test_a_block_keeps_what_it_has_chosen_while_others_activate(files):
    net, adapted = loaded(files, "a", "b", "five")
    with adapted.using("a"):
        for name in ("b", "five", "a", "b"):
            thread = threading.Thread(target=adapted.activate, args=(name,))
            thread.start()
            thread.join()
            assert torch.equal(output(net), files["a"][1])
    assert torch.equal(output(net), files["b"][1])


def test_threads_use_different_deltas_at_the_same_time(files):
    net, adapted = loaded(files, "a", "b", "five")
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(30):
            with adapted.using(name):
                if not torch.equal(output(net), files[name][1]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "five") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(output(net), files["a"][1])


def test_copies_choose_for_themselves(files):
    net, adapted = loaded(files, "a", "b", "five")
    adapted.activate("b")
    copies: list[Callable[[nn.Module], nn.Module]] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    for copied in copies:
        twin = copied(net)
        other = Adapted(twin)
        assert other.active == ("b",)
        assert torch.equal(output(twin), files["b"][1])
        other.activate("five")
        assert torch.equal(output(twin), files["five"][1])
        assert torch.equal(output(net), files["b"][1])
        other["a"].remove()
        assert list(adapted) == ["a", "b", "five"]


def test_a_delta_without_its_head(files, tmp_path):
    net, adapted = loaded(files, "a")
    with pytest.raises(ArgumentError, match="expected True or False"):
        load_delta(net, files["b"][0], name="b", heads="no")  # type: ignore[arg-type]
    load_delta(net, files["b"][0], name="b", heads=False)
    with pytest.raises(ArgumentError, match=r"'b' and 'a' have each its own values for norm\."):  # of the statistics
        adapted.activate("b", "a")
    adapted.activate("b")
    assert torch.equal(net.head.weight, Net().head.weight)
    adapted["b"].save(tmp_path / "headless.pet.safetensors")
    fresh = Net().eval()
    load_delta(fresh, tmp_path / "headless.pet.safetensors")
    assert torch.equal(output(fresh), output(net))


def test_another_prefix_is_said_and_not_guessed(files):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    outer = Outer().eval()
    with pytest.raises(PETError):
        load_delta(outer, files["a"][0], name="a")
    with pytest.raises(ArgumentError, match=r"nothing in .* begins with 'model\.'"):
        load_delta(outer, files["a"][0], name="a", rename={"model.": "net."})
    load_delta(outer, files["a"][0], name="a", rename={"": "net."})
    assert torch.equal(output(outer), files["a"][1])
    outer.net.b.weight.data.add_(1.0)
    with pytest.raises(BaseMismatchError, match="another base model"):
        load_delta(outer, files["b"][0], name="b", rename={"": "net."})


def test_merging_one_leaves_the_others(files):
    net, adapted = loaded(files, "a", "plain")
    adapted.activate("plain", "a")
    together = output(net)
    with pytest.warns(UserWarning, match="'plain' is a part of the base now. 'a' stayed"):
        adapted["plain"].merge_()
    assert list(adapted) == ["a"]
    assert torch.allclose(output(net), together, atol=1e-6)
    net, adapted = loaded(files, "a", "b")
    with pytest.warns(UserWarning, match="'b' is a part of the base now"):
        adapted["b"].merge_()
    assert adapted.active == ("a",)
    adapted.activate()
    assert torch.allclose(output(net), files["b"][1], atol=1e-6)  # its head is the base's
    adapted["a"].remove()
    assert torch.allclose(output(net), files["b"][1], atol=1e-6)


@pytest.mark.parametrize("active", [("a",), ("a", "plain"), ()])
def test_a_merge_of_one_leaves_what_trains_and_the_way_back_of_the_others(files, active):
    net, adapted = loaded(files, "plain", "a")
    adapted["plain"].merge_()
    adapted.remove()
    merged = output(net)  # "plain" in the base, and nothing of "a"
    net, adapted = loaded(files, "plain", "a")
    adapted.activate(*active)
    trained = {name for name, p in net.named_parameters() if p.requires_grad and delta_of(name) != "plain"}
    adapted["plain"].merge_()
    assert {name for name, p in net.named_parameters() if p.requires_grad} == trained
    adapted.remove()
    assert torch.equal(output(net), merged)


def test_a_merge_that_is_refused_leaves_what_trains(files):
    net, adapted = loaded(files, "plain", "a")
    adapted.activate("plain", "a")
    trained = {name: p.requires_grad for name, p in net.named_parameters()}
    net.a.weight.data[0, 0] = torch.finfo(torch.float32).max
    with torch.no_grad():
        for tensor in adapted["plain"].state_dict().values():
            tensor.fill_(1e30)
    with pytest.raises(NotMergeableError):
        adapted["plain"].merge_()
    assert {name: p.requires_grad for name, p in net.named_parameters()} == trained


def test_a_file_may_say_what_it_is_called(files, tmp_path):
    _, adapted = loaded(files, "a")
    adapted["a"].save(tmp_path / "named.pet.safetensors", notes={"name": "tone"})
    fresh = Net().eval()
    assert list(load_delta(fresh, tmp_path / "named.pet.safetensors")) == ["tone"]
    assert list(load_delta(fresh, files["b"][0])) == ["tone", "default"]
    assert torch.equal(output(fresh), files["a"][1])


def test_only_what_acts_trains(files):
    net, adapted = loaded(files, "a", "b")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {delta_of(name) for name in trained} == {"a", None}
    adapted.activate("b")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == set(adapted.record.trainable_names)
    assert {delta_of(name) for name in trained} == {"b", None}
    assert "norm.bias" in trained
    adapted.activate("a")
    assert not net.norm.bias.requires_grad
    adapted.activate()
    assert not any(p.requires_grad for p in net.parameters())


def test_values_are_replaced_in_place(files, tmp_path):
    _, other = loaded(files, "a")
    with torch.no_grad():
        for name, tensor in other["a"].state_dict().items():
            if tensor.is_floating_point() and "running" not in name:
                tensor.mul_(-1.5)
    other["a"].save(tmp_path / "new.pet.safetensors")
    new = output(other.root)
    net, adapted = loaded(files, "a", "b")
    tensors = {name: id(tensor) for name, tensor in net.named_parameters()}
    compiled = torch.compile(net, backend="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(X)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for path, expected in [(tmp_path / "new.pet.safetensors", new), files["a"]] * 2:
        adapted.replace("a", path)
        assert torch.equal(output(net), expected)
        with torch.no_grad():
            assert torch.allclose(compiled(X), expected, atol=1e-6)
        with adapted.using("b"):
            assert torch.equal(output(net), files["b"][1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= count + 1  # of the block
    assert {name: id(tensor) for name, tensor in net.named_parameters()} == tensors
    adapted.activate("b")
    adapted.replace("a", tmp_path / "new.pet.safetensors")
    assert torch.equal(output(net), files["b"][1])
    with adapted.using("a"):
        assert torch.equal(output(net), new)
        adapted.replace("a", files["a"][0])
        assert torch.equal(output(net), files["a"][1])
    adapted["a"].save(tmp_path / "again.pet.safetensors")
    assert (tmp_path / "again.pet.safetensors").read_bytes() == files["a"][0].read_bytes()
    for name in ("plain", "five"):
        with pytest.raises(DeltaFileError, match="cannot replace 'a' in place"):
            adapted.replace("a", files[name][0], base_check="off")
    adapted.activate("a")
    assert torch.equal(output(net), files["a"][1])


def test_a_forward_sees_one_version_whole(files, tmp_path):
    _, other = loaded(files, "a")
    with torch.no_grad():
        for name, tensor in other["a"].state_dict().items():
            if ".pet." in name or "head" in name:
                tensor.mul_(-1.5)
    other["a"].save(tmp_path / "new.pet.safetensors")
    both = [output(other.root), files["a"][1], files["b"][1]]
    net, adapted = loaded(files, "a", "b")
    stop, mixed = threading.Event(), []

    def run(block: bool) -> None:
        while not stop.is_set():
            with adapted.using("a") if block else contextlib.nullcontext():
                found = output(net)
            if not any(torch.equal(found, one) for one in both):
                mixed.append(found)

    threads = [threading.Thread(target=run, args=(block,)) for block in (False, True)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for turn in range(8):
            adapted.replace("a", files["a"][0] if turn % 2 else tmp_path / "new.pet.safetensors")
            adapted.activate("b" if turn % 3 else "a")
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not mixed
    adapted.remove()
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
