"""A training step that does the same in less time and memory: `speed_up` a model, `slow_down` again."""

from loraplus.speed.model import LEVERS, SpeedReport, slow_down, speed_up

__all__ = ["LEVERS", "SpeedReport", "slow_down", "speed_up"]
