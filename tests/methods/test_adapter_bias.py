"""AdapterBias: the battery, golden properties, counts, and its own errors."""

from typing import Any, ClassVar

from lightning_pet import AdapterBiasCallback

from .battery import Battery, Case

D, F = 16, 24


def case(model: str, parameters: int, **options: Any) -> Case:
    return Case(model, AdapterBiasCallback, options, mergeable=False, parameters=parameters)


class TestAdapterBias(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", 2 * (D + F + 1)),
        case("bert", 2 * D + F + 1, share_alpha=True, layer_norms=True),
        case("gpt2", 2 * (D + 4 * D + 1), layer_norms=True),
        case("gpt2", 2 * 2 * D, form="survey"),
        case("t5", 4 * (D + F + 1)),
        case("vit", D + F + 1, layers_to_transform=[1]),
        case("transformer_encoder", 3 * D, form="survey", share_alpha=True),
    ]
