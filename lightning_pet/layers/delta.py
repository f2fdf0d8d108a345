"""The base of everything that a method inserts: a child module of the layer that it changes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_pet.errors import NotMergeableError

Path = Literal["activation", "weight"]


class Delta(nn.Module):
    """What one method adds to one host module.

    A delta is registered as a child of its host, holds raw :class:`torch.nn.Parameter` objects
    (never ``nn.Linear``, which quantising precision plug-ins replace), and is always run through
    ``__call__``, so that sharding engines can treat it as a unit of its own.

    Two calling conventions, chosen by ``path``:

    * ``"activation"``: ``delta(x, output)`` gets the host's input and output and returns the new
      output. It may write into ``output``. A delta with ``fuses_linear = True`` may also be called
      as ``delta(x, None, weight, bias)`` and then computes the host's product itself.
    * ``"weight"``: ``delta(weight)`` returns the effective weight, for hosts whose weight is read
      without the host being called.
    """

    path: ClassVar[Path] = "activation"
    fuses_linear: ClassVar[bool] = False

    parameter: str = "weight"
    """Which parameter of the host this delta belongs to; set when it is inserted."""

    def reset_parameters(self) -> None:
        """Initialise the parameters in place; also called after materialisation from the meta device."""
        raise NotImplementedError

    def initialize_from(self, weight: Tensor) -> None:
        """Initialise from the base weight, for initialisations that need it. The default ignores it."""

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight that gives the same outputs without the delta.

        Args:
            weight: the base parameter, of any floating dtype.

        Returns:
            A new tensor of the same shape and dtype; computed in at least float32.

        Raises:
            NotMergeableError: if no weight does.
        """
        raise NotMergeableError(
            f"{type(self).__name__} cannot be added into a base weight exactly; keep it attached instead of merging."
        )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A base checkpoint holds none of our keys and must load into an adapted model, strictly.
        # One that holds some of them is a damaged delta.
        own: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own, unexpected_keys, error_msgs)
        if len(own) < len(self.state_dict()):
            missing_keys.extend(own)
