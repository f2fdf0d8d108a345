"""One delta of a model into a file."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_pet.errors import PETError
from lightning_pet.insertion.choice import record_at
from lightning_pet.insertion.intact import check_intact
from lightning_pet.layers.sharding import holds_parts
from lightning_pet.operations.base_check import base_fingerprint
from lightning_pet.operations.contents import meant, packed
from lightning_pet.operations.gathered import gathering_adapter, save_gathered
from lightning_pet.store.delta_file import write_delta
from lightning_pet.store.entry import written_by
from lightning_pet.store.manifest import Manifest, MethodRecord
from lightning_pet.store.reader import PathLike


def save(
    model: nn.Module,
    root_path: str,
    root: nn.Module,
    path: PathLike,
    *,
    name: str | None = None,
    notes: Mapping[str, str] | None = None,
    exact: bool = False,
) -> int:
    """Write a delta file; see :func:`lightning_pet.save_delta`.

    Args:
        model: what was given: the root, or what contains it.
        root_path: path of the root in it.
        root: the adapted root.
        path: of the file.
        name: of the delta.
        notes: for people.
        exact: digest every byte of the base.
    """
    record = record_at(root)
    delta = meant(record, name)
    view = record.of(delta)
    methods = tuple(MethodRecord(a.method, a.name, a.config, a.targets) for a in view.applied)
    manifest = Manifest(methods, root=root_path, notes=dict(notes or {}), written_by=written_by())
    if (adapter := gathering_adapter(model)) is not None:
        return save_gathered(adapter, root, view, path, manifest, exact)
    if holds_parts(root):
        raise PETError(
            f"this process holds parts of the delta only, and this {type(model).__name__} does not say which Trainer "
            "has the others. Pass the LightningModule, in every process; or use trainer.save_checkpoint, whose file "
            "load_delta reads without any engine."
        )
    check_intact(root, record)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in packed(root, record, delta).items()}
    manifest = replace(manifest, base=base_fingerprint(root, view, tensors, exact))
    return write_delta(path, tensors, manifest)
