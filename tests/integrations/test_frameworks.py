"""Whole runs of axolotl, ms-swift and LeRobot by their own commands, where these are installed.

Each runs in a process of its own, on a CPU. They want other versions of transformers and TRL than CI has; their pages
in docs/plugins say with which they were run.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraplus.diagnosis.checkpoint import diagnose_checkpoint

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "plugins"

AXOLOTL = """
base_model: {model}
plugins: [loraplus.integrations.axolotl.Plugin]
loraplus_lr_ratio: 8
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
datasets: [{{path: {folder}/rows.jsonl, type: alpaca, ds_type: json}}]
dataset_prepared_path: {folder}/prepared
sequence_len: 512
micro_batch_size: 4
gradient_accumulation_steps: 1
max_steps: 2
learning_rate: 1e-3
weight_decay: 0.1
optimizer: adamw_torch
lr_scheduler: constant
output_dir: {folder}/out
save_steps: 2
logging_steps: 1
bf16: false
fp16: false
tf32: false
attn_implementation: eager
val_set_size: 0
"""

LEROBOT = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
sizes = {"observation.state": 4, "observation.environment_state": 6, "action": 4}
kinds = {name: {"dtype": "float32", "shape": (n,), "names": list("abcdef"[:n])} for name, n in sizes.items()}
data = LeRobotDataset.create("some/data", 10, kinds, root="data", use_videos=False)
drawn = np.random.default_rng(0)
for _ in range(20):
    data.add_frame({name: drawn.normal(size=n).astype("float32") for name, n in sizes.items()} | {"task": "move"})
data.save_episode()
data.finalize()
common = "--dataset.repo_id=some/data --dataset.root=data --policy.push_to_hub=false --policy.device=cpu --batch_size=4"
common += " --num_workers=0 --eval_freq=0 --wandb.enable=false "
small = "dim_model=32 n_heads=2 dim_feedforward=32 n_encoder_layers=1 n_vae_encoder_layers=1 chunk_size=8"
small += " n_action_steps=8"
sys.argv[1:] = (common + "--policy.type=act --steps=1 --save_freq=1 --output_dir=base").split()
sys.argv += ["--policy." + option for option in small.split()]
from lerobot.scripts.lerobot_train import main
main()
sys.argv[1:] = (common + "--policy.path=base/checkpoints/last/pretrained_model --steps=2 --save_freq=2").split()
sys.argv += ["--peft.r=4", "--peft.target_modules=['linear1','linear2']", "--output_dir=out", "--loraplus.lr_ratio=8"]
from loraplus.integrations.lerobot import main
main()
"""


def ran(script: str, folder: Path) -> str:
    """What a script printed."""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def needs(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{name} is not installed")


def right_in(checkpoint: Path) -> None:
    assert diagnose_checkpoint(str(checkpoint), lr_ratio=8).ok
    logs = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["lr/lora_B"] == pytest.approx(8 * logs[0]["lr/lora_A"])


@pytest.mark.plugin("axolotl")
def test_axolotl_trains_what_a_yaml_file_says(decoder_folder, tmp_path):
    needs("axolotl", "axolotl")
    rows = [{"instruction": "say it", "input": "", "output": f"green {number}"} for number in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yml").write_text(AXOLOTL.format(model=decoder_folder, folder=tmp_path))
    told = ran("from axolotl.cli.train import do_cli\ndo_cli('run.yml')", tmp_path)
    assert "LoRA+ verified: lora_A at 0.001" in told and "lora_B at 0.008" in told
    right_in(tmp_path / "out" / "checkpoint-2")


@pytest.mark.plugin("ms-swift")
def test_ms_swift_trains_what_its_flags_say(decoder_folder, tmp_path):
    needs("swift", "ms-swift")
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "green"}]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 32))
    flags = {
        "model": decoder_folder, "model_type": "llama", "template": "llama", "dataset": "rows.jsonl",
        "tuner_type": "lora",
        "external_plugins": EXAMPLES / "ms_swift_plugin.py", "optimizer": "loraplus", "optim_args": "ratio=8",
        "learning_rate": 1e-3, "max_steps": 2, "save_steps": 2, "logging_steps": 1, "output_dir": "out",
        "torch_dtype": "float32", "per_device_train_batch_size": 4, "report_to": "none", "max_length": 512,
        "truncation_strategy": "right", "attn_impl": "eager", "split_dataset_ratio": 0, "check_model": False,
        "gradient_checkpointing": False, "dataloader_num_workers": 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    told = ran(f"from swift.pipelines import sft_main\nsft_main({words!r})", tmp_path)
    assert "LoRA+ verified: lora_A at 0.001" in told and "lora_B at 0.008" in told
    right_in(next(tmp_path.glob("out/*/checkpoint-2")))


@pytest.mark.plugin("LeRobot")
def test_lerobots_command_trains_a_policy(tmp_path):
    needs("lerobot", "LeRobot")
    told = ran(LEROBOT, tmp_path)
    assert "LoRA+ verified: lora_A at 1e-05" in told and "lora_B at 8e-05" in told
    groups = tmp_path / "out" / "checkpoints" / "last" / "training_state" / "optimizer_param_groups.json"
    rates = {group["name"].rpartition("/")[2]: group["lr"] for group in json.loads(groups.read_text())}
    assert rates["lora_B"] == pytest.approx(8 * rates["lora_A"])
