"""The command under every engine: the shipped configuration as it is, two processes, then resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_operator import require_deepspeed
from launch import launch

from lightning_pet import load_from_checkpoint
from lightning_pet.cli.main import main
from lightning_pet.store.entry import MARK
from tests.cli.user_code import Data, Net

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = os.pathsep.join(map(str, (HERE, HERE.parent / "engine", ROOT)))
EXPECTED = {f"net.{i}.pet.lora_default.{p}" for i in (0, 2) for p in "ab"} | {"head.weight", "head.bias"}
ZERO1 = "--trainer.strategy=deepspeed_stage_1"
POLICY, WRAP = "--trainer.strategy.auto_wrap_policy", "torch.distributed.fsdp.wrap.ModuleWrapPolicy"
ENGINES = {  # configuration, the user's module, what is overridden
    "fsdp2": ("fsdp2", "ShardedNet", []),
    "zero3": ("deepspeed_zero3", "Net", []),
    "fsdp": ("fsdp", "Net", []),
    "fsdp-layers": (
        "fsdp",
        "Net",
        ["--trainer.strategy=engines.CPUFSDP", f"{POLICY}={WRAP}", f"{POLICY}.module_classes=[torch.nn.Linear]"],
    ),
    "zero2": ("deepspeed_zero2", "Net", []),
    "zero1": ("deepspeed_zero2", "Net", [ZERO1]),
}
SLOW = {"fsdp", "fsdp-layers", "zero2", "zero1"}
# The command that pip installs; run twice, to resume, in one process: importing takes longer than training.
COMMAND = "import sys\nfrom lightning_pet.cli.main import main\nsys.exit(main())\n"
TWICE = (  # in one group, which is there before the first command and stays: its port is not free again at once
    "import json, os, torch\nfrom lightning_pet.cli.main import main\ntorch.distributed.init_process_group('gloo')\n"
    "for arguments in json.loads(os.environ['COMMANDS']):\n    main(arguments)\n"
)


def arguments(folder: Path, config: str, net: str = "Net", *more: str) -> list[str]:
    """A short fit with a shipped configuration."""
    task = [f"--model=cpu_engines.{net}", "--data=user_code.Data", "--pet+=LoRACallback", "--pet.r=4"]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}"]
    here = ["-c", str(ROOT / "configs" / "trainer" / f"{config}.yaml"), "--trainer.accelerator=cpu"]
    return ["fit", *task, "--pet.target_modules=[net.0,net.2]", *here, *quiet, "--trainer.max_epochs=1", *more]


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch, and one more after resuming: two deltas that everything reads."""
    files = {step: folder / "checkpoints" / f"epoch={step // 4 - 1}-step={step}.ckpt" for step in (4, 8)}
    assert set(folder.rglob("*.ckpt")) == set(files.values())
    for step, path in files.items():
        saved = torch.load(path, weights_only=True)
        assert saved["state_dict"].keys() - {MARK} == EXPECTED
        assert saved["global_step"] == step
        states = saved["optimizer_states"][0]["state"].values()
        assert [int(state["step"]) for state in states] == [step] * len(EXPECTED)
    main(["inspect", str(files[8]), "--json_output=true"])
    summary = json.loads(capsys.readouterr().out)
    assert (summary["methods"][0]["config"]["r"], set(summary["tensors"])) == (4, EXPECTED)
    losses = [validated(load_from_checkpoint(Net, path)) for path in files.values()]
    assert losses[1] < losses[0] < validated(Net())


def validated(module: Net) -> float:
    with torch.no_grad():
        return sum(torch.nn.functional.cross_entropy(module(x), y).item() for x, y in Data().val_dataloader())


def test_ddp_starts_its_own_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "lightning-pet"
    script.write_text(COMMAND)
    run = tmp_path / "run"
    resumed = [f"--ckpt_path={run}/checkpoints/epoch=0-step=4.ckpt", "--trainer.max_epochs=2"]
    for more in ([], resumed):
        command = [sys.executable, str(script), *arguments(run, "ddp", "Net", *more)]
        env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stdout + done.stderr
    check(run, capsys)


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[pytest.mark.slow] * (e in SLOW)) for e in ENGINES])
def test_fit_and_resume(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, net, more = ENGINES[engine]
    if engine.startswith("zero"):
        require_deepspeed()
    first = arguments(tmp_path, config, net, *more)
    resumed = [*first, "--trainer.max_epochs=2", f"--ckpt_path={tmp_path}/checkpoints/epoch=0-step=4.ckpt"]
    monkeypatch.setenv("PYTHONPATH", PATHS)
    codes, outputs = launch(["-c", TWICE], timeout=240, env={"COMMANDS": json.dumps([first, resumed])})
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    check(tmp_path, capsys)
