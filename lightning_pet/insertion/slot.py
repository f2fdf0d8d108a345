"""How the input of one module reaches a delta on another, within one forward."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_pet.errors import DeadSiteError
from lightning_pet.model.call import HERE

if TYPE_CHECKING:
    from lightning_pet.insertion.host import Deltas


class Slot:
    """Carries the input of one module to a delta on another, within one forward of one thread."""

    def __init__(self, pet: "Deltas", key: str) -> None:
        self.pet = pet
        self.key = key

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first tensor of a call, unless the delta that wants it is switched off."""
        if not self.pet.acts(self.key):
            return
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                HERE.call.handed[self] = x
                return

    def take(self) -> Tensor:
        """Give the tensor away: a slot keeps no activation alive."""
        value = HERE.call.handed.pop(self, None)
        if value is None:
            raise DeadSiteError(
                f"the delta {self.key!r} reads the input of another module, which was not called before it in this "
                "forward. Exclude this place."
            )
        return value
