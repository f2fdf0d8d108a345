"""Deltas outside of a run: save, load, inspect, merge into a folder. A file is checked before the model changes."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.errors import ArgumentError, DeltaFileError, PETError
from lightning_pet.exchange.hub import card, is_hub_id
from lightning_pet.exchange.peft import settled
from lightning_pet.insertion.commit import copy_in, renew
from lightning_pet.insertion.method import METHODS, Method, delta_name, key_of
from lightning_pet.insertion.tasks.own_values import is_own, own_places
from lightning_pet.layers.sharding import whole_shape
from lightning_pet.layers.value import Value
from lightning_pet.model.adaptation import Adaptation, Applied, adapted_root
from lightning_pet.model.naming import CHILD, VALUE, by_delta, join, named_modules, named_tensors
from lightning_pet.operations.adapted import Adapted
from lightning_pet.operations.file_terms import for_model
from lightning_pet.operations.loading import deltas_of, insert, load
from lightning_pet.operations.module_from_file import beside, build
from lightning_pet.operations.saved import Named, Whole, check_base, save
from lightning_pet.store.entry import load_checkpoint
from lightning_pet.store.files import atomic_folder, is_delta_file, reap_once
from lightning_pet.store.manifest import Manifest
from lightning_pet.store.reader import PathLike, Stored, delta_of, deltas_of_checkpoint, manifest_of, read
from lightning_pet.version import VERSION

Module = TypeVar("Module", bound=nn.Module)
Fill = Callable[[Named, Mapping[str, Tensor]], None]


def save_delta(
    model: nn.Module,
    path: PathLike,
    *,
    name: str | None = None,
    notes: Mapping[str, str] | None = None,
    exact: bool = False,
) -> int:
    """Write one delta of a model into one safetensors file, durably.

    The file is the same whatever the delta is called in the model, and whatever other deltas are there.

    Under an engine that shards, every process has to call this with the LightningModule, during ``fit`` (in a hook
    between two steps) or after it. Tensors are gathered one after the other, one process writes, and a failure in
    one process is raised in all of them.

    Args:
        model: the adapted model, or anything that contains it.
        path: usually ends in ``.pet.safetensors``.
        name: which delta; needed where there are several, and not one of them alone trains.
        notes: free text for people, at most 4 KB; never interpreted, but that ``load_delta`` calls the delta by the
            note ``"name"`` where it is given no other.
        exact: store a digest of every byte of the base (about a second per gigabyte), for
            ``load_delta(base_check="exact")``.

    Returns:
        Bytes written.

    Raises:
        ArgumentError: if there is no delta of this name, or several may be meant.
        PETError: if nothing was applied to the model; if an engine shards it, and the Trainer cannot be told from
            ``model``, or other processes do not call this.
        DeltaFileError: ``nonfinite`` if a tensor holds NaN or infinity; ``io`` if the disk refuses. A
            file that was there before is untouched then.
    """
    found = adapted_root(model)
    if found is None:
        raise PETError(
            f"nothing was applied to this {type(model).__name__}: there is no delta to save. If it was trained by "
            "ddp_spawn, ddp_fork or in a notebook, load_delta(model, checkpoint) first."
        )
    return save(model, *found, path, name=name, notes=notes, exact=exact)


def load_delta(
    model: nn.Module,
    path: PathLike,
    *,
    name: str | None = None,
    heads: bool = True,
    rename: Mapping[str, str] | None = None,
    base_check: str = "error",
    revision: str | None = None,
) -> Adapted:
    """Insert a delta from a file into a model and load its values; any number of times, each under its own name.

    The first delta of a model acts at once. One that comes beside others changes nothing until it is chosen:
    ``adapted.activate(name)`` for everybody, ``with adapted.using(name):`` for the calling thread.

    Args:
        model: the base that the delta was trained on: the bare model or a LightningModule around it.
        path: a file of :func:`save_delta`, a training checkpoint, or a folder that HF PEFT or the adapters
            library wrote; or ``owner/name`` of a repository of the hub, which is downloaded.
        name: what the delta is called in this model. Default: the note ``"name"`` of the file, or ``"default"``;
            without a name, methods join the delta that is called so already. With a name its heads may have another
            number of outputs than the model's.
        heads: ``False`` leaves out the output layers that it has trained, and keeps those of the model.
        rename: prefixes of paths in the file, and what they are in this model: ``{"model.": "net.model."}``.
        base_check: what to do if the base is another one: ``"error"``, ``"exact"`` (compare every
            byte), ``"warn"`` or ``"off"``. A folder of HF PEFT knows no more of it than its name: it is compared,
            and the shapes, which a warning says.
        revision: branch, tag or commit of a repository of the hub.

    Returns:
        The handle on the adapted model.

    Raises:
        ArgumentError: if a delta of this name is in the model already, or a prefix is in no path of the file.
        DeltaFileError: if the file is damaged or does not fit the model.
        BaseMismatchError: if the base is another one. In all cases the model is untouched.
    """
    return Adapted(load(model, path, base_check, name=name, heads=heads, rename=rename, revision=revision))


def load_from_checkpoint(
    module: Module | type[Module],
    path: PathLike,
    *,
    map_location: torch.device | str | int | None = None,
    hparams_file: PathLike | None = None,
    strict: bool | None = None,
    base_check: str = "error",
    **kwargs: Any,
) -> Module:
    """Build a LightningModule, insert the delta of a checkpoint and load it.

    As ``LightningModule.load_from_checkpoint``, for checkpoints that hold a delta. A class is built from the
    hyper-parameters in the checkpoint: arguments, one dictionary, or what LightningCLI noted. Classes in the latter
    must have been imported before, as no name in a file is; with ``_class_path`` a subclass of ``module`` is built.

    Args:
        module: an instance with its base weights, or a class.
        path: a training checkpoint or delta file.
        map_location: the device to put a module on that was built from a class (default: where its constructor
            puts it). An instance stays where it is.
        hparams_file: a ``.yaml`` or ``.csv`` file of hyper-parameters to use instead of those in the checkpoint.
        strict: ``False``: what the checkpoint holds beside the delta need not fit the module (metrics that came or
            went). The delta itself always has to. Default: as the module's ``strict_loading``.
        base_check: what to do if the base is another one: ``"error"``, ``"exact"`` (compare every
            byte), ``"warn"`` or ``"off"``.
        **kwargs: constructor arguments that override the stored hyper-parameters.

    Returns:
        The module, adapted and loaded. Of a checkpoint of several tasks, all their deltas are in it, under the names of
        the tasks; the first one acts.

    Raises:
        ArgumentError: if a hyper-parameter that the checkpoint could not hold is not given.
        DeltaFileError: if the file is damaged or does not fit; ``unsafe`` if its hyper-parameters name a class that
            was not imported.
    """
    content = None if is_delta_file(path) else load_checkpoint(path)
    several = () if content is None else deltas_of_checkpoint(content, path)
    names = several or (None,)
    stored = {name: read(path, name) if content is None else delta_of(content, path, name) for name in names}
    built = isinstance(module, type)
    if isinstance(module, type):
        module = build(module, content or {}, path, kwargs, hparams_file)
    elif kwargs or hparams_file is not None:
        given = ", ".join([*kwargs, *(["hparams_file"] if hparams_file is not None else [])])
        raise ArgumentError(f"{given}: this {type(module).__name__} is built already. Pass its class to build another.")
    if isinstance(module, pl.LightningModule):
        if not any(True for _ in module.parameters()):
            module.setup("predict")
        module.configure_model()
    others = beside(module, content, strict, path) if content is not None else {}
    for name, one in stored.items():
        insert(module, one, base_check, name=name)
    copy_in(module, others)
    if content is not None and isinstance(module, pl.LightningModule):
        module.on_load_checkpoint(content)
    return module.to(map_location) if built and map_location is not None else module


def inspect_delta(path: PathLike, *, delta: str | None = None) -> Manifest:
    """Read what a delta file or a training checkpoint says of its delta, without a model.

    Of a delta file no values are read; a checkpoint is verified as for a load.

    Args:
        path: of the file.
        delta: which, of a checkpoint in which the deltas of several tasks have trained together.

    Raises:
        DeltaFileError: if it is not a sound delta file or checkpoint of this library.
    """
    return manifest_of(path, delta)


def start_from(
    adapted: Adapted, method: Method, stored: Stored, base_check: str, whole: Whole = iter, fill: Fill | None = None
) -> None:
    """Copy the values of one method from a file into the same method of an adapted model.

    Args:
        adapted: the model.
        method: one that was just inserted.
        stored: what the file holds.
        base_check: what to do about another base model.
        whole: gathers base tensors of which an engine left this process parts only.
        fill: writes whole values into such tensors.

    Raises:
        DeltaFileError: if the file has no such method, or its tensors do not fit.
    """
    path, name = stored.path, delta_name(method)
    stored, record = settled(for_model(stored, name), adapted.root), adapted.record
    view = record.of(name)
    holds = ", ".join(f"{m.method}:{m.name}" for m in stored.methods)
    if not any((m.method, m.name) == (method.method, method.name) for m in stored.methods):
        raise DeltaFileError(
            f"start_from={str(path)!r}: there is no {method.method}:{method.name} in it, it holds {holds}. "
            "Give the file, the method and the name that go together.",
            "mismatch",
        )
    if stored.base is not None:
        trained_then = [name for name in stored.tensors if name not in record.delta_names]
        check_base(stored.base, adapted.root, record, path, base_check, trained_then, whole)
    deltas = deltas_of(adapted.root, record, method)
    found = by_delta(stored.tensors)
    problems = [join(prefix, text) for prefix, d in deltas.items() for text in d.misfits(found.get(prefix, {}))]
    if problems:
        raise DeltaFileError(
            f"start_from={str(path)!r}: {problems[0]}. It holds {holds}; give the options it was trained with"
            f"{_other_options(stored, method, adapted.root)}.",
            "mismatch",
        )
    mine = next(applied for applied in record.applied if applied.key == key_of(method))
    _say_meaning(stored, method, mine.config)
    _say_left(stored, method, found.keys() - deltas.keys())
    for prefix, delta in deltas.items():
        delta.unpack(found.get(prefix, {}))
    renew(adapted.root)
    if absent := [name for name in mine.trained if name not in stored.tensors]:
        rank_zero_warn(f"{path} does not hold {', '.join(absent[:4])}; they start with the values of the model.")
    _start_own_values(adapted.root, view, stored)
    values = {name: stored.tensors[name] for name in _same_heads(adapted.root, view, stored)}
    if fill is None:
        copy_in(adapted.root, values)
    else:
        fill(named_tensors(adapted.root), values)


def _other_options(stored: Stored, method: Method, root: nn.Module) -> str:
    """The options of a method in a file that are others here, as a user writes them."""
    record = next(m for m in stored.methods if (m.method, m.name) == (method.method, method.name))
    now, left = method.config(), {*METHODS[method.method].of_the_run, "modules_to_save", "name"}
    then = {option: value for option, value in record.config.items() if option not in left and value != now.get(option)}
    places = {target.module for target in record.targets if target.parameter}
    if "target_modules" in then:
        ends = {path.rpartition(".")[2] for path in places}
        hit = {path for path in named_modules(root) if path.rpartition(".")[2] in ends and CHILD not in path.split(".")}
        then["target_modules"] = sorted(ends if hit == places else places)
    said = ", ".join(f"{option}={_short(value)}" for option, value in then.items())
    return f": {said}" if said else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _say_meaning(stored: Stored, method: Method, now: Mapping[str, Any]) -> None:
    """A scale, for one, is in no tensor: with another the run starts from another function than the file has."""
    then = next(m.config for m in stored.methods if (m.method, m.name) == (method.method, method.name))
    differing = [o for o in sorted(METHODS[method.method].gives_meaning & then.keys()) if then[o] != now.get(o)]
    if differing:
        shown = ", ".join(f"{option}={then[option]!r} there and {now.get(option)!r} here" for option in differing)
        rank_zero_warn(
            f"start_from={str(stored.path)!r}: {method.method}:{method.name} was trained with {shown}. Its tensors are "
            "taken over, but the run starts from other outputs than the file has; give its options to start from those."
        )


def _say_left(stored: Stored, method: Method, left: Set[str]) -> None:
    """Places that the file has and this run has not: what was trained there is no part of where it starts."""
    keys = sorted((f"{m.method}_{m.name}" for m in stored.methods), key=len, reverse=True)
    own = f"{method.method}_{method.name}"
    ends = {path: path.rpartition(".")[2] for path in left}
    mine = sorted(path for path, end in ends.items() if next((k for k in keys if end.startswith(k)), "") == own)
    if mine:
        rank_zero_warn(
            f"start_from={str(stored.path)!r}: {', '.join(mine[:4])}{' and more' * (len(mine) > 4)} are not taken "
            "over, because this run has no delta there; it starts from other outputs than the file has."
        )


def _start_own_values(root: nn.Module, record: Adaptation, stored: Stored) -> None:
    """Let what a delta has in place of tensors of the base, as one of several, start from those of the file."""
    for applied, target, _, delta, _ in record.deltas(root):
        if not is_own(applied) or not isinstance(delta, Value):
            continue
        value = stored.tensors.get(target.path)
        if value is not None and whole_shape(delta.value) == value.shape:
            delta.unpack({VALUE: value})
        else:
            why = "is not there" if value is None else f"has the shape {tuple(value.shape)} there"
            rank_zero_warn(f"{stored.path}: {target.path} {why}; it starts with the value of the model.")


def _same_heads(root: nn.Module, record: Adaptation, stored: Stored) -> set[str]:
    """Trained base parameters that are in the file in the same shape; the others start as they are, with a warning."""
    own = dict(named_tensors(root))
    trained = set(record.trained_names)
    base = {name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)} - set(record.delta_names)
    there = (base & stored.tensors.keys()) - own_places(record)
    same = {name for name in there & trained if whole_shape(own[name]) == stored.tensors[name].shape}
    if there - same:
        rank_zero_warn(
            f"{stored.path}: {', '.join(sorted(there - same)[:4])} are not taken over, because they do not train here "
            "or have another shape; they keep the values of the model."
        )
    return same


# --- merging into a transformers folder -----------------------------------------------------------


_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "*.tiktoken",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "added_tokens.json",
    "sentencepiece*",
    "*.spm",
    "chat_template*",
)


def merge_into_folder(
    path: Path, base: Path, output: Path, model_class: str = "auto", base_check: str = "error"
) -> Path:
    """Load a base model, add a delta into it, and save the result with the base's tokenizer and a card.

    The folder is complete or absent, also after a kill or a power loss: it is built beside its place and renamed at
    the end.

    Args:
        path: delta file or training checkpoint.
        base: local folder of the base model.
        output: folder to make.
        model_class: class of transformers; ``"auto"``: the first architecture in the base's ``config.json``.
        base_check: what to do about another base model.

    Returns:
        The folder.

    Raises:
        ArgumentError: if the output exists, or the class is unknown.
        DeltaFileError: if the delta does not fit the base; code ``io`` if the operating system refuses.
        NotMergeableError: if it cannot be merged exactly.
    """
    if output.exists():
        raise ArgumentError(f"{output} exists already; give a new folder.")
    model = load_model(base, model_class)
    adapted = load_delta(model, path, base_check=base_check)
    text = _card(adapted.record.applied, output.name, model, base)
    adapted.merge_()
    reap_once(output.parent)
    atomic_folder(output, lambda folder: _fill(Path(folder), model, base, text))
    return output


def _card(methods: Sequence[Applied], name: str, model: nn.Module, base: Path) -> str:
    """The README of a merged model; a path of somebody's disk is no name of its base."""
    told = json.loads((base / "config.json").read_text(encoding="utf-8")).get("_name_or_path") or ""
    kind = type(model).__name__
    return card(
        methods,
        name,
        library="transformers",
        base_model=told if is_hub_id(told) else "",
        versions={"lightning_pet": VERSION, "transformers": version("transformers")},
        code=f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}")',
        merged=True,
    )


def load_model(folder: Path, model_class: str = "auto") -> Any:
    """The transformers model of a local folder.

    Raises:
        ArgumentError: if it is no such folder, or the class is unknown.
    """
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"{folder} is not a folder of a transformers model: it has no config.json.")
    return _model_class(folder, model_class).from_pretrained(folder, local_files_only=True)


def _fill(folder: Path, model: Any, base: Path, text: str) -> None:
    with _system_errors():
        model.save_pretrained(folder)
    for pattern in _TOKENIZER_FILES:
        for file in base.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copy2(file, folder / file.name)
    (folder / "README.md").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """What safetensors raises when the operating system refuses is no OSError, and has its number in the text only."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _model_class(base: Path, name: str) -> Any:
    import transformers

    if name == "auto":
        architectures = transformers.AutoConfig.from_pretrained(base, local_files_only=True).architectures
        if not architectures:
            raise ArgumentError(
                f"{base}/config.json names no architecture; pass the class, e.g. --model_class BertModel."
            )
        name = architectures[0]
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ArgumentError(
            f"model_class={name!r} is not a model class of transformers, e.g. BertForSequenceClassification."
        )
    return cls
