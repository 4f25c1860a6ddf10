"""Two processes: DDP in its kinds, and FSDP2 in its."""

from __future__ import annotations

import ranks
import torch
from torch import nn

from loraplus.speed import slow_down, speed_up
from speed.models import adapted, apart, batch_of, gradients


def _own_batch(family):
    return batch_of(family, seed=torch.distributed.get_rank())


def _ddp(family, **options):
    def gradients_of(fast):
        model = adapted(family, {"lora_dropout": 0.1})
        if fast:
            speed_up(model)
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        torch.manual_seed(0)
        for _ in range(2):
            out = wrapped(**_own_batch(family))
            loss = out.loss + out.logits.float().pow(2).mean()
            loss.backward()
        return gradients(model)

    return apart(gradients_of(True), gradients_of(False))


def _fsdp(family, parts, reshard):
    from torch.distributed.fsdp import fully_shard

    def gradients_of(fast):
        model = adapted(family).float()
        if fast == "before":
            speed_up(model)
        for name in reversed(parts(model)):  # inner ones first
            fully_shard(model.get_submodule(name), reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        if fast == "after":
            speed_up(model)
        for _ in range(2):
            out = model(**_own_batch(family))
            loss = out.loss + out.logits.float().pow(2).mean()
            loss.backward()
        found = {name: value.full_tensor() for name, value in gradients(model).items()}
        if fast:
            slow_down(model)
            again = model(**_own_batch(family)).loss
            assert torch.allclose(again, out.loss, rtol=1e-5)
            speed_up(model)
            again = model(**_own_batch(family)).loss
            assert torch.allclose(again, out.loss, rtol=1e-5)
        return found

    plain = gradients_of(None)
    return max(apart(gradients_of(when), plain) for when in ("before", "after"))


def all_of_it():
    found = {}
    for family in ("bert", "llama"):
        found[family, "ddp"] = _ddp(family)
        found[family, "ddp, unused parameters"] = _ddp(family, find_unused_parameters=True)
        found[family, "ddp, static graph"] = _ddp(family, static_graph=True)
        for kind, kinds in {
            "whole": (), "layers": ("BertLayer", "LlamaDecoderLayer"),
            "all parts": ("BertEmbeddings", "BertSelfAttention", "BertLayer", "LlamaMLP", "LlamaDecoderLayer"),
        }.items():  # fmt: skip

            def parts(model, kinds=kinds):
                return [name for name, module in model.named_modules() if type(module).__name__ in kinds]

            for reshard in (True, False) if kind == "all parts" else (True,):
                found[family, f"fsdp, {kind}, reshard={reshard}"] = _fsdp(family, parts, reshard)
    return found


def test_gradients_are_those_of_peft_in_two_processes(tmp_path):
    for found in ranks.run(all_of_it, tmp_path):
        assert len(found) == 14
        assert {name: apart_ for name, apart_ in found.items() if not apart_ < 1e-5} == {}
