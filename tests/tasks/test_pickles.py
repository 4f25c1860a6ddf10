"""No pickle that comes from elsewhere is executed, by whatever reader and under whatever name it is found."""

from __future__ import annotations

import builtins
import collections
import json
import os
import pickle
import shutil
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from loraplus.errors import InputError
from loraplus.inspection import inspect_folder
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.merge import merge
from loraplus.tasks.pickles import is_whole, load_pickle
from loraplus.tasks.predict import load_adapter
from loraplus.tasks.pretrained import load_base
from loraplus.tasks.train import train


class Reduced:
    """Unpickled by a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(there):
    """Objects that make a file when they are unpickled in earnest."""
    path = str(there)
    return {
        "os.system": Reduced(os.system, f"touch {path}"),
        "open": Reduced(builtins.open, path, "w"),
        "exec": Reduced(exec, f"open({path!r}, 'w')"),
        "eval": Reduced(eval, f"open({path!r}, 'w')"),
        "subprocess": Reduced(subprocess.getoutput, f"touch {path}"),
        "mkdir": Reduced(os.makedirs, path),
        "in a dictionary": {"state": {0: Reduced(os.system, f"touch {path}")}, "param_groups": []},
        "in an ordered one": collections.OrderedDict(a=Reduced(os.system, f"touch {path}")),
    }


NAMES = list(attacks("x"))
WRITERS = {
    "torch": lambda content, path: torch.save(content, path),
    "torch, old format": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "pickle of text": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
}


@pytest.fixture(scope="module")
def trained(model_folder, reviews_csv, tmp_path_factory):
    """Output of a run, with its checkpoint."""
    output = tmp_path_factory.mktemp("trained") / "o"
    config = TrainConfig(
        model=str(model_folder), data=str(reviews_csv), output=str(output), max_steps=2, eval_steps=2, batch_size=8,
    )  # fmt: skip
    train(config)
    return output


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, writer, name):
    there = tmp_path / "ran"
    path = tmp_path / "optimizer.pt"
    WRITERS[writer](attacks(there)[name], path)
    there.unlink(missing_ok=True)
    with pytest.raises(InputError, match="damaged, or no file of tensors"):
        load_pickle(path)
    assert not there.exists()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "adapter_model.bin"])
def test_inspect_executes_none(trained, tmp_path, writer, file):
    folder = shutil.copytree(trained / "checkpoint-2", tmp_path / "c")
    there = tmp_path / "ran"
    (folder / "rng_state.pth").unlink(missing_ok=True)
    if file == "adapter_model.bin":
        (folder / "adapter_model.safetensors").unlink()
    if file == "scheduler.pt":  # it is asked where the optimizer does not say the rates' bases
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        for group in state["param_groups"]:
            group.pop("initial_lr", None)
        torch.save(state, folder / "optimizer.pt")
    WRITERS[writer](attacks(there)["os.system"], folder / file)
    there.unlink(missing_ok=True)
    with pytest.raises(InputError, match=file):
        inspect_folder(str(folder))
    assert not there.exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_no_loader_of_a_base_model_executes_one(trained, model_folder, reviews_csv, tmp_path, writer):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    there = tmp_path / "ran"
    WRITERS[writer](attacks(there)["os.system"], folder / "pytorch_model.bin")
    there.unlink(missing_ok=True)
    for load in (
        lambda: load_base(str(folder)),
        lambda: load_adapter(str(trained), str(folder)),
        lambda: merge(str(trained), tmp_path / "merged", model=str(folder)),
    ):
        with pytest.raises(InputError):
            load()
    assert not there.exists() and not (tmp_path / "merged").exists()


def test_an_adapter_that_is_a_pickle_is_not_loaded(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "a")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        load_adapter(str(folder))


def test_every_changed_byte_of_an_optimizer_is_read_or_one_line(trained, tmp_path):
    folder = shutil.copytree(trained / "checkpoint-2", tmp_path / "c")
    path = folder / "optimizer.pt"
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    start = good.index(archive.filename and entry.filename.encode()) + len(entry.filename)
    for place in range(start, start + entry.file_size, 29):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
        try:
            inspect_folder(str(folder))
        except InputError as error:
            assert len(str(error).splitlines()) == 1


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as good,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for entry in good.infolist():
            bad.writestr(entry.filename, good.read(entry))
    with pytest.raises(InputError, match="is compressed, which torch never does"):
        load_pickle(tmp_path / "b.pt")


def test_a_tensor_that_counts_its_numbers_many_times_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(1).expand(8, 10**9)
    assert not is_whole(tensors[name]) and is_whole(torch.zeros(3, 4)[:, 1:])
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="more numbers than there are in it"):
        inspect_folder(str(folder))


@pytest.mark.parametrize("content", ["null", "[1]", '{"lr": %s}' % ("9" * 401), '{"lr": "1e-3", "lr_ratio": 16}',
                                     '{"lr": true}', '{"lr": 1, "auto": "x"}', '{"lr": 1, "auto": {"lr_a": "x"}}',
                                     '{"lr": 1, "auto": {"layers": {"a": 3}}}', '{"lr": 1, "roles": [1]}',
                                     '{"lr": 1, "lr_overrides": {"(": 1}}', '{"lr": 1, "lr_overrides": 3}',
                                     '{"lr": 1, "auto": {"layers": {"a": {"lora_A": %s}}}}' % ("9" * 401)])  # fmt: skip
def test_rates_that_are_none_are_one_line(trained, tmp_path, content):
    folder = shutil.copytree(trained, tmp_path / "a")
    (folder / "loraplus.json").write_text(content)
    with pytest.raises(InputError, match=r"loraplus\.json"):
        inspect_folder(str(folder))


@pytest.mark.parametrize("value", [10**400, "8", True, None, 0, 2.5, [8]])
def test_a_rank_that_is_none_is_one_line(trained, tmp_path, value):
    folder = shutil.copytree(trained, tmp_path / "a")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": value}))
    with pytest.raises(InputError, match="r must be a number of 1 or more"):
        inspect_folder(str(folder))
