"""What a run trains: the plan, and beside the base what the user trains, no more and no less."""

import copy
import sys
import types

import lightning as L
import pytest
import torch
from hf_models import bert
from models import ckpt, digest, every_step, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_pet as lp
from lightning_pet.model.naming import CHILD
from lightning_pet.targets.bases import bases_of, is_pretrained

IDS = torch.randint(1, 17, (16, 5), generator=torch.Generator().manual_seed(1))
TEXT = DataLoader(TensorDataset(IDS, IDS[:, 0] % 3), batch_size=8)
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
VECTORS = DataLoader(TensorDataset(X, (X.sum(-1) > 0).long()), batch_size=8)
METHODS = {
    "lora": lambda **o: lp.LoRACallback(r=2, verbose=False, **o),
    "adapter": lambda **o: lp.AdapterCallback(bottleneck_size=2, verbose=False, **o),
    "ia3": lambda **o: lp.IA3Callback(verbose=False, **o),
    "prefix": lambda **o: lp.PrefixTuningCallback(length=2, projection=False, verbose=False, **o),
    "prompt": lambda **o: lp.PromptTuningCallback(length=2, verbose=False, **o),
    "bitfit": lambda **o: lp.BitFitCallback(verbose=False, **o),
    "freezing": lambda **o: lp.LayerFreezingCallback(train_last=1, verbose=False, **o),
    "intrinsic": lambda **o: lp.IntrinsicDimensionCallback(d=60, exclude_modules=["pooler.dense"], verbose=False, **o),
    "diff": lambda **o: lp.DiffPruningCallback(density=0.5, exclude_modules=["pooler.dense"], verbose=False, **o),
}


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return build()


class Reader(L.LightningModule):
    """A pretrained encoder, and a head that is the module's own."""

    def __init__(self, name="out", head=lambda: nn.Linear(8, 3)):
        super().__init__()
        self.bert, self.name = bert().bert, name
        setattr(self, name, seeded(head))

    def forward(self, ids):
        return getattr(self, self.name)(self.bert(ids).last_hidden_state.mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(module, data, *callbacks, ckpt_path=None, **options):
    run = trainer(*callbacks, **{"max_epochs": 1} | options)
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def moved(module, data, *callbacks, **options):
    """Names of the base parameters that a run changed."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, data, *callbacks, **options)
    return {n for n, p in module.named_parameters() if n in before and not torch.equal(p, before[n])}


def held(run):
    return {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}


# --- beside a pretrained model ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_head_beside_a_pretrained_model_trains_with_every_method(method):
    module = Reader()
    names = moved(module, TEXT, METHODS[method]())
    assert {"out.weight", "out.bias"} <= names
    if method not in ("bitfit", "freezing"):
        assert names == {"out.weight", "out.bias"}


@pytest.mark.parametrize("name", ["linear", "mlp", "proj", "cls", "dense", "decoder", "projection", "regressor"])
def test_its_name_does_not_matter(name):
    def head():
        return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))

    targets = ["all-linear"] if name in ("dense", "proj") else ["dense"]
    module = Reader(name, head)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, TEXT, METHODS["lora"](target_modules=targets, exclude_modules=["pooler.dense"]))
    own = {n for n, _ in getattr(module, name).named_parameters(prefix=name)}
    assert {n for n in before if not torch.equal(dict(module.named_parameters())[n], before[n])} == own
    assert not any(CHILD in n.split(".") for n in own)


def test_it_is_in_the_checkpoint_resumes_and_loads_exactly(tmp_path):
    whole = Reader()
    fit(whole, TEXT, METHODS["lora"](), every_step(tmp_path))
    state = torch.load(ckpt(tmp_path, 2), weights_only=True)["state_dict"]
    base = {n for n in state if CHILD not in n.split(".") and not n.startswith("lightning_pet")}
    assert base == {"out.weight", "out.bias"}
    resumed = Reader()
    fit(resumed, TEXT, METHODS["lora"](), ckpt_path=ckpt(tmp_path, 1))
    assert digest(resumed) == digest(whole)
    loaded = Reader("out", lambda: nn.Linear(8, 3))
    lp.load_delta(loaded, ckpt(tmp_path, 2))
    assert torch.equal(loaded.eval()(IDS), whole.eval()(IDS))


def test_a_shell_around_both_and_apply_without_a_trainer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.readouts = bert().bert, nn.ModuleList(nn.Linear(8, 3) for _ in range(2))
            self.readouts[1].requires_grad_(False)

    net = Net()
    adapted = lp.apply(net, [METHODS["lora"]()])
    assert adapted.record.scopes == ("encoder",)
    assert [p.requires_grad for p in net.readouts.parameters()] == [True, True, False, False]
    assert set(adapted.record.trained_names) == {"readouts.0.weight", "readouts.0.bias"}


def test_a_pattern_that_names_a_part_of_the_users_own_makes_it_base():
    module = Reader("tower", lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    names = moved(module, TEXT, METHODS["lora"](target_modules=["query", "tower.0"]))
    assert names == set()
    assert CHILD in dict(module.tower[0].named_children())


# --- what the user keeps out ----------------------------------------------------------------------------


class Judged(L.LightningModule):
    """A network, and a loss network that the user gives to no optimizer, or to one of its own."""

    def __init__(self, judge=True, module=None):
        super().__init__()
        self.net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
        self.judge = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
        self.two = judge

    def training_step(self, batch, batch_idx):
        wanted = self.judge(F.one_hot(batch[1], 2).float())
        return (self.judge(self.net(batch[0])) - wanted).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam([*self.net.parameters(), *(self.judge.parameters() if self.two else ())], 1e-2)


@pytest.mark.parametrize("module", ["net", None])
@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_what_is_in_no_optimizer_joins_none(module, method):
    make = {
        "lora": lambda **o: METHODS["lora"](target_modules=["net.0"], **o),
        "bitfit": METHODS["bitfit"],
        "full": lambda **o: lp.FullFineTuningCallback(verbose=False, **o),
    }[method]
    judged = Judged(judge=False)
    before = digest(judged.judge)
    run = fit(judged, VECTORS, make(module=module))
    assert digest(judged.judge) == before
    assert all(p.requires_grad and id(p) not in held(run) for p in judged.judge.parameters())
    assert moved(Judged(), VECTORS, make(module=module)) >= {"judge.0.bias"}


def test_a_frozen_part_beside_the_base_stays_in_the_users_optimizer():
    judged = Judged()
    judged.judge.requires_grad_(False)
    run = fit(judged, VECTORS, METHODS["lora"](module="net", target_modules=["0"]))
    assert {id(p) for p in judged.judge.parameters()} <= held(run)
    assert not any(p.requires_grad for p in judged.judge.parameters())


class Distilled(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = bert(), bert().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.student(batch[0]).logits, 1 + self.teacher(batch[0]).logits)

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), 1e-2)


@pytest.mark.parametrize("method", ["lora", "adapter", "bitfit", "freezing"])
def test_a_teacher_stays_as_the_user_froze_it(method):
    module = Distilled()
    with torch.no_grad():
        module.teacher.bert.embeddings.word_embeddings.weight += 1  # another model, no copy
    before, modules = digest(module.teacher), len(list(module.teacher.modules()))
    names = moved(module, TEXT, METHODS[method]())
    assert digest(module.teacher) == before
    assert len(list(module.teacher.modules())) == modules
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert {"student.classifier.weight", "student.classifier.bias"} <= names


def test_a_head_that_the_user_froze_stays_frozen_unless_the_whole_base_is():
    model = bert()
    model.classifier.requires_grad_(False)
    lp.apply(model, [METHODS["lora"]()])
    assert not model.classifier.weight.requires_grad
    model = bert()
    model.classifier.requires_grad_(False)
    lp.apply(model, [METHODS["lora"](modules_to_save=["classifier"])])
    assert model.classifier.weight.requires_grad
    model = bert().requires_grad_(False)
    lp.apply(model, [METHODS["lora"]()])
    assert model.classifier.weight.requires_grad


@pytest.mark.parametrize("method", ["bitfit", "freezing", "full"])
def test_methods_in_place_thaw_nothing(method, tmp_path):
    make = METHODS.get(method, lambda **o: lp.FullFineTuningCallback(**o))
    model = bert()
    model.bert.encoder.layer[1].attention.requires_grad_(False)
    adapted = lp.apply(model, [make()])
    frozen = "bert.encoder.layer.1.attention."
    assert not any(name.startswith(frozen) for name in adapted.record.trained_names)
    assert any(name.startswith("bert.encoder.layer.1.output") for name in adapted.record.trained_names)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    lp.save_delta(model, tmp_path / "x.pet.safetensors")
    other = bert()  # nothing is frozen in it
    loaded = lp.load_delta(other, tmp_path / "x.pet.safetensors")
    assert set(loaded.record.applied[0].trained) == set(adapted.record.applied[0].trained)
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)


def test_full_fine_tuning_of_a_frozen_model_is_refused():
    with pytest.raises(lp.TargetError, match="every parameter of BertForSequenceClassification is frozen"):
        lp.apply(bert().requires_grad_(False), [lp.FullFineTuningCallback()])


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_what_is_frozen_in_a_hook_counts_as_well(hook, method):
    def freeze(self, stage=None):
        assert all(p.requires_grad for n, p in self.student.named_parameters() if CHILD not in n.split("."))
        self.teacher.requires_grad_(False)

    class Later(Distilled):
        def __init__(self):
            super().__init__()
            self.teacher.requires_grad_(True)
            with torch.no_grad():
                self.teacher.bert.embeddings.word_embeddings.weight += 1

    setattr(Later, hook, freeze)
    module = Later()
    before = digest(module.teacher)
    moved(module, TEXT, METHODS[method]())
    assert digest(module.teacher) == before
    assert not any(p.requires_grad for p in module.teacher.parameters())


# --- models of the user's own ---------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.readout = nn.Linear(8, 2)

    def forward(self, x):
        return self.readout(self.body(x))


def test_the_last_layer_of_a_model_of_ones_own_is_left_to_the_user():
    net = seeded(Plain)
    adapted = lp.apply(net, [METHODS["lora"](target_modules=["body.0"])])
    assert set(adapted.record.trained_names) == {"readout.weight", "readout.bias"}
    assert not net.body[2].weight.requires_grad
    net = seeded(Plain)
    assert not lp.apply(net, [METHODS["lora"](target_modules=["body.0"], modules_to_save=[])]).record.trained_names


def test_where_a_forward_can_be_run_it_tells_the_output_layers(tmp_path):
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    adapted = lp.apply(net, [METHODS["lora"](target_modules=["0"])], forward=lambda: net(X))
    assert adapted.record.trained_names == ("4.weight", "4.bias")
    with torch.no_grad():
        net[4].weight.add_(1)
    lp.save_delta(net, tmp_path / "x.pet.safetensors")
    other = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert lp.load_delta(other, tmp_path / "x.pet.safetensors").record.trained_names == ("4.weight", "4.bias")
    assert torch.equal(other(X), net(X))


def test_the_end_of_the_last_block_of_an_encoder_is_no_head():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    adapted = lp.apply(net, [METHODS["adapter"]()], forward=lambda: net(torch.randn(2, 3, 8)))
    assert not adapted.record.trained_names


def test_an_output_that_no_target_feeds_is_no_head():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.a_end, self.b_end = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            return self.a_end(self.a(x)), self.b_end(self.b(x))

    net = seeded(Two)
    adapted = lp.apply(net, [METHODS["lora"](target_modules=["a"])], forward=lambda: net(X))
    assert adapted.record.trained_names == ("a_end.weight", "a_end.bias")


def test_a_language_model_of_ones_own_keeps_its_output_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(17, 6), nn.Linear(6, 6), nn.Linear(6, 17)

        def forward(self, ids):
            return self.head(self.body(self.table(ids)))

    for forward in (None, True):
        net = seeded(Model)
        look = (lambda net=net: net(IDS)) if forward else None
        assert not lp.apply(net, [METHODS["lora"](target_modules=["body"])], forward=look).record.trained_names


@pytest.mark.parametrize("name", ["mlp_head", "segmentation_head", "aux_classifier", "fc"])
def test_names_are_a_hint_where_nothing_else_tells(name):
    net = seeded(Plain)
    setattr(net, name, nn.Linear(8, 2))
    net.last = nn.Linear(2, 2)
    names = lp.apply(net, [METHODS["lora"](target_modules=["body.0"])]).record.trained_names
    assert {f"{name}.weight", f"{name}.bias"} <= set(names)


# --- models of libraries --------------------------------------------------------------------------------


def test_a_head_that_was_not_in_the_file_is_new(tmp_path):
    from transformers import BertPreTrainedModel

    bert().save_pretrained(tmp_path)

    class Tagger(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            from transformers import BertModel

            self.bert, self.anything = BertModel(config), nn.Linear(8, 2)
            self.post_init()

    model = Tagger.from_pretrained(tmp_path)
    assert bases_of(model) == ("",)
    names = lp.apply(model, [METHODS["lora"](target_modules=["query"])]).record.trained_names
    assert set(names) == {"anything.weight", "anything.bias"}
    model.anything.weight.requires_grad_()


def test_what_counts_as_pretrained():
    class Timm(nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg, self.fc = {"url": ""}, nn.Linear(2, 2)

    library = types.ModuleType("a_library_of_models")
    exec(
        "from torch import nn\n"
        "class ResNet(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.conv = nn.Conv2d(1, 1, 1); self.top = Head()\n"
        "class Head(nn.Sequential):\n"
        "    def __init__(self): super().__init__(nn.Linear(2, 2))\n"
        "def resnet(*, weights=None) -> ResNet: return ResNet()\n",
        vars(library),
    )
    sys.modules[library.__name__] = library
    library.ResNet.__module__ = library.Head.__module__ = library.__name__
    try:

        class Encoder(library.ResNet):
            pass

        assert is_pretrained(Timm())
        assert is_pretrained(Encoder())
        assert not is_pretrained(library.Head())
    finally:
        del sys.modules[library.__name__]
    assert is_pretrained(bert())
    assert not is_pretrained(Reader())
    assert not is_pretrained(Plain())
    assert bases_of(Reader()) == ("bert",)
    assert bases_of(copy.deepcopy(Distilled())) == ("student",)


def test_a_class_of_ones_own_with_a_way_to_load_itself_is_looked_into():
    class Net(Plain):
        @classmethod
        def from_pretrained(cls):
            return cls()

        def __init__(self):
            super().__init__()
            self.body = bert().bert

    assert bases_of(nn.ModuleDict({"net": Net()})) == ("net.body",)
    plain = Plain()
    plain.__class__ = type("Own", (Plain,), {"from_pretrained": classmethod(lambda cls: cls())})
    assert bases_of(plain) == ("",)


# --- copies that the user keeps ---------------------------------------------------------------------------


class Momentum(L.LightningModule):
    """An online network, and a copy of it that follows, parameter by parameter."""

    def __init__(self):
        super().__init__()
        self.online = seeded(Plain)
        self.slow = copy.deepcopy(self.online).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            goal = self.slow(batch[0])
        return F.cross_entropy(self.online(batch[0]), batch[1]) + F.mse_loss(self.online(batch[0]), goal)

    @torch.no_grad()
    def on_train_batch_end(self, *args):
        for slow, fast in zip(self.slow.parameters(), self.online.parameters(), strict=True):
            slow.lerp_(fast, 0.3)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-1)

    def forward(self, x):
        return self.online(x), self.slow(x)


class Byol(Momentum):
    """A pretrained encoder with a projector, a copy of both, and a predictor."""

    def __init__(self):
        super().__init__()
        self.online = nn.ModuleDict({"encoder": bert().bert, "projector": seeded(lambda: nn.Linear(8, 6))})
        self.slow = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = seeded(lambda: nn.Linear(6, 6))

    def project(self, net, ids):
        return net["projector"](net["encoder"](ids).last_hidden_state.mean(1))

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            goal = self.project(self.slow, batch[0])
        return F.mse_loss(self.predictor(self.project(self.online, batch[0])), 1 + goal)

    def forward(self, ids):
        return self.project(self.online, ids), self.project(self.slow, ids)


COPIES = {
    "lora": lambda **o: METHODS["lora"](**o),
    "every": lambda **o: METHODS["lora"](target_modules=["all-linear"], **o),
    "adapter": METHODS["adapter"],
    "bitfit": METHODS["bitfit"],
    "full": lambda **o: lp.FullFineTuningCallback(verbose=False, **o),
    "module": lambda **o: METHODS["lora"](module="online", target_modules=["body.0"], **o),
}
KEPT = {
    ("byol", "lora"): (Byol, TEXT, IDS),
    ("byol", "adapter"): (Byol, TEXT, IDS),
    ("byol", "bitfit"): (Byol, TEXT, IDS),
    ("byol", "full"): (Byol, TEXT, IDS),
    ("mean teacher", "every"): (Momentum, VECTORS, X),
    ("mean teacher", "bitfit"): (Momentum, VECTORS, X),
    ("mean teacher", "full"): (Momentum, VECTORS, X),
    ("mean teacher", "module"): (Momentum, VECTORS, X),
}


@pytest.mark.parametrize(("kind", "method"), KEPT, ids=map("-".join, KEPT))
def test_a_copy_that_the_user_keeps_has_the_same_deltas_untrained(kind, method, tmp_path):
    build, data, inputs = KEPT[kind, method]
    whole = build()
    run = fit(whole, data, COPIES[method](), every_step(tmp_path))
    pairs = list(zip(whole.slow.named_parameters(), whole.online.named_parameters(), strict=True))
    assert all(name == other for (name, _), (other, _) in pairs)
    assert not any(p.requires_grad for p in whole.slow.parameters())
    assert not any(id(p) in held(run) for n, p in whole.slow.named_parameters() if CHILD in n.split("."))
    assert any(p.requires_grad for p in whole.online.parameters())
    if method != "full" and method != "bitfit":
        deltas = [(a, b) for (name, a), (_, b) in pairs if CHILD in name.split(".")]
        assert deltas
        assert any(not torch.equal(a, b) for a, b in deltas)  # the average lags behind
        assert any(a.abs().sum() for (name, a), _ in pairs if name.endswith((".b", "up.weight", "up")))
    resumed = build()
    fit(resumed, data, COPIES[method](), ckpt_path=ckpt(tmp_path, 1))
    assert digest(resumed) == digest(whole)
    loaded = build()
    lp.load_delta(loaded, ckpt(tmp_path, 2))
    assert digest(loaded) == digest(whole)
    for one, other in zip(loaded.eval()(inputs), whole.eval()(inputs), strict=True):
        assert torch.equal(one, other)


def test_methods_whose_deltas_cannot_be_had_twice_say_so_and_leave_the_model_alone():
    for callback in (
        lp.IntrinsicDimensionCallback(d=20),
        lp.AdaLoRACallback(target_modules="all-linear", init_r=2, target_r=1),
    ):
        module = Momentum()
        before = digest(module)
        with pytest.raises(lp.TargetError, match=r"'slow' is a frozen copy of 'online'.*module='online'"):
            lp.apply(module, [callback])
        assert digest(module) == before
    lp.apply(Momentum(), [lp.IntrinsicDimensionCallback(d=20, module="online")])


def test_frozen_layers_of_one_network_are_no_copies():
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    rows = lp.apply(model, [METHODS["lora"]()]).plan().rows
    assert all(row.parameters for row in rows)
    assert sum("layer.0" in row.place for row in rows) == 2


def test_a_teacher_of_ones_own_with_other_values_gets_no_delta():
    module = Momentum()
    with torch.no_grad():
        module.slow.body[0].weight += 1
    adapted = lp.apply(module, [COPIES["every"]()])
    assert all(row.place.startswith("online.") for row in adapted.plan().rows)
    assert not any(p.requires_grad for p in module.slow.parameters())


# --- what is said -----------------------------------------------------------------------------------------


def test_what_looks_new_and_stays_frozen_is_in_the_table_with_the_option_that_trains_it(tmp_path, capsys):
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    plan = lp.apply(net, [METHODS["lora"](target_modules=["0"])]).plan()
    assert plan.frozen_heads == ("2",)
    assert "modules_to_save=['2'] trains it" in str(plan)
    assert not lp.apply(net, [METHODS["lora"](name="b", target_modules=["2"])]).plan().frozen_heads
    model = bert()
    model.classifier.requires_grad_(False)
    assert lp.apply(model, [METHODS["lora"]()]).plan().frozen_heads == ("classifier",)
    assert not lp.apply(bert(), [METHODS["lora"]()]).plan().frozen_heads
    bert().bert.save_pretrained(tmp_path)
    grown = type(bert().bert).from_pretrained(tmp_path)
    grown.pooler.dense = nn.Linear(8, 8)
    assert lp.apply(grown, [METHODS["lora"]()]).plan().frozen_heads == ("pooler.dense",)
    judged = Judged()
    judged.net[2] = nn.Linear(8, 2)
    fit(judged, VECTORS, lp.LoRACallback(r=2, module="net", target_modules=["0"]))
    assert "modules_to_save" in capsys.readouterr().out


def test_a_language_model_has_nothing_new():
    from hf_models import gpt2

    assert not lp.apply(gpt2(), [METHODS["lora"]()]).plan().frozen_heads


def test_a_head_that_the_loss_does_not_reach_is_named():
    class Both(Reader):
        def __init__(self):
            super().__init__()
            self.bert = bert()

        def forward(self, ids):
            return self.out(self.bert.bert(ids).last_hidden_state.mean(1))

    module = Both()
    with pytest.warns(UserWarning, match=r"bert\.classifier .* the loss does not reach it"):
        names = moved(module, TEXT, METHODS["lora"]())
    assert names == {"out.weight", "out.bias"}


def test_layer_freezing_says_when_it_trains_nearly_all():
    with pytest.warns(UserWarning, match=r"trains \d\d% of BertForSequenceClassification, whose stacks have 2 layers"):
        lp.apply(bert(), [lp.LayerFreezingCallback()])
