"""Trains one adapter in several processes (torchrun, accelerate launch), as one process would with the same batches.

Each batch of the run is cut into one part a process. The loss of a process is weighted by the size of its part,

    w = processes · |part| / |batch|,

so that the mean over processes, which DDP takes of the gradients, is the mean over the batch even where the parts are
not equal: at the end of an epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from loraplus.integrations.transformers import LoraPlusTrainer
from loraplus.tasks.token_rows import TokenRows

_WEIGHT = "batch_weight"
_BATCHES_SORTED = 50  # at a time, as in transformers
_SAME_PASS = 1e-6  # the number of passes done is a float
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo", "NCCL")


def processes() -> int:
    """How many processes the launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Waits until every process has come here. With one process it returns at once."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def any_process(flag: bool, args: Any) -> bool:
    """Whether the flag is set in at least one process; the same answer in all, so that all stop at the same step."""
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=args.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of this run has ended."""
    return processes() > 1 and (
        isinstance(error, torch.distributed.DistError)
        or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST))
    )


class PartsOfBatches(BatchSampler):
    """This process's part of every batch, as (index, weight); a process without an example gets one of weight 0.

    All processes take the main one's order, since their own random numbers may differ.

    Args:
        order: gives the indices of one pass.
        batch_size: examples of a batch, over all processes.
        rank, ranks: which part.
    """

    def __init__(self, order: OrderByPass, batch_size: int, rank: int, ranks: int) -> None:
        super().__init__(order, batch_size, drop_last=False)
        self._rank, self._ranks = rank, ranks

    def __iter__(self) -> Iterator[list[Any]]:
        order = [list(self.sampler)]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(order, src=0)
        (indices,) = order
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            part = batch[self._rank :: self._ranks]
            weight = self._ranks * len(part) / len(batch)
            yield [(index, weight) for index in part or batch[:1]]


class _Weighted(Dataset):
    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: tuple[int, float]) -> tuple[Any, float]:
        return self._rows[at[0]], at[1]


class OrderByPass(Sampler[int]):
    """Batches of like length. A seed fixes their order, which is drawn.

    transformers' LengthGroupedSampler sorts each part of a pass by length and leaves its batches sorted, so that a
    short run can end on the shortest texts alone. Here the batches of a part are shuffled, and the smaller batch that
    a pass may end with holds rows of any length. The batch with the longest row comes first: if memory does not
    suffice, that shows at the first step. A pass is laid out a part at a time, so that one over millions of rows holds
    one number a row.

    Args:
        lengths: of the rows, in tokens, (rows,).
        batch_size: of an optimizer step.
        seed: asked for when a pass begins.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: Callable[[], int]) -> None:
        self._lengths, self._batch_size, self._seed = np.asarray(lengths), batch_size, seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed())
        rows = torch.randperm(len(self), generator=generator).numpy()
        size = self._batch_size * max(1, min(len(rows) // (self._batch_size * 4), _BATCHES_SORTED))
        end = len(rows) // self._batch_size * self._batch_size
        whole, rest = rows[:end], rows[end:]  # views, as all below: everything is done in place
        for start in range(0, end, size):
            part = whole[start : start + size]
            self._sort(part)
            batches = part.reshape(-1, self._batch_size)
            batches[:] = batches[torch.randperm(len(batches), generator=generator).numpy()]
        self._sort(rest)
        self._put_longest_first(rows)
        for start in range(0, len(rows), size):
            yield from rows[start : start + size].tolist()

    def _sort(self, rows: np.ndarray) -> None:
        rows[:] = rows[np.argsort(-self._lengths[rows], kind="stable")]

    def _put_longest_first(self, rows: np.ndarray) -> None:
        """Exchanges the first rows and the batch that begins with the longest; every batch is sorted.

        Of several that begin with rows of that length it is the one whose last row is the longest.
        """
        if not len(rows):
            return
        heads = self._lengths[rows[:: self._batch_size]]
        starts = np.flatnonzero(heads == heads.max()) * self._batch_size
        ends = np.minimum(starts + self._batch_size, len(rows))
        start = starts[np.argmax(self._lengths[rows[ends - 1]])]
        batch = rows[start : start + self._batch_size].copy()
        rows[start : start + len(batch)] = rows[: len(batch)]
        rows[: len(batch)] = batch


class DataParallelTrainer(LoraPlusTrainer):
    """LoraPlusTrainer whose rows come in an order that the seed alone fixes, shared out among the processes."""

    _anew = "--overwrite starts the run again"
    _only_ours = True

    def get_train_dataloader(self) -> DataLoader:
        """The batches of one process with `processes()` times the batch size, this process's part of each."""
        ranks = self.args.world_size
        if ranks == 1:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        batch_size = self._train_batch_size * ranks
        order = self.order(rows, batch_size * self.args.gradient_accumulation_steps)
        collator = self.data_collator

        def collate(part: list[tuple[Any, float]]) -> dict[str, Any]:
            return self.weighted(collator([row for row, _ in part]), part[0][1])

        parts = PartsOfBatches(order, batch_size, self.args.process_index, ranks)
        return DataLoader(_Weighted(rows), batch_sampler=parts, collate_fn=collate)

    def order(self, rows: object, batch_size: int) -> OrderByPass:
        """The order of a pass, from its number and the seed alone, so that a run resumed within it finds it again."""
        return OrderByPass(
            self.lengths(rows), batch_size, lambda: self.args.seed + int((self.state.epoch or 0.0) + _SAME_PASS)
        )

    def lengths(self, rows: Any) -> Sequence[int] | np.ndarray:
        """Tokens of each row, (rows,)."""
        return rows.lengths if isinstance(rows, TokenRows) else [len(row["input_ids"]) for row in rows]

    def _get_train_sampler(self, train_dataset: object = None) -> OrderByPass:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return self.order(rows, self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def weighted(self, part: dict[str, Any], weight: float) -> dict[str, Any]:
        """A part of a batch as it counts in the mean over the processes."""
        return {**part, _WEIGHT: weight}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All of the validation data, in every process: a mean over uneven shares is not one process's."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        return self._in_order(self.eval_dataset if eval_dataset is None else eval_dataset)

    def answers(self, rows: object) -> Any:
        """What the model gives for rows, in their order and whole in every process, with the metrics.

        `predict` would give them in an order of lengths, and each process its own share.
        """
        return self.evaluation_loop(self._in_order(rows), "answers", prediction_loss_only=False)

    def _in_order(self, rows: Any) -> DataLoader:
        loader = DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, each process by itself."""
        if self.args.world_size > 1:
            self.gather_function = self._own_results
        return super().evaluation_loop(*args, **kwargs)

    def _own_results(self, values: torch.Tensor, **_: object) -> torch.Tensor:
        """This process's results (batch, …), without the rows that only fill a last batch up."""
        state = self.accelerator.gradient_state  # as in one process: a last batch counts by its own size
        return values[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else values

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss, weighted in training."""
        weight = inputs.pop(_WEIGHT, None)
        loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weight is None:
            return loss
        return (loss[0] * weight, loss[1]) if return_outputs else loss * weight
