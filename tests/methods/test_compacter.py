"""Compacter and its relatives: the battery, golden properties, counts, and its own errors."""

from typing import Any, ClassVar

from lightning_pet import CompacterCallback

from .battery import Battery, Case

SIZE = {"bottleneck_size": 8}
D, K = 16, 8
ONE = 3 * (D + K)  # factored, rank 1, without a rule


def case(model: str, parameters: int | None = None, tolerance: float | None = 1e-4, **options: Any) -> Case:
    return Case(
        model,
        method=CompacterCallback,
        options={**SIZE, **options},
        exact_identity=False,
        identity_tolerance=tolerance,
        mergeable=False,
        parameters=parameters,
    )


class TestCompacter(Battery):
    cases: ClassVar[list[Case]] = [
        case("bert", 4 * ONE + 64),
        case("bert", 4 * ONE, None, phm_dim=1),
        case("gpt2", 2 * ONE + 64, placement="ffn"),
        case("llama", 4 * (2 * D * K // 4 + D + K + 2 * 64), 5e-2, factorized=False),
        case("t5", 10 * ONE + 8, phm_dim=2, cross_attention=True),
        case("vit", 4 * (ONE + 2 * 64), 5e-2, shared_rule=False),
        case("transformer_encoder", 4 * (2 * ONE - D - K) + 64, rank=2),
    ]
