"""What each method permits where deltas are combined by what they hold.

See :mod:`lightning_pet.operations.combining.files`.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from lightning_pet.errors import ArgumentError, DeltaFileError
from lightning_pet.insertion.low_rank_places import scale_of
from lightning_pet.insertion.method import suffix_of
from lightning_pet.layers import combining as arithmetic
from lightning_pet.layers.combining import Factors
from lightning_pet.model.naming import by_delta, delta_path, join
from lightning_pet.model.structure import Target
from lightning_pet.store.manifest import MethodRecord
from lightning_pet.store.reader import Stored
from lightning_pet.targets.patterns import exactly

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "peft_linear", "peft_ties"]
HOWS: Final = get_args(How)
OF_A_RANK: Final = ("svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
WITH_BASE: Final = (
    "What the base decides is combined in a model (adapted.combine), or with --base=FOLDER of lightning-pet combine."
)
ENTRYWISE: Final = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
ELECTING: Final = ("ties", "dare_ties", "peft_ties")
DENSITIES: Final = {
    "ties": 0.2,
    "peft_ties": 0.2,
    "dare_linear": 0.5,
    "dare_ties": 0.5,
    "magnitude_prune": 0.5,
}


@dataclass
class Combination:
    """What was made.

    Attributes:
        path: the file.
        size: its bytes.
        error: ‖result − what was asked for‖ / ‖what was asked for‖ over all places (Frobenius): what the rank left out.
        ranks: rank of each low-rank delta in it, by path.
    """

    path: str = ""
    size: int = 0
    error: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What was asked for, checked; see :func:`~lightning_pet.operations.combining.files.combine_deltas`."""

    how: How
    weights: tuple[float, ...]
    given: bool  # the user gave the weights
    rank: int | None
    density: float
    seed: int
    word: str = "how"
    """What the caller calls the argument ``how``."""

    @property
    def asked(self) -> str:
        """As the caller wrote it."""
        return f"{self.word}={self.how!r}"


@dataclass(frozen=True)
class Originals:
    """The base's own values of what trains in place, where the base is at hand.

    Attributes:
        values: by name from the root.
        buffers: those of them that no optimizer trains.
    """

    values: Mapping[str, Tensor]
    buffers: frozenset[str] = frozenset()


class Result:
    """Combines the methods of several files one after the other.

    Attributes:
        tensors: of the result.
        values: names of the tensors that no method has taken: parts of the base that train as they are.
        whole: ‖what was asked for‖², where it is approximated.
        lost: ‖its error‖².
    """

    def __init__(self, files: Sequence[Stored], options: Options, made: Combination) -> None:
        self.files = files
        self.options = options
        self.made = made
        self.tensors: dict[str, Tensor] = {}
        self.whole = self.lost = 0.0
        self.found = [by_delta(file.tensors) for file in files]
        self.values = {name for groups in self.found for name in groups.get("", {})}

    def add(self, index: int) -> MethodRecord:
        """Combine one method; returns its record."""
        records = [file.methods[index] for file in self.files]
        return RULES[records[0].method](self, records)

    @property
    def error(self) -> float:
        """Of the approximation, relative."""
        return math.sqrt(self.lost / self.whole) if self.whole > 0 else 0.0

    def refuse_unless(self, record: MethodRecord, *hows: How) -> None:
        """Refuse what means nothing for a method."""
        if self.options.how not in hows:
            raise ArgumentError(
                f"{self.options.asked} means nothing for {record.method}:{record.name}; use {' or '.join(hows)}."
            )

    def groups(self, record: MethodRecord) -> list[dict[str, dict[str, Tensor]]]:
        """The tensors of a method in each file, by path of the delta; the same paths and names in all."""
        own = f".pet.{record.method}_{record.name}"
        found = [
            {path: group for path, group in groups.items() if path and f".{path}".find(own) >= 0}
            for groups in self.found
        ]
        for file, groups in zip(self.files[1:], found[1:], strict=True):
            names = {join(path, name) for path, group in groups.items() for name in group}
            odd = sorted(names ^ {join(path, name) for path, group in found[0].items() for name in group})
            if odd:
                raise DeltaFileError(
                    f"{odd[0]} is in one of {self.files[0].path} and {file.path} only: {record.method} is combined "
                    "place by place. Train both with the same options.",
                    "mismatch",
                )
        return found

    def same_config(self, records: Sequence[MethodRecord], *but: str) -> None:
        """Refuse methods of different options, but for these."""
        for file, record in zip(self.files[1:], records[1:], strict=True):
            options = sorted(records[0].config.keys() | record.config.keys())
            for option in options:
                first, other = records[0].config.get(option), record.config.get(option)
                if option not in but and first != other:
                    raise DeltaFileError(
                        f"{record.method}:{record.name} has {option}={first!r} in {self.files[0].path} and {other!r} "
                        f"in {file.path}: deltas of different options are not combined.",
                        "mismatch",
                    )


_RUN: Final = ("dropout", "lora_plus_ratio", "budget", "target_modules", "exclude_modules", "layers_to_transform")
_PLACES: Final = (*_RUN, "layers_pattern", "r", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init")


def _low_rank(result: Result, records: Sequence[MethodRecord]) -> MethodRecord:
    result.same_config(records, *_PLACES)
    if records[0].config.get("use_dora"):
        raise DeltaFileError(
            f"{result.files[0].path}: a DoRA rescales the whole weight, so that its change depends on the base and is "
            f"no sum of factors. {WITH_BASE}",
            "mismatch",
        )
    # One place has a role in a file and none in another library's folder.
    known = {(t.module, t.parameter, t.rows): t for record in records[::-1] for t in record.targets[::-1]}
    order = dict.fromkeys((t.module, t.parameter, t.rows) for record in records for t in record.targets)
    targets = [known[place] for place in order]
    ranks: dict[str, int] = {}
    for target in targets:
        key = "_".join(part for part in (records[0].method, records[0].name, suffix_of(target)) if part)
        place = delta_path(target.module, key)
        if not any(place in groups for groups in result.found):
            continue  # it repeats the delta of a tied weight
        (a, b), biases = _at_place(result, records, target, place)
        result.tensors |= {join(place, "a"): a, join(place, "b"): b, **biases}
        ranks[exactly(target)] = result.made.ranks[place] = _rank({"a": a, "b": b})
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {place: own for place, own in ranks.items() if own != rank}
    config = {
        **records[0].config,
        "r": rank,
        "alpha": float(rank),  # a scale of one: the files' own are in B
        "rank_pattern": others or None,
        "alpha_pattern": {place: float(own) for place, own in others.items()} or None,
        **{name: value for name, value in (("use_rslora", False), ("init", "kaiming")) if name in records[0].config},
        "budget": None,
    }
    return replace(records[0], config=config, targets=tuple(targets))


def _is_conv(group: Mapping[str, Tensor]) -> bool:
    """A convolution has [r, in, *kernel] and [out, r, 1, ...]; several matrices have [n, r, in] and [n, out, r]."""
    a, b = group["a"], group["b"]
    several = a.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    return a.dim() > 2 and not several


def _rank(group: Mapping[str, Tensor]) -> int:
    return group["b"].shape[1 if _is_conv(group) else -1]


def _at_place(
    result: Result, records: Sequence[MethodRecord], target: Target, place: str
) -> tuple[Factors, dict[str, Tensor]]:
    options, there = result.options, [i for i, groups in enumerate(result.found) if place in groups]  # elsewhere: zero
    found = [result.found[i][place] for i in there]
    weights = [options.weights[i] for i in there]
    scales = [scale_of(records[i].config, target, _rank(group)) for i, group in zip(there, found, strict=True)]
    like = found[0]
    conv = _is_conv(like)
    sizes = {
        (*g["a"].shape[1:], g["b"].shape[0]) if conv else (*g["a"].shape[:-2], g["a"].shape[-1], g["b"].shape[-2])
        for g in found
    }
    if len(sizes) > 1:
        raise DeltaFileError(f"{place} has other sizes in one of the files than in the others.", "mismatch")
    pairs = [_factors(group, scale, conv) for group, scale in zip(found, scales, strict=True)]
    if options.how.startswith("peft"):
        a, b = _as_peft(result, place, found, pairs, scales, weights)
    else:
        a, b = _approximated(result, place, pairs, weights)
    dtype = like["a"].dtype
    a, b = a.to(dtype), b.to(dtype)
    if conv:
        a, b = a.reshape(-1, *like["a"].shape[1:]), b.reshape(b.shape[0], -1, *like["b"].shape[2:])
    own = {}
    if "bias" in like:
        scaled = [group["bias"].double() * scale for group, scale in zip(found, scales, strict=True)]
        own[join(place, "bias")] = arithmetic.weighted_sum(scaled, weights).to(dtype)
    return (a, b), own


def _factors(group: Mapping[str, Tensor], scale: float, conv: bool) -> Factors:
    """In float64, with the scale in B; the start of PiSSA and OLoRA counts with a minus."""

    def flat(name: str) -> Tensor:
        return group[name].double().flatten(1) if conv else group[name].double()

    a, b = flat("a"), flat("b") * scale
    if "a0" in group:
        return torch.cat([a, flat("a0")], dim=-2), torch.cat([b, flat("b0") * -scale], dim=-1)
    return a, b


def _triplets(result: Result, records: Sequence[MethodRecord]) -> MethodRecord:
    """AdaLoRA: the triplets that are left are factors as well, whose number of e can be part of A."""
    result.refuse_unless(records[0], "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
    differing = ("target_r", "init_r", "alpha", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
    result.same_config(records, *_RUN, "layers_pattern", "total_step", *differing)
    made: dict[str, Factors] = {}
    for path, group in result.groups(records[0])[0].items():
        groups = [groups[path] for groups in result.found]
        if any(own["kept"].dim() > 1 for own in groups):
            raise DeltaFileError(f"{path}: triplets of several matrices in one weight are not combined.", "mismatch")
        a, b = _approximated(result, path, [_of_triplets(*pair) for pair in zip(groups, records, strict=True)])
        made[path] = a.to(group["a"].dtype), b.to(group["a"].dtype)
        result.made.ranks[path] = b.shape[-1]
    rank = max(b.shape[-1] for _, b in made.values())
    for path, (a, b) in made.items():
        if rank > min(a.shape[-1], b.shape[0]):
            raise ArgumentError(
                f"the result has a rank of {rank} somewhere, and {path} can have {min(a.shape[-1], b.shape[0])} at "
                f"most, but all places of an AdaLoRA start with one init_r. "
                f"Use {result.options.word}='svd' with a smaller rank."
            )
        kept = (torch.arange(rank) < b.shape[-1]).to(torch.int32)
        whole = b.shape[-1] == rank  # a file holds the triplets that are left, triplets first
        own = {"a": a, "b": b if whole else b.t(), "e": a.new_ones(b.shape[-1]), "kept": kept}
        result.tensors |= {join(path, name): tensor for name, tensor in own.items()}
    config = {**records[0].config, "init_r": rank, "target_r": rank, "alpha": float(rank), "budget": None}
    return replace(records[0], config=config)


def _of_triplets(group: Mapping[str, Tensor], record: MethodRecord) -> Factors:
    a, b, e = (group[name].double() for name in ("a", "b", "e"))
    left = len(a) < group["kept"].numel()
    return a * e.unsqueeze(-1), (b.t() if left else b) * (record.config["alpha"] / record.config["init_r"])


def _as_peft(
    result: Result,
    place: str,
    found: Sequence[Mapping[str, Tensor]],
    pairs: Sequence[Factors],
    scales: Sequence[float],
    weights: Sequence[float],
) -> Factors:
    if len({a.shape for a, _ in pairs}) > 1 or any("a0" in group for group in found):
        raise DeltaFileError(
            f"{place}: {result.options.asked} adds A and B apart, for which all ranks have to be equal and A and B "
            f"the change itself (no PiSSA, no OLoRA). Use {result.options.word}='linear'.",
            "mismatch",
        )
    own = [(a, b / scale) for (a, b), scale in zip(pairs, scales, strict=True)]
    scaled = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    if result.options.how == "peft_linear":
        return arithmetic.peft_linear(own, scaled)
    return arithmetic.peft_ties(own, scaled, result.options.density)


def _approximated(
    result: Result, place: str, pairs: Sequence[Factors], weights: Sequence[float] | None = None
) -> Factors:
    how = result.options.how
    weights = result.options.weights if weights is None else weights
    a, b = arithmetic.concatenated(pairs, weights)
    largest = min(a.shape[-1], b.shape[-2])
    if how in ("linear", "cat"):
        # A rank that the place cannot have is none: nothing is lost.
        return (a, b) if a.shape[-2] <= largest else arithmetic.truncated(a, b, largest)[0]
    if how == "svd":
        rank = min(result.options.rank or max(a.shape[-2] for a, _ in pairs), largest)
        factors, lost = arithmetic.truncated(a, b, rank)
        result.whole += float(torch.linalg.matrix_norm(b @ a).square().sum())
    else:
        change = combined_change(result.options, place, [b @ a for a, b in pairs], weights)
        factors, lost = arithmetic.factored(change, min(result.options.rank or a.shape[-2], largest))
        result.whole += float(torch.linalg.matrix_norm(change).square().sum())
    result.lost += float(lost)
    return factors


def combined_change(
    options: Options, place: str, changes: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """What is asked for, of changes of one tensor.

    Args:
        options: what is asked for.
        place: the tensor; DARE draws for it alone.
        changes: of each delta that makes one; the others have no opinion, as if their entries were cut.
        weights: theirs, where not all deltas make one.
    """
    how, density = options.how, options.density
    weights = options.weights if weights is None else weights
    if how.startswith("dare"):
        changes = [
            arithmetic.dropped(change, density, _generator(options.seed, place, index))
            for index, change in enumerate(changes)
        ]
    elif how in ENTRYWISE:
        changes = [arithmetic.trimmed(change, density) for change in changes]
    if how not in ELECTING:
        return arithmetic.weighted_sum(changes, weights)
    share = sum(weights)
    return arithmetic.elected(changes, weights) * (sum(options.weights) / share if share else 1.0)


def _generator(seed: int, place: str, index: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {place} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _scaling(result: Result, records: Sequence[MethodRecord]) -> MethodRecord:
    """(IA)³: the change ``(l − 1) W`` is linear in l."""
    result.refuse_unless(records[0], "linear")
    result.same_config(records, *_RUN, "layers_pattern")
    for path, group in result.groups(records[0])[0].items():
        for name in group:
            scales = _alike(result, join(path, name))
            moved = arithmetic.weighted_sum([scale - 1 for scale in scales], result.options.weights)
            result.tensors[join(path, name)] = (1 + moved).to(group[name].dtype)
    return records[0]


def _average(result: Result, records: Sequence[MethodRecord]) -> MethodRecord:
    """Adapters: an average of parameters, of runs from one initialisation."""
    result.refuse_unless(records[0], "linear")
    result.same_config(records, *_RUN)
    weights = result.options.weights
    if min(weights) < 0 or not math.isclose(sum(weights), 1, rel_tol=1e-6):
        raise ArgumentError(
            f"weights={list(weights)}: {records[0].method}:{records[0].name} is not linear in its parameters, of which "
            "only an average means something. Give weights that are not negative and sum to one."
        )
    for path, group in result.groups(records[0])[0].items():
        for name, tensor in group.items():
            mean = arithmetic.weighted_sum(_alike(result, join(path, name)), weights)
            result.tensors[join(path, name)] = mean.to(tensor.dtype)
    return records[0]


def _sparse(result: Result, records: Sequence[MethodRecord]) -> MethodRecord:
    """Fixed diff pruning and SHiRA: values at places, which add up."""
    result.refuse_unless(records[0], "linear")
    result.same_config(records, *_RUN, "density", "seed", "stages", "l0_weight", "r", "mask_type", "random_seed")
    for path in result.groups(records[0])[0]:
        parts = [groups[path] for groups in result.found]
        if any(part.keys() != {"indices", "values"} for part in parts):
            raise DeltaFileError(
                f"{path}: the places of this difference are not decided yet (its gates still train). Combine files "
                "from the end of their runs.",
                "mismatch",
            )
        places, inverse = torch.cat([part["indices"] for part in parts]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        scaled = [p["values"].double() * w for p, w in zip(parts, result.options.weights, strict=True)]
        total = torch.zeros(len(places), dtype=torch.float64).index_add_(0, inverse, torch.cat(scaled))
        result.tensors[join(path, "indices")] = places
        result.tensors[join(path, "values")] = total.to(parts[0]["values"].dtype)
    return records[0]


def _in_place(result: Result, records: Sequence[MethodRecord]) -> MethodRecord:
    """Methods that train parameters of the base (:func:`_values`), or whose own are linear and start at zero."""
    result.refuse_unless(records[0], "linear")
    result.same_config(records, "budget")
    if added := result.groups(records[0])[0]:  # BitFit's added biases start at zero
        for path, group in added.items():
            for name, tensor in group.items():
                total = arithmetic.weighted_sum(_alike(result, join(path, name)), result.options.weights)
                result.tensors[join(path, name)] = total.to(tensor.dtype)
    return records[0]


def _one_behind_the_other(
    kept: Mapping[str, int], plain: Mapping[str, Any], result: Result, records: Sequence[MethodRecord]
) -> MethodRecord:
    """Prefixes and prompts.

    Args:
        kept: names of the tensors that count, with the dimension of their positions.
        plain: options of the result: what made them is not in it.
        result: what is made.
        records: the method in each file.
    """
    result.refuse_unless(records[0], "cat")
    if records[0].config.get("use_gating"):
        raise ArgumentError(f"{records[0].method}:{records[0].name} has gates (use_gating=True), each for one prefix.")
    if result.options.given:
        raise ArgumentError(
            f"weights mean nothing for {records[0].method}:{records[0].name}, whose positions are put one behind the "
            "other. Leave them out."
        )
    result.same_config(records, "budget", "length", *plain)
    found = [
        {
            path: group
            for path, group in groups.items()
            if f".pet.{records[0].method}_{records[0].name}" in f".{path}" and kept.keys() & group.keys()
        }
        for groups in result.found
    ]
    if any(groups.keys() != found[0].keys() for groups in found):
        raise DeltaFileError(
            f"the files hold {records[0].method}:{records[0].name} at different places: positions are put one behind "
            "the other place by place.",
            "mismatch",
        )
    for path in found[0]:
        for name, dim in kept.items():
            result.tensors[join(path, name)] = torch.cat([groups[path][name] for groups in found], dim)
    length = sum(int(record.config["length"]) for record in records)
    own = {name: value for name, value in plain.items() if name in records[0].config}
    with_deltas = {path.rpartition(".pet.")[0] if ".pet." in path else "" for path in found[0]}
    targets = tuple(t for t in records[0].targets if t.parameter or t.module in with_deltas or t.module)
    return replace(records[0], config={**records[0].config, **own, "length": length, "budget": None}, targets=targets)


def _alike(result: Result, name: str) -> list[Tensor]:
    """A tensor of each file, of one shape, in float64."""
    tensors = [file.tensors[name] for file in result.files]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DeltaFileError(f"{name} has the shapes {shapes} in the files, and one is needed.", "mismatch")
    return [tensor.double() for tensor in tensors]


RULES: Final[dict[str, Callable[[Result, Sequence[MethodRecord]], MethodRecord]]] = {
    "lora": _low_rank,
    "adalora": _triplets,
    "ia3": _scaling,
    "adapter": _average,
    "adapter_bias": _average,
    "compacter": _average,
    "bitfit": _in_place,
    "layer_freezing": _in_place,
    "full_fine_tuning": _in_place,
    "diff_pruning": _sparse,
    "shira": _sparse,
    "miss": _in_place,
    "prefix_tuning": partial(_one_behind_the_other, {"key": -2, "value": -2}, {"projection": False, "init": "random"}),
    "prompt_tuning": partial(_one_behind_the_other, {"prompt": 0}, {"encoder": "none", "init": "random"}),
}
