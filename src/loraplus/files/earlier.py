"""What runs of earlier versions did not write down."""

from __future__ import annotations

LATER_SETTINGS = {
    "task": "classification", "loss_on": None, "packing": None, "long_examples": None, "chat_template": None,
    "load_in_4bit": False, "samples": 3,
    "lr_magnitude": None, "lr_overrides": None, "lr_ratio_overrides": None,
    "speed_up": True,  # runs before it computed the same, to rounding
}  # fmt: skip
"""Settings that came later, with the value that runs without them had."""
