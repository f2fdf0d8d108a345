"""A part of the base that the user gave to no optimizer stays as it is, whatever a method has planned there."""

import copy
import warnings

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
from lightning_pet.targets.bases import bases_of

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
VECTORS = DataLoader(TensorDataset(X, (X.sum(-1) > 0).long()), batch_size=8)
IDS = torch.randint(1, 17, (16, 5), generator=torch.Generator().manual_seed(1))
TEXT = DataLoader(TensorDataset(IDS, IDS[:, 0] % 3), batch_size=8)


class Judged(L.LightningModule):
    """A network, and a loss network that nobody froze and no optimizer holds."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
            self.judge = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def training_step(self, batch, batch_idx):
        wanted = self.judge(F.one_hot(batch[1], 2).float())
        return (self.judge(self.net(batch[0])) - wanted).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-2)


METHODS = {
    "lora": lambda: lp.LoRACallback(r=2, target_modules="all-linear", verbose=False),
    "adalora": lambda: lp.AdaLoRACallback(
        init_r=2, target_r=1, total_step=4, tinit=1, tfinal=1, target_modules="all-linear", verbose=False
    ),
    "ia3": lambda: lp.IA3Callback(target_modules=["0", "2"], feedforward_modules=["0"], verbose=False),
    "diff": lambda: lp.DiffPruningCallback(density=0.5, structured=False, verbose=False),
    "bitfit": lambda: lp.BitFitCallback(verbose=False),
    "freezing": lambda: lp.LayerFreezingCallback(train_last=2, verbose=False),
    "full": lambda: lp.FullFineTuningCallback(verbose=False),
}


def fit(module, data, *callbacks, ckpt_path=None, **options):
    run = trainer(*callbacks, **{"max_epochs": 1} | options)
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def held(run):
    return {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_network_of_no_optimizer_stays(method):
    module = Judged()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = fit(module, VECTORS, METHODS[method]())
    plain = Judged()
    base = {n: p for n, p in module.judge.named_parameters() if CHILD not in n.split(".")}
    assert all(torch.equal(base[name], p) for name, p in plain.judge.named_parameters())
    assert not {id(p) for p in module.judge.parameters()} & held(run)
    assert {id(p) for p in module.net.parameters()} & held(run)
    said = [str(w.message) for w in seen if "no optimizer of yours holds any of it" in str(w.message)]
    assert len(said) == (method in ("lora", "adalora", "ia3", "diff"))
    assert all("exclude_modules=['judge']" in text for text in said)
    with torch.no_grad():
        same = module.judge(X[:, :2]) - plain.judge(X[:, :2])
    assert same.abs().max() == 0


def test_full_fine_tuning_is_as_without_a_callback_to_the_last_bit():
    ours, plain = Judged(), Judged()
    fit(ours, VECTORS, METHODS["full"]())
    fit(plain, VECTORS)
    assert digest(ours) == digest(plain)


def test_full_fine_tuning_takes_single_layers_as_the_user_does():
    class Part(Judged):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net[2].parameters(), 1e-2)

    ours, plain = Part(), Part()
    fit(ours, VECTORS, METHODS["full"]())
    fit(plain, VECTORS)
    assert digest(ours) == digest(plain)


def test_it_resumes_and_loads_exactly(tmp_path):
    whole = Judged()
    fit(whole, VECTORS, METHODS["lora"](), every_step(tmp_path))
    resumed = Judged()
    fit(resumed, VECTORS, METHODS["lora"](), ckpt_path=ckpt(tmp_path, 1))
    assert digest(resumed) == digest(whole)
    loaded = Judged()
    lp.load_delta(loaded, ckpt(tmp_path, 2))
    assert torch.equal(loaded.net(X), whole.net(X))


def test_a_second_run_may_train_it():
    module = Judged()
    fit(module, VECTORS, METHODS["lora"]())
    before = digest(module.judge)
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), 1e-2)
    fit(module, VECTORS, METHODS["lora"]())
    assert digest(module.judge) != before


def test_an_optimizer_of_the_head_alone_leaves_the_rest_to_the_method():
    class Head(Judged):
        def configure_optimizers(self):
            return torch.optim.Adam(self.judge.parameters(), 1e-2)

    module = Head()
    run = fit(module, VECTORS, lp.LoRACallback(r=2, target_modules=["net.0"], verbose=False))
    assert {id(p) for n, p in module.net.named_parameters() if CHILD in n.split(".")} <= held(run)


def test_several_optimizers_and_a_part_in_none():
    class Two(Judged):
        def __init__(self):
            super().__init__()
            self.automatic_optimization, self.critic = False, nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                loss = self.judge(self.critic(self.net(batch[0]))).pow(2).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.net, self.critic)]

    module = Two()
    run = fit(module, VECTORS, METHODS["lora"]())
    assert not {id(p) for p in module.judge.parameters()} & held(run)


class Distilled(L.LightningModule):
    """A teacher that nobody froze, used without gradients."""

    def __init__(self):
        super().__init__()
        self.teacher, self.student = bert(), bert()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.teacher(batch[0]).logits
        return F.mse_loss(self.student(batch[0]).logits, 1 + wanted)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), 1e-2, weight_decay=0.5)


def test_a_teacher_under_no_grad_joins_no_optimizer():
    module = Distilled()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = fit(module, TEXT, lp.LoRACallback(r=2, verbose=False))
    assert not {id(p) for p in module.teacher.parameters()} & held(run)
    assert {id(p) for p in module.student.classifier.parameters()} <= held(run)
    assert not any("received no gradient" in str(w.message) for w in seen)


class Pupil(L.LightningModule):
    """A network of the user's own beside a pretrained model that he froze."""

    def __init__(self, depth):
        super().__init__()
        self.bert, self.table = bert().requires_grad_(False), nn.Embedding(17, 8)
        self.own = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)], nn.Linear(8, 3))
        if depth == 1:
            del self.table
            self.norm = nn.LayerNorm(8)

    def training_step(self, batch, batch_idx):
        read = self.bert.bert(batch[0]).last_hidden_state
        read = read + self.table(batch[0]) if hasattr(self, "table") else read
        return F.cross_entropy(self.own(read.mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.parametrize(("depth", "module", "said"), [(6, None, True), (6, "bert", False), (1, None, False)])
def test_a_frozen_model_beside_a_network_is_named_as_what_is_adapted(depth, module, said):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(Pupil(depth), TEXT, lp.LoRACallback(r=2, module=module, verbose=False))
    found = [str(w.message) for w in seen if "which you froze, is what is adapted" in str(w.message)]
    assert bool(found) == said
    assert all("module='own'" in text and "table" in text for text in found)


# --- copies that refer to what they were copied from ------------------------------------------------------


class Averaged(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.fast = bert()
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.slow(batch[0]).logits
        return F.mse_loss(self.fast(batch[0]).logits, 1 + wanted)

    def on_train_batch_end(self, *_):
        for p, q in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
            p.data.lerp_(q.data, 0.3)

    def configure_optimizers(self):
        return torch.optim.Adam(self.fast.parameters(), 1e-2)


def test_a_prompt_in_a_copy_is_that_of_the_copy(tmp_path):
    def prompt():
        return lp.PromptTuningCallback(length=2, verbose=False)

    whole = Averaged()
    fit(whole, TEXT, prompt(), every_step(tmp_path))
    own = [n for n, _ in whole.slow.named_parameters() if CHILD in n.split(".")]
    assert own == [n for n, _ in whole.fast.named_parameters() if CHILD in n.split(".")]
    resumed = Averaged()
    fit(resumed, TEXT, prompt(), ckpt_path=ckpt(tmp_path, 1))
    assert digest(resumed) == digest(whole)
    loaded = Averaged()
    lp.load_delta(loaded, ckpt(tmp_path, 2))
    whole.eval(), loaded.eval()
    assert torch.equal(loaded.slow(IDS).logits, whole.slow(IDS).logits)
    assert not torch.equal(whole.slow(IDS).logits, whole.fast(IDS).logits)


# --- what is no model, and what is named at the start ------------------------------------------------------


class Tagger(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(17, 4), nn.LSTM(4, 4, batch_first=True)
        self.project, self.tags, self.temperature = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        hidden = self.project(self.lstm(self.words(batch[0]))[0].mean(1))
        return F.cross_entropy(self.tags(hidden) / self.temperature, batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_table_of_words_is_no_pretrained_model():
    assert bases_of(Tagger()) == ("",)
    adapted = lp.apply(Tagger(), [lp.IntrinsicDimensionCallback(d=20)])
    assert adapted.record.scopes == ("",)
    assert not any("lstm" in name for name in adapted.record.trained_names)


def test_parts_behind_the_targets_and_single_parameters_are_named():
    adapted = lp.apply(Tagger(), [lp.LoRACallback(r=2, target_modules=["lstm"])])
    assert set(adapted.plan().frozen_heads) == {"project", "temperature"}
    text = str(adapted.plan())
    assert "modules_to_save=['temperature']" in text
    saved = lp.LoRACallback(r=2, target_modules=["lstm"], modules_to_save=["project", "temperature", "tags"])
    assert not lp.apply(Tagger(), [saved]).plan().frozen_heads


def test_what_the_user_froze_does_not_look_new():
    module = Averaged()
    adapted = lp.apply(module, [lp.BitFitCallback()])
    assert not adapted.plan().frozen_heads


# --- in the middle of a run --------------------------------------------------------------------------------


def test_a_base_that_is_unfrozen_in_vain_is_named():
    class Later(Tagger):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.words.requires_grad_(True)

    module = Later()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(module, TEXT, lp.LoRACallback(r=2, target_modules=["lstm"], verbose=False), max_epochs=3)
    said = [str(w.message) for w in seen if "were set to require a gradient" in str(w.message)]
    assert len(said) == 1
    assert "words.weight" in said[0]
    assert "LayerFreezingCallback" in said[0]


def test_an_optimizer_with_one_state_for_all_goes_on_after_a_cut():
    class Joint(Judged):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.net.parameters(), lr=0.1, max_iter=2)

    module = Joint()
    method = lp.DiffPruningCallback(density=0.2, structured=False, module="net", verbose=False)
    run = fit(module, VECTORS, method, max_epochs=4)
    trained = [p for p in module.net.parameters() if id(p) in held(run)]
    assert trained
    assert all(torch.isfinite(p).all() for p in trained)
