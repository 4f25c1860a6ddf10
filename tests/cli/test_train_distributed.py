"""`torchrun -m loraplus train` and `accelerate launch -m loraplus train`: the adapter of one process, said once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from language import chat_rows, save_decoder, write_lines
from safetensors.torch import load_file

SOURCE = Path(__file__).parents[2] / "src"
# With --cpu Accelerate's launcher starts one process unless there is MPI.
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "--num_cpu_threads_per_process", "1",
    ],
    "one process": [],
}  # fmt: skip


def start(launcher: str, model, data, output, *more: object) -> subprocess.Popen[str]:
    arguments = [
        "train", "--model", model, "--data", data, "--output", output, "--batch-size", 16, "--lr", "5e-3",
        "--eval-steps", 10, "--rank", 4, "--plain", *more,
    ]  # fmt: skip
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "loraplus", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str], limit: float = 120) -> tuple[str, str]:
    try:
        return process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the launcher and its processes, nobody else
        out, err = process.communicate()
        raise AssertionError(f"not done after {limit} s:\n{out[-2000:]}\n{err[-3000:]}") from None


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_folder, reviews_csv):
    """Two epochs, the last batch of each smaller than the others and not even."""
    output = tmp_path_factory.mktemp("alone") / "adapter"
    process = start("one process", model_folder, reviews_csv, output, "--epochs", 2, "--json")
    out, err = finished(process)
    assert process.returncode == 0, err
    return output, json.loads(out)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_train_the_adapter_of_one_and_speak_once(tmp_path, model_folder, reviews_csv, alone, launcher):
    output = tmp_path / "two"
    process = start(launcher, model_folder, reviews_csv, output, "--epochs", 2, "--json")
    out, err = finished(process)
    assert process.returncode == 0, err[-3000:]
    metrics, one = json.loads(out), alone[1]  # one JSON document: the main process's
    assert (metrics["batch_size"], metrics["processes"], one["processes"]) == (16, 2, 1)
    assert one["data"]["train_examples"] % 16 and metrics["steps"] == one["steps"]
    assert metrics["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert metrics["eval_accuracy"] == one["eval_accuracy"]
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["base"] == pytest.approx(one["base"], rel=1e-4)
    scores, alone_scores = (json.loads((folder / "scores.json").read_text()) for folder in (output, alone[0]))
    assert scores["confusion_matrix"] == alone_scores["confusion_matrix"] and (output / "report.html").is_file()
    said = [{row["text"]: (row["truth"], row["prediction"]) for row in s["mistakes"]} for s in (scores, alone_scores)]
    assert said[0] == said[1]
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (alone[0], output))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert err.count("step 10") <= 1


def test_two_processes_train_the_chat_adapter_of_one(tmp_path):
    """The loss is a mean over all tokens of both processes; answers differ in length, so half and half would not do."""
    model, chats = save_decoder(tmp_path / "decoder"), write_lines(tmp_path / "chats.jsonl", chat_rows(60))
    options = ("--task", "sft", "--max-steps", 12, "--eval-steps", 6, "--samples", 0, "--no-packing", "--json")
    found = {}
    for launcher in ("one process", "torchrun"):
        process = start(launcher, model, chats, tmp_path / launcher, *options)
        out, err = finished(process)
        assert process.returncode == 0, err[-3000:]
        found[launcher] = json.loads(out), load_file(tmp_path / launcher / "adapter_model.safetensors")
    (one, a), (two, b) = found.values()
    assert (one["processes"], two["processes"], one["steps"], two["steps"]) == (1, 2, 12, 12)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert max(value.abs().max() for name, value in b.items() if "lora_B" in name) > 0.01
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes of a launcher through /proc")
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_job_with_a_message_and_a_checkpoint_to_go_on_from(
    tmp_path, model_folder, reviews_csv, which
):
    output = tmp_path / "killed"
    few = ("--max-eval-samples", 20)  # however long the run is
    process = start("torchrun", model_folder, reviews_csv, output, "--max-steps", 100000, *few)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    os.kill(children(process.pid)[which], signal.SIGKILL)
    _, err = finished(process, 120)
    assert process.returncode != 0
    assert err.count("another process of this run ended after step") == 1 and "--resume" in err, err[-3000:]
    checkpoint = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    step = int(checkpoint.name.split("-")[1])
    assert (checkpoint / "optimizer.pt").is_file() and not (output / "metrics.json").exists()

    config = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(config.replace("max_steps: 100000", f"max_steps: {step + 4}"))
    again = start("torchrun", model_folder, reviews_csv, output, "--max-steps", step + 4, *few, "--resume", "--json")
    out, err = finished(again)
    assert again.returncode == 0, err[-3000:]
    assert json.loads(out)["steps"] == step + 4


def test_a_mistake_is_said_once_and_nothing_is_written(tmp_path, model_folder, reviews_csv):
    output = tmp_path / "odd"
    process = start("torchrun", model_folder, reviews_csv, output, "--batch-size", 15)
    _, err = finished(process)
    assert process.returncode != 0 and not output.exists()
    assert err.count("loraplus: --batch-size 15 cannot be cut") == 1 and "each of 2 processes" in err


def test_a_signal_stops_all_processes_at_the_same_step_and_saves(tmp_path, model_folder, reviews_csv):
    output = tmp_path / "stopped"
    process = start("torchrun", model_folder, reviews_csv, output, "--max-steps", 100000)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = finished(process, 120)
    assert err.count("interrupted after step") == 1, err[-3000:]
    step = int(err.split("interrupted after step ")[1].split()[0])
    assert (output / f"checkpoint-{step}" / "optimizer.pt").is_file()
