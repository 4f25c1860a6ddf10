from __future__ import annotations

import threading

import pytest
from transformers import TrainerCallback

from loraplus.bench.arms import arms_of, trainer_of
from loraplus.bench.runs import Run, ended, steps_of

BEST = arms_of("classification")[1]


class Steps(TrainerCallback):
    def __init__(self, fails_at=None):
        self.done, self.fails_at = 0, fails_at

    def on_step_end(self, args, state, control, **_):
        self.done += 1
        if self.done == self.fails_at:
            raise RuntimeError("out of paper")


def test_a_turn_is_so_many_steps_and_two_trainers_go_on_in_turns(classifier, tmp_path):
    runs, steps = [], []
    for _ in range(2):
        trainer = trainer_of(BEST, classifier, str(tmp_path))
        steps.append(Steps())
        trainer.add_callback(steps[-1])
        runs.append(Run(trainer, steps_of(trainer)))
    with ended(runs[0]), ended(runs[1]):
        assert runs[0].steps == classifier.steps == 3
        for turn in (1, 2):
            for run, seen in zip(runs, steps, strict=True):
                assert run.turn() > 0 and seen.done == 3 * turn
    assert not any(thread.name == "loraplus-bench" for thread in threading.enumerate())
    assert [seen.done for seen in steps] == [6, 6]


def test_what_a_trainer_raises_is_raised_where_the_turn_was_asked_for(classifier, tmp_path):
    trainer = trainer_of(BEST, classifier, str(tmp_path))
    trainer.add_callback(Steps(fails_at=2))
    with ended(Run(trainer, 3)) as run:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of paper"):
                run.turn()
