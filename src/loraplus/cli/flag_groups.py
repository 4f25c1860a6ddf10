"""The heading of each flag in --help, and the examples below the flags."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

NEEDED, REST, OF_COMMAND = "Needed (flags, or keys of --config)", "Training", "This command"
_GROUPS = {
    NEEDED: "",
    "Data": "model data output task eval_data test_data text_column label_column prompt_column completion_column "
    "messages_column encoding loss_on packing long_examples chat_template max_length eval_fraction test_fraction "
    "max_eval_samples max_test_samples",
    "Adapter": "rank alpha lora_dropout target_modules use_rslora use_dora load_in_4bit",
    "Rates": "lr lr_ratio lr_head lr_embedding lr_magnitude lr_overrides lr_ratio_overrides untuned_lr "
    "lr_scheduler_type warmup_ratio weight_decay",
    REST: "",
    "Study": "arms tuning_runs seeds minutes storage study workers",
    "What is measured": "rows ablation memory profile table",
}
ORDER = tuple(_GROUPS)
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}


def group_of(name: str, needed: Container[str]) -> str:
    """The heading of a configuration's flag.

    Args:
        name: of the field.
        needed: fields that the command must be given.
    """
    return NEEDED if name in needed else _GROUP_OF.get(name, REST)


def keep_flags_whole() -> None:
    """Has --help go on in the next line where a flag is longer than its column, which would cut it off."""
    from typer import rich_utils  # here, since it takes a while and only --help needs it

    def whole(kind: type[Any]) -> Any:
        class Whole(kind):
            def highlight(self, text: Any) -> None:
                text.overflow = "fold"
                super().highlight(text)

        return Whole()

    rich_utils.highlighter = whole(rich_utils.OptionHighlighter)
    rich_utils.negative_highlighter = whole(rich_utils.NegativeOptionHighlighter)


def examples(*lines: str) -> str:
    """The text below the flags of a command. click keeps line ends only at empty lines, so these are added."""
    return "\n\n".join(["Examples:", *lines])
