"""The small pre-trained decoders moved to another domain: language modelling of movie reviews, by width.

Those of width 32 to 128 were pre-trained on verses, product reviews and tweets. That of width 256 is the decoder of
examples/decoder, which has read verses only and has another vocabulary: its rates can be compared with the others', its
losses cannot. The theory says that the best λ grows with the width; at these widths the effect is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplus.reproduce import small_decoders, small_tasks
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.experiment import Record, Records
from loraplus.reproduce.report import Figure, LinePlot, Report, Series, Table, interval
from loraplus.reproduce.small_training import WARMUP, SmallAdapter, batches, build, train
from loraplus.reproduce.tuned_arms import HOW_TUNED, LOSS, TEST_LOSS, Case, Job, TunedArms, headline, title, verdicts
from loraplus.study.search.grid import lr_of
from loraplus.study.statistics import Estimate, finite_t_interval
from loraplus.study.worker import OnStep

ByRatio = dict[str, dict[float, tuple[Estimate, float]]]
"""{case: {λ: (validation loss over the fresh seeds, η_A)}}, of finite runs."""


@dataclass(frozen=True)
class Decoder(TunedArms):
    """LoRA against LoRA+ on language modelling with small decoders, and the best λ at each width."""

    widths: tuple[int, ...] = (32, 64, 128, small_decoders.WIDEST)
    domains: tuple[str, ...] = ("movies",)
    steps: int = 300
    batch: int = 16
    rank: int = 8
    alpha: float = 16.0

    name = "decoder"
    title, claims, scales = DESCRIPTIONS[name]
    assets = ("rated-snippets", "verses")
    every_ratio = True
    has_accuracy = False
    first_step = 16

    def cases(self) -> list[Case]:
        return [{"domain": domain, "width": width} for domain in self.domains for width in self.widths]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "targets": ["q_proj", "v_proj"],
            "schedule": "linear",
            "warmup": WARMUP,
            "max_length": small_tasks.LENGTH,
            "held_out": small_tasks.HELD_OUT,
        }

    def needs(self) -> list[str]:
        family = ", ".join(str(width) for width in self.widths if width != small_decoders.WIDEST)
        needed = [f"decoders of width {family}, pre-trained on first use in some minutes each"]
        if small_decoders.WIDEST in self.widths:
            folder = small_decoders.folder_of(Path(self.data), small_decoders.WIDEST)
            needed.append(
                f"the decoder of 4.2 M parameters in {folder}: a copy of examples/decoder, else built (21 min)"
            )
        return needed

    def train(self, job: Job, on_step: OnStep) -> Record:
        data = Path(self.data)
        width = int(job.case["width"])
        task = small_tasks.load(data, f"lm-{job.case['domain']}", width)
        model = build(small_decoders.obtain(data, width), task, SmallAdapter(self.rank, self.alpha), job.seed)
        return train(
            model, task, job.lr, job.lr_ratio, steps=self.steps, order=batches(task.train.ids, self.batch, job.seed),
            evaluations=job.evaluations, on_step=on_step,
        )  # fmt: skip

    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        by_ratio = self._by_ratio(results)
        return Report(
            verdict=[*self._best_ratios(results), *verdicts(figures, TEST_LOSS, "nats a token", lower_is_better=True)],
            parts=[
                self.table_of_arms(figures), self.table_of_differences(figures), self._table_of_ratios(by_ratio),
                *self._plot_of_ratios(by_ratio), *self.maps(results), *self.curves(results, figures),
            ],
            method=[
                f"Adapters of rank {self.rank} and α {self.alpha:g} on query and value layers; {self.steps} steps of "
                f"{self.batch} texts, linear schedule.",
                HOW_TUNED,
            ],
            limits=["Widths from 32 to 256 are far below those of the models that the paper trains."],
            headline=headline(figures, TEST_LOSS, lower_is_better=True),
        )  # fmt: skip

    def _best_ratios(self, results: Records) -> list[str]:
        """The λ of the lowest mean over the fresh seeds, and whether that differs from λ = 1."""
        sentences = []
        for case in self.cases():
            if not self.is_finished(case, results):
                continue
            losses = {
                point: [result.values[LOSS] for result in self.finals(case, point, results)]
                for point in self.finalists(case, results).values()
            }
            best, tied = min(losses, key=lambda point: sum(losses[point])), min(losses)
            text = f"{title(case)}: λ = {best[0]:g} has the lowest mean over the fresh seeds"
            gap = finite_t_interval([a - b for a, b in zip(losses[best], losses[tied], strict=True)])
            if gap is not None and best != tied:
                text += f", {gap.mean:+.4f} off λ = 1 (95% interval {gap.low:+.4f} to {gap.high:+.4f})"
                text += "" if gap.excludes_zero else ": no difference found"
            sentences.append(text + ".")
        return sentences

    def _by_ratio(self, results: Records) -> ByRatio:
        by_ratio: ByRatio = {}
        for case in self.cases():
            if not self.is_finished(case, results):
                continue
            for point in sorted(self.finalists(case, results).values()):
                estimate = finite_t_interval([result.values[LOSS] for result in self.finals(case, point, results)])
                if estimate is not None:
                    by_ratio.setdefault(title(case), {})[point[0]] = estimate, lr_of(point)
        return by_ratio

    def _table_of_ratios(self, by_ratio: ByRatio) -> Table:
        rows = [
            [case, ratio, lr, interval(estimate.to_dict(), 4)]
            for case, ratios in by_ratio.items()
            for ratio, (estimate, lr) in ratios.items()
        ]
        return Table("The best rate of every λ", ["case", "λ", "η_A", "validation loss"], rows)

    def _plot_of_ratios(self, by_ratio: ByRatio) -> list[Figure]:
        series = []
        for case, ratios in by_ratio.items():
            means = [estimate.mean for estimate, _ in ratios.values()]
            series.append(Series(case, list(ratios), [mean / min(means) for mean in means]))
        plot = LinePlot("", "λ = η_B/η_A", "validation loss over the best", series, log_x=True)
        return [Figure("ratio-by-width", "Loss at the best rate of every λ, by width", [plot])] if series else []
