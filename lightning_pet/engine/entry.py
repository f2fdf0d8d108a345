"""The ``lightning_pet`` entry of a checkpoint: what it holds, and the checks before anything is loaded.

Plain types only, so that ``torch.load(weights_only=True)`` reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_pet.core.adaptation import Adaptation, Applied
from lightning_pet.core.method import METHODS
from lightning_pet.core.naming import canonical
from lightning_pet.errors import BaseMismatchError, DeltaFileError
from lightning_pet.store.fingerprint import Fingerprint, Verdict, compare, fingerprint, from_plain, to_plain
from lightning_pet.store.tensors import digest, require_finite, verify_digests
from lightning_pet.version import VERSION

KEY = "lightning_pet"
FORMAT = 1


def written_by() -> str:
    """Name and version of this library."""
    return f"lightning_pet {VERSION}"


def base_parameters(root: nn.Module, record: Adaptation) -> list[tuple[str, Tensor]]:
    """The frozen base: every parameter that is neither a delta nor trained, each tied tensor once."""
    other = {*record.delta_names, *record.trained_names}
    named = ((canonical(name), parameter) for name, parameter in root.named_parameters())
    return [(name, parameter.detach()) for name, parameter in named if name not in other]


def base_fingerprint(root: nn.Module, record: Adaptation) -> Fingerprint:
    """Fingerprint of the frozen base."""
    return fingerprint(base_parameters(root, record))


def describe(applied: Applied) -> dict[str, Any]:
    """One applied method in plain types."""
    targets = [asdict(target) for target in applied.targets]
    return {"method": applied.method, "name": applied.name, "config": applied.config, "targets": _lists(targets)}


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def make_entry(record: Adaptation, root_path: str, base: Fingerprint, state: Mapping[str, Any]) -> dict[str, Any]:
    """Build the entry for a checkpoint whose delta-only state dict is ``state``."""
    return {
        "format": FORMAT,
        "written_by": written_by(),
        "root": root_path,
        "methods": [describe(applied) for applied in record.applied],
        "base": to_plain(base),
        "digests": {name: digest(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)},
    }


def read_entry(checkpoint: Mapping[str, Any], path: object) -> dict[str, Any]:
    """Take the entry out of a checkpoint, with its format checked.

    Raises:
        DeltaFileError: if there is none, or it is of a newer format.
    """
    entry = checkpoint.get(KEY)
    if not isinstance(entry, dict):
        raise DeltaFileError(
            f"{path} is not a delta checkpoint: it has no {KEY!r} entry (found {', '.join(sorted(checkpoint)[:6])}…). "
            "ckpt_path resumes a run of lightning_pet. To start from other base weights, load them where the "
            "LightningModule builds its model; to start from a delta, use start_from.",
            "mismatch",
        )
    if entry.get("format") != FORMAT:
        raise DeltaFileError(
            f"{path} has format {entry.get('format')!r}, this release reads {FORMAT}. It was written by "
            f"{entry.get('written_by')}; install that release or a newer one.",
            "version",
        )
    return entry


def check_methods(entry: Mapping[str, Any], record: Adaptation, path: object) -> None:
    """The methods of the run must be those of the checkpoint: same names, order, places and sizes.

    Raises:
        DeltaFileError: (``mismatch``) naming the first difference.
    """
    saved, here = entry["methods"], [describe(applied) for applied in record.applied]
    labels = [[f"{m['method']}:{m['name']}" for m in methods] for methods in (saved, here)]
    if labels[0] != labels[1]:
        raise DeltaFileError(
            f"{path} holds the methods {labels[0]}, this run has {labels[1]}: give the same callbacks in the same order.",
            "mismatch",
        )
    for then, now in zip(saved, here, strict=True):
        free = METHODS[now["method"]].may_change
        differing = {
            option: (then["config"].get(option), value)
            for option, value in now["config"].items()
            if option not in free and then["config"].get(option) != value
        }
        if differing:
            shown = ", ".join(f"{o}={a!r} there and {b!r} here" for o, (a, b) in differing.items())
            raise DeltaFileError(
                f"{path}: {now['method']}:{now['name']} was trained with other options: {shown}.", "mismatch"
            )
        if then["targets"] != now["targets"]:
            there, present = ({t["module"] for t in m["targets"]} for m in (then, now))
            only = sorted(there ^ present)[:4] or ["the same modules, but other roles or rows"]
            raise DeltaFileError(
                f"{path}: {now['method']}:{now['name']} was trained on {len(there)} places, this run has {len(present)}; "
                f"they differ in {', '.join(only)}.",
                "mismatch",
            )


def check_tensors(checkpoint: Mapping[str, Any], entry: Mapping[str, Any], path: object) -> None:
    """Every tensor must be the one that was written, and finite."""
    state = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    verify_digests(state, entry["digests"], where=str(path))
    for name, tensor in state.items():
        if tensor.is_floating_point():
            require_finite(name, tensor, where=str(path))


def check_base(saved: Fingerprint, root: nn.Module, record: Adaptation, path: object, policy: str) -> None:
    """The base must be the one that the delta was trained on.

    Args:
        saved: fingerprint that was stored with the delta.
        root: the adapted root.
        record: what was applied to it.
        path: the file, for messages.
        policy: ``"error"``, ``"warn"`` or ``"off"``: the caller's choice, never the file's.

    Raises:
        BaseMismatchError: if it is another one and the policy is ``"error"``.
    """
    if policy == "off":
        return
    result = compare(saved, base_parameters(root, record))
    if result.verdict is Verdict.DIFFERENT:
        message = f"{path} was trained on another base model: {result.explanation}"
        if policy == "error":
            raise BaseMismatchError(
                f"{message} Load the base it was trained on, or pass base_check='warn' if you are sure."
            )
        rank_zero_warn(message)
    elif result.verdict is Verdict.UNVERIFIED:
        rank_zero_warn(f"{path}: the base model could not be compared with the one trained on: {result.explanation}")


def saved_fingerprint(entry: Mapping[str, Any], path: object) -> Fingerprint:
    """The fingerprint stored in an entry."""
    return from_plain(entry["base"], str(path))
