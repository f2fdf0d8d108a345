"""What HF PEFT has and this library has not, by ``peft_type``: why, and what to train here instead."""

from collections.abc import Mapping
from typing import Final, NamedTuple


class Refusal(NamedTuple):
    """What is said of a type.

    Attributes:
        why: it has no counterpart; goes on from the name of the type.
        instead: what trains the like here.
        merges: PEFT can merge it into the weights.
    """

    why: str
    instead: str
    merges: bool = True


_SEED = "moves places of a spectrum that only a seed names, so its numbers mean something with one generator only"
_TASKS = "wants the number of a task for each row in the model's call"
REFUSED: Final[Mapping[str, Refusal]] = {
    "ADAPTION_PROMPT": Refusal(
        "mixes a second attention over learned tokens into the last layers of Llama alone",
        "PrefixTuningCallback, whose keys and values share the softmax",
        False,
    ),
    "BEFT": Refusal("adds biases, to layers that have none as well", "BitFitCallback(add_missing=True)"),
    "C3A": Refusal("adds blocks of circulant matrices, which have full rank", "LoRACallback or OFTCallback"),
    "CARTRIDGE": Refusal("is a cache of a text's keys and values", "PrefixTuningCallback", False),
    "CPT": Refusal(
        "keeps a prompt of given words within a ball around them, and weighs the loss", "PromptTuningCallback", False
    ),
    "DEFT": Refusal("projects a part of each weight away and puts another there", "LoRACallback"),
    "FOURIERFT": Refusal(_SEED, "LoRACallback, or IntrinsicDimensionCallback for very few numbers"),
    "GLORA": Refusal("multiplies and shifts weights and biases at once", "LoRACallback(lora_bias=True)"),
    "LILY": Refusal("shares its B between layers by a router of each input", "LoRACallback", False),
    "MULTITASK_PROMPT_TUNING": Refusal(_TASKS, "PromptTuningCallback, with TasksCallback for several tasks", False),
    "OSF": Refusal("trains the small singular directions of the weights themselves", "LoRACallback"),
    "PEANUT": Refusal("makes the change of a weight by a network of it", "LoRACallback or HRACallback"),
    "POLY": Refusal(_TASKS, "LoRACallback, with TasksCallback for several tasks", False),
    "PSOFT": Refusal("rotates within the leading singular directions of each weight", "OFTCallback or HRACallback"),
    "RANDLORA": Refusal(
        "adds a sum of random matrices of full rank, which a folder may leave to a seed", "LoRACallback of a high rank"
    ),
    "ROAD": Refusal("rotates and rescales what a layer returns", "OFTCallback, which rotates what it gets"),
    "WAVEFT": Refusal(_SEED, "LoRACallback, or IntrinsicDimensionCallback for very few numbers"),
    "SHADOW": Refusal("runs a second small network beside the layers", "AdapterCallback(placement='parallel')", False),
    "UNILORA": Refusal(
        "makes all A and B of one vector by places that only a seed names", "IntrinsicDimensionCallback or LoRACallback"
    ),
    "XLORA": Refusal(
        "weighs several LoRAs anew for every token, after a forward of its own",
        "TasksCallback, adapted.rows or adapted.combine for several LoRAs",
        False,
    ),
}


def way_out(kind: str) -> str:
    """The end of a message about a type that is not read."""
    if kind not in REFUSED:
        return "Merge it with PEFT and save the model, or train it again with one of them."
    why, instead, merges = REFUSED[kind]
    merge = "Merge it with PEFT and save the model" if merges else "It cannot be merged: use it with PEFT"
    return f"{kind} {why}. {merge}, or train {instead} here."
