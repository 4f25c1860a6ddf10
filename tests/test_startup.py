"""What is imported when: nothing that is not used, and nothing heavy before the input has been looked at."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
from older import skip_before

import loraplus
from loraplus.tasks.checks import SCHEDULES

HEAVY = ("torch", "transformers", "peft", "datasets", "sklearn", "bitsandbytes", "deepspeed")


def imported_by(code: str, *more: str) -> list[str]:
    """The heavy modules that a fresh process has imported after some code."""
    names = (*HEAVY, *more)
    show = f"import sys; print('imported:', *(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def command(*arguments: object) -> str:
    return (
        f"from loraplus.cli import main\ntry:\n    main({list(map(str, arguments))!r})\nexcept SystemExit as stop:\n"
        f"    sys_code = stop.code"
    )


def test_the_core_imports_torch_and_neither_sharded_tensors_nor_sympy():
    code = "import loraplus\nfor name in loraplus.__all__:\n    if name not in ('attach', 'LoraPlusTrainer', "
    code += "'LoraPlusTrainingArguments'):\n        getattr(loraplus, name)"
    assert imported_by(code, "torch.distributed.tensor", "sympy") == ["torch"]


def test_the_package_itself_imports_nothing_heavy():
    assert imported_by("import loraplus") == []


def test_the_version_is_that_of_the_installed_package():
    code = "import importlib.metadata, loraplus\nassert loraplus.__version__ == importlib.metadata.version('loraplus')"
    assert imported_by(code) == []
    assert imported_by(command("--version")) == []
    done = subprocess.run([sys.executable, "-m", "loraplus", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"loraplus {loraplus.__version__}\n"


def test_every_root_name_is_there_and_none_is_a_module():
    for name in loraplus.__all__:
        assert not isinstance(getattr(loraplus, name), types.ModuleType), name
    assert set(loraplus.__all__) <= set(dir(loraplus))
    assert isinstance(loraplus.groups, types.ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loraplus.nothing


def test_a_function_stays_one_whatever_is_imported_after_it():
    code = "import loraplus.feature_updates\nimport loraplus\nassert callable(loraplus.feature_updates)"
    assert imported_by(code) == ["torch"]


@pytest.mark.parametrize(
    "name", ["", "train", "compare", "tune", "predict", "evaluate", "generate", "merge", "inspect", "doctor", "export"]
)
def test_help_imports_nothing_heavy(name):
    assert imported_by(command(*([name] if name else []), "--help")) == []


def test_bad_input_is_refused_before_anything_heavy_is_imported(tmp_path, model_folder):
    data = tmp_path / "d.csv"
    data.write_text("text,label\na b,x\nc d,y\n")
    (tmp_path / "empty.csv").write_text("\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.yaml").write_text("lr: [1\n")
    adapter = tmp_path / "adapter"  # whose base model is gone
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    good = ["--model", "m", "--data", data, "--output", tmp_path / "out"]
    tried = [
        ["train", *good, "--data", tmp_path / "nope.csv"],
        ["train", *good, "--data", tmp_path / "empty.csv"],
        ["train", *good, "--eval-data", tmp_path / "folder"],
        ["train", *good, "--model", tmp_path / "nope"],
        ["train", *good, "--model", tmp_path / "folder"],
        ["train", *good, "--output", tmp_path],
        ["train", *good, "--lr", "nan"],
        ["train", *good, "--rank", "0"],
        ["train", *good, "--rnk", "1"],
        ["train", *good, "--task", "sft", "--loss-on", "nothing"],
        ["train", *good, "--lr-scheduler-type", "cosin"],
        ["compare", *good, "--lr-scheduler-type", "nothing"],
        ["train", *good, "--max-length", "1"],
        ["tune", *good, "--model", model_folder, "--max-length", "33"],
        ["train", "--config", tmp_path / "bad.yaml"],
        ["compare", *good, "--arms", "lora,nothing"],
        ["compare", *good, "--test-data", tmp_path / "nope.csv"],
        ["tune", *good, "--tuning-runs", "0"],
        ["predict", "--adapter", tmp_path / "folder", "--data", data, "--output", tmp_path / "p.csv"],
        ["evaluate", "--adapter", tmp_path / "folder", "--data", data],
        ["evaluate", "--adapter", adapter, "--data", data, "--output", tmp_path],
        ["merge", "--adapter", tmp_path / "folder", "--output", tmp_path / "merged"],
        ["generate", "--adapter", tmp_path / "folder", "--prompt", "x"],
        ["generate", "--prompt", "x"],
        *(
            [*command, "--adapter", adapter, "--model", model]
            for command in (
                ["predict", "--data", data, "--output", tmp_path / "p.csv"],
                ["evaluate", "--data", data],
                ["merge", "--output", tmp_path / "merged"],
                ["generate", "--prompt", "x"],
            )
            for model in (tmp_path / "nope", tmp_path / "folder", data, adapter)
        ),
        ["merge", "--adapter", adapter, "--output", tmp_path / "merged"],
        ["inspect", tmp_path / "nope"],
        ["doctor", tmp_path / "nope"],
        ["doctor", "--", "no-such-program", "x.py"],
        ["reproduce", "nothing"],
    ]
    codes = "\n".join(
        f"{command(*arguments)}\nassert sys_code == 2, {list(map(str, arguments))!r}" for arguments in tried
    )
    assert imported_by(codes) == []
    assert not (tmp_path / "out").exists()


def test_every_schedule_of_transformers_is_known_without_it():
    from transformers import SchedulerType

    assert {schedule.value for schedule in SchedulerType} <= set(SCHEDULES)


def test_experiments_are_listed_without_what_they_run_with():
    assert imported_by(command("reproduce", "--list"), "scipy", "optuna", "matplotlib") == []
    assert imported_by(command("reproduce", "--list", "--json"), "scipy", "optuna", "matplotlib") == []


def test_a_classifier_is_trained_without_packages_that_it_has_no_use_for(tmp_path, model_folder, reviews_csv):
    skip_before("transformers", "5.21.0", "imports scikit-learn by itself")
    run = ["train", "--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out", "--max-steps", 1]
    code = f"{command(*run)}\nassert not sys_code"
    assert not {"sklearn", "deepspeed", "scipy.stats"} & set(imported_by(code, "scipy.stats"))


def test_an_error_can_be_named_at_the_root_and_is_not_listed_there():
    assert loraplus.RateMismatchError is loraplus.errors.RateMismatchError
    from loraplus import InvalidRateError

    assert InvalidRateError is loraplus.errors.InvalidRateError
    listed = [name for name in loraplus.__all__ if name.endswith(("Error", "Warning"))]
    assert listed == ["LoraPlusError", "LoraPlusWarning"]


def test_groups_and_automatic_rates_import_no_sharded_tensors():
    assert imported_by("import loraplus.groups, loraplus.auto", "torch.distributed.tensor", "sympy") == ["torch"]
