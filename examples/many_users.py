"""Many users of one model, each with a delta of their own: 500 files, 128 deltas in memory, 32 users in one batch.

A small model learns which of eight numbers is the largest on average. Each user has other names for the answers: a LoRA
with a head of its own. A service gets requests of different users, some of whom come often, 32 at a time: every row of
a batch goes through the delta of its user.

    python examples/many_users.py            # ten seconds and more, no download
"""

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_pet import DeltaLibrary, LoRACallback, apply, load_delta

USERS, BATCH, BATCHES, ANSWERS, WIDTH, STEPS = 500, 32, 24, 8, 256, 64


class Net(nn.Module):
    """Steps of eight numbers (batch, steps, 8) to eight answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(ANSWERS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.head = nn.Linear(WIDTH, ANSWERS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.head(hidden.mean(1))


@torch.enable_grad()
def trained() -> Net:
    """The base model."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        x = torch.randn(64, 4, ANSWERS)
        nn.functional.cross_entropy(net(x), x.mean(1).argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def answers_of(user: int) -> Tensor:
    """What a user calls the eight answers."""
    return torch.randperm(ANSWERS, generator=torch.Generator().manual_seed(user))


def make(net: Net, folder: Path) -> None:
    """A file for each user, as each had trained his delta: the head in his order, and a LoRA that is no one else's."""
    adapted = apply(net, LoRACallback(r=4, target_modules=["layers.*"], modules_to_save=["head"]))
    head = {name: tensor.detach().clone() for name, tensor in net.head.named_parameters()}
    for user in range(USERS):
        generator = torch.Generator().manual_seed(user)
        tensors = adapted.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("head."):
                tensor.copy_(head[name.removeprefix("head.")][answers_of(user).argsort()])
            else:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
        adapted.save(folder / f"user-{user}.pet.safetensors")
    adapted.remove()


def batch_of(number: int) -> tuple[list[int], Tensor]:
    """The users of a batch, all of them different, and what they ask; the first users come more often."""
    generator = torch.Generator().manual_seed(1000 + number)
    often = 1 / torch.arange(1.0, USERS + 1)
    users = torch.multinomial(often, BATCH, generator=generator).tolist()
    return users, torch.randn(BATCH, 1, ANSWERS, generator=generator).expand(-1, STEPS, -1)


def serve(net: Net, folder: Path) -> None:
    """Batches of 32 users each; then the same batches for one user."""
    library = DeltaLibrary(net, folder, resident=128)
    right, seconds = 0, 0.0
    for number in range(-1, BATCHES):  # the first one makes the places in the model, and looks how it treats rows
        users, x = batch_of(number)
        begin = time.perf_counter()
        with library.rows([f"user-{user}" for user in users]):
            found = net(x).argmax(1)
        if number < 0:
            continue
        seconds += time.perf_counter() - begin
        right += sum(answers_of(user)[row[0].argmax()] == a for a, user, row in zip(found, users, x, strict=True))
    info = library.info()
    print(f"{len(library)} users' files, {info.maxsize} in memory: {info.misses} were read, {info.hits} were there")
    print(f"answers: {int(right) / (BATCH * BATCHES):.3f} are right in the words of their user")
    print(f"{BATCH} users in a batch: {BATCH * BATCHES / seconds:,.1f} requests a second")

    alone = load_delta(trained(), library["user-0"])
    begin = time.perf_counter()
    for number in range(BATCHES):
        alone.root(batch_of(number)[1])
    print(f"one user for all: {BATCH * BATCHES / (time.perf_counter() - begin):,.1f} requests a second")


def main() -> None:
    """Make the users, and serve them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        net = trained()
        with torch.no_grad():
            make(net, Path(name))
            serve(net, Path(name))


if __name__ == "__main__":
    main()
