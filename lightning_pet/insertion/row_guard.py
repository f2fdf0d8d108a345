"""Whether rows of a batch can use different deltas in a model: looked at when the first are asked for, and kept.

The batch-major rule cannot be read off a tensor: a sequence-first model whose length happens to be a multiple of the
number of rows would mix them without a sound. So the base is run on random batches of 3 rows of 7 tokens, and on the
same rows in another order: of every module that is to take rows apart, the first dimension of input and output must be
a multiple of 3, or 1, and follow the order. Where no batch can be made up, the user's first one is looked at. What
else a module gets and gives is noted, too: whether it belongs to rows, or all of them share it.
"""

import inspect
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, TargetError
from lightning_pet.insertion.prompt_rows import learn_padding
from lightning_pet.model.adaptation import Adaptation
from lightning_pet.model.call import HERE, Selection
from lightning_pet.model.naming import check_known, named_modules
from lightning_pet.probe.row_leaves import ROWS, Leaves, Sides, close, ordered, tensors_in
from lightning_pet.probe.trace import candidate_inputs, random_batch

_LONGER = ("prompt_tuning", "auto_prompt")
_ROWS, _TOKENS, _BATCHES = 3, 7, 3

Seen = dict[str, list[Leaves]]
"""Of every module the tensors of each call: their places begin with "gets" or "gives"."""


class Manners:
    """How modules treat the rows of a batch.

    Attributes:
        looked_at: paths of the modules.
        refused: those that do not keep rows apart, and why.
        shared: those that compute once what all rows get.
        sides: which tensors belong to rows.
        told: paths of modules that take hidden columns in front of a row, and whether they are told positions.
    """

    def __init__(self, looked_at: set[str]) -> None:
        self.looked_at = looked_at
        self.refused: dict[str, str] = {}
        self.alone: dict[str, bool] = {}
        self.sides = Sides()
        self.told: dict[str, bool] = {}

    @property
    def shared(self) -> frozenset[str]:
        """Paths of modules that are always called with one row, whatever the batch."""
        return frozenset(path for path, alone in self.alone.items() if alone)

    def note(self, batch: int, order: list[int], first: Seen, second: Seen, *, made_up: bool) -> None:
        """Compare two runs, the second of which had the rows in another order."""
        for path in self.looked_at & (first.keys() | second.keys()):
            calls, others = first.get(path, []), second.get(path, [])
            if len(calls) != len(others):
                self.refused.setdefault(path, "is called more or less often when the rows come in another order")
                continue
            for one, other in zip(calls, others, strict=True):
                for what in ("gets", "gives"):
                    if (why := _differs(batch, order, _first(one, what), _first(other, what))) is not None:
                        self.refused.setdefault(path, f"{what} {why}")
                gets = _first(one, "gets")
                shared = gets is not None and gets.shape[:1] == (1,)
                self.alone[path] = self.alone.get(path, True) and shared
        self.note_order(batch, order, first, second, made_up=made_up)

    def note_order(self, batch: int, order: list[int], first: Seen, second: Seen, *, made_up: bool) -> None:
        """Note only which tensors follow the rows."""
        for path in first.keys() & second.keys():
            for one, other in zip(first[path], second[path], strict=False):
                self.sides.reordered(path, batch, order, one, other, made_up)

    def note_more(self, batch: int, first: Seen, second: Seen) -> None:
        """Compare with a run with one row more."""
        for path in first.keys() & second.keys():
            for one, other in zip(first[path], second[path], strict=False):
                self.sides.grown(path, batch, batch + 1, one, other)

    def take(self, other: "Manners") -> None:
        """Know what others do."""
        self.__dict__.update(other.__dict__)


def check_rows(names: Any, record: Adaptation) -> None:
    """Refuse what is no list of deltas, one per row.

    Raises:
        ArgumentError: naming what was found.
        TargetError: if a delta has a method that cannot be used for single rows.
    """
    if not isinstance(names, list | tuple) or not names:
        raise ArgumentError(f"rows({names!r}): expected a list with the name of a delta, or None, for each row.")
    wanted = [name for name in dict.fromkeys(names) if name is not None]
    check_known(wanted, record.names)
    longer = [applied for applied in record.applied if applied.method in _LONGER]
    several = [name for name in wanted if sum(applied.delta == name for applied in longer) > 1]
    if several:
        raise TargetError(
            f"{several[0]!r} has several prompts, or triggers, one behind the other, which rows of one batch cannot "
            "have. Use it alone: `adapted.using(name)`."
        )


@contextmanager
def guarded(root: nn.Module, record: Adaptation, names: Any) -> Iterator[Manners]:
    """Within the block nothing mixes rows; gives what is known of modules, which may be nothing until the root runs.

    Raises:
        TargetError: naming the modules that do not keep rows apart.
    """
    paths = _taking_apart(record, record.names)
    manners: Manners | None = record.switch.manners
    if manners is None or not paths <= manners.looked_at:
        manners = _made_up(root, record, paths)
        record.switch.manners = manners
    with ExitStack() as stack:
        made_up = manners is not None
        manners = manners or Manners(paths)
        if not made_up:
            look = partial(_look_at_call, root, record, manners, names, threading.get_ident())
            stack.callback(root.register_forward_pre_hook(look, with_kwargs=True).remove)
        else:
            _refuse(manners, record, names)
        if any(applied.method in _LONGER and applied.delta in names for applied in record.applied):
            with _undisturbed(root):
                learn_padding(root, record, names, manners.told)
        check = partial(_check_size, manners, len(names), threading.get_ident())
        stack.callback(root.register_forward_pre_hook(check, with_kwargs=True).remove)
        yield manners


def _check_size(
    manners: Manners,
    batch: int,
    thread: int,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> None:
    """Refuse another number of rows than names, unless somebody makes more of the rows: a beam search, a wrapper."""
    # Torch registers a hook first, and then that it wants keywords: a thread that calls in between gives none.
    if torch.compiler.is_compiling() or threading.get_ident() != thread or HERE.call.part is not None:
        return
    leaves = {key: x for key, x in tensors_in({"gets": (args, kwargs)}).items() if x.dim()}
    known = [x.shape[0] for key, x in leaves.items() if x.shape[0] != 1 and manners.sides.of("", key) == ROWS]
    sizes = known or [x.shape[0] for x in leaves.values()][:1] or [batch]
    if batch not in sizes and not _is_run_by_others():
        size = sizes[0]
        raise TargetError(
            f"rows: {batch} name{'s' * (batch > 1)} for {size} row{'s' * (size > 1)} that {type(root).__name__} was "
            "called with. Give one name per row of the batch."
        )


def _is_run_by_others() -> bool:
    """Whether the present call comes from within a ``generate`` or a ``forward``, which may repeat and divide rows."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_name
        if name == "generate" or (name == "forward" and isinstance(frame.f_locals.get("self"), nn.Module)):
            return True
        frame = frame.f_back
    return False


def _taking_apart(record: Adaptation, deltas: Any) -> set[str]:
    """Paths of modules that take rows apart for these deltas."""
    found = {name.rpartition(".")[0] for name in record.held_by(deltas)}
    for applied in record.applied:
        if applied.delta in deltas:
            own = zip(applied.hosts, applied.targets, applied.readers, strict=False)
            found |= {path for (host, _), target, reader in own for path in (host, target.reads, reader) if path}
    return found


def _refuse(manners: Manners, record: Adaptation, names: Any) -> None:
    wanted = [name for name in dict.fromkeys(names) if name is not None]
    if len(set(names)) == 1:
        return
    wrong = {path: manners.refused[path] for path in sorted(_taking_apart(record, wanted) & manners.refused.keys())}
    if wrong:
        shown = "; ".join(f"{path} {why}" for path, why in list(wrong.items())[:3])
        raise TargetError(
            f"{len(wrong)} module{'s' * (len(wrong) > 1)} of {', '.join(map(repr, wanted))} would mix the rows of a "
            f"batch: {shown}{' …' if len(wrong) > 3 else ''}. Rows need modules whose first dimension is the batch; "
            "use one delta after the other (`adapted.using(name)`), or leave these modules out (exclude_modules)."
        )


def _made_up(root: nn.Module, record: Adaptation, paths: set[str]) -> Manners | None:
    """What random batches show; ``None`` if none can be made up."""
    for arguments in candidate_inputs(root):
        manners = Manners(paths)
        order = [1, 2, 0]
        try:
            for seed in range(_BATCHES):
                batch = random_batch(arguments, _ROWS, _TOKENS, seed)
                runs = [_seen(root, record, paths, (), inputs) for inputs in (batch, _ordered(batch, _ROWS, order))]
                manners.note(_ROWS, order, *runs, made_up=True)
        except Exception:  # these are no inputs of this model
            continue
        with suppress(Exception):  # a model of one batch size
            manners.note_more(
                _ROWS, runs[0], _seen(root, record, paths, (), _ordered(batch, _ROWS, [*range(_ROWS), 0]))
            )
        with suppress(Exception):
            _note_masked(root, record, manners, batch, order)
        return manners
    return None


def _note_masked(
    root: nn.Module, record: Adaptation, manners: Manners, batch: dict[str, Any], order: list[int]
) -> None:
    """With padding there are masks that there are not without."""
    name = "attention_mask"
    if name in batch or name not in inspect.signature(root.forward).parameters or "input_ids" not in batch:
        return
    ids = batch["input_ids"]
    starts = torch.arange(_ROWS, device=ids.device)[:, None]
    padded = {**batch, name: (torch.arange(_TOKENS, device=ids.device)[None] >= starts).long()}
    choices = (padded, _ordered(padded, _ROWS, order), _ordered(padded, _ROWS, [*range(_ROWS), 0]))
    one, other, more = (_seen(root, record, manners.looked_at, (), inputs) for inputs in choices)
    manners.note_order(_ROWS, order, one, other, made_up=True)
    manners.note_more(_ROWS, one, more)


def _look_at_call(
    root: nn.Module,
    record: Adaptation,
    manners: Manners,
    names: Any,
    thread: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> None:
    """The same on the user's own batch, before the root runs on it."""
    if threading.get_ident() != thread or HERE.call.part is not None or len(set(names)) == 1:
        return
    kwargs = kwargs or {}
    if record.switch.manners is not None:
        manners.take(record.switch.manners)
        return
    batch, paths = len(names), manners.looked_at
    size = next((x.shape[0] for x in tensors_in((args, kwargs)).values() if x.dim()), 0)
    if size < batch or size % batch:
        raise TargetError(
            f"{type(root).__name__} was called with {size} rows, but rows were chosen for a batch of {batch}. Give one "
            "name per row of the batch."
        )
    turned = [p for p, m in named_modules(root).items() if m.__dict__.get("batch_first") is False]
    manners.refused |= dict.fromkeys(
        paths if turned else (), f"belongs to a model with batch_first=False ({turned[:1]})"
    )
    if not turned:
        first = _seen(root, record, paths, args, kwargs)
        for turn in range(1, min(batch, _BATCHES + 1)):
            order = [(row + turn) % batch for row in range(batch)]
            found = _seen(root, record, paths, _ordered(args, batch, order, size), _ordered(kwargs, batch, order, size))
            manners.note(batch, order, first, found, made_up=False)
        with suppress(Exception):  # a model of one batch size
            order = [*range(batch), 0]
            more = _seen(root, record, paths, _ordered(args, batch, order, size), _ordered(kwargs, batch, order, size))
            manners.note_more(batch, first, more)
    manners.alone.clear()  # one batch does not show what all batches share
    _refuse(manners, record, names)
    record.switch.manners = manners


def _ordered(value: Any, batch: int, order: list[int], size: int | None = None) -> Any:
    """Arguments with the rows in another order."""
    if isinstance(value, MutableMapping):
        turned = copy(value)  # of its own kind: a tokenizer's batch has attributes
        for key, item in value.items():
            turned[key] = _ordered(item, batch, order, size)
        return turned
    if type(value) in (tuple, list):
        return type(value)(_ordered(item, batch, order, size) for item in value)
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != (size or batch):
        return value
    return ordered(value, batch, order)


def _differs(batch: int, order: list[int], x: Tensor | None, y: Tensor | None) -> str | None:
    """Why a tensor does not follow the rows; ``None`` if it does."""
    if x is None or y is None:
        return None
    if x.shape != y.shape:
        return "tensors whose shape depends on the order of the rows"
    if not x.dim() or (x.shape[0] != 1 and x.shape[0] % batch):
        return f"a tensor of shape {tuple(x.shape)} for a batch of {batch}"
    same = close(x if x.shape[0] == 1 else ordered(x, batch, order), y)
    return None if same else "other numbers for a row when the rows come in another order"


def _seen(root: nn.Module, record: Adaptation, paths: set[str], args: Any, kwargs: Any) -> Seen:
    """What the modules get and give in a forward of the base, in the order of their calls."""
    thread, seen = threading.get_ident(), Seen()

    def note(path: str, module: nn.Module, args: Any, *rest: Any) -> None:
        if threading.get_ident() == thread:
            kwargs, output = rest  # other threads may come before torch knows that the hook takes both
            found = tensors_in({"gets": (args, kwargs), **({"gives": output} if path in paths else {})})
            seen.setdefault(path, []).append({key: tensor.detach().clone() for key, tensor in found.items()})

    modules = named_modules(root)
    with ExitStack() as stack:
        for path in {"", *paths} & modules.keys():
            handle = modules[path].register_forward_hook(partial(note, path), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_undisturbed(root))
        stack.enter_context(HERE.call.only(record.switch.number, Selection()))
        root(*args, **kwargs)
    return seen


@contextmanager
def _undisturbed(root: nn.Module) -> Iterator[None]:
    """Without dropout, gradients, and a trace in the states of random numbers."""
    training = [module for module in root.modules() if module.training]
    devices = {p.device for p in root.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng([device.index or 0 for device in devices]):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _first(leaves: Leaves, what: str) -> Tensor | None:
    return next((tensor for key, tensor in leaves.items() if key[0] == what), None)
