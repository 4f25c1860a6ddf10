"""Forms in which a layer may use its weight. The witness is the gradient: what meets an input of 0 has none."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
import torch.nn.functional as fn
from torch import matmul as times
from torch import nn
from torch.nn import functional as F

from loraplus.adapters.orientation import input_side

IN, OUT, EXPERTS = 6, 10, 3


def run(x, weight):
    return x @ weight


def turned(weight):
    return weight.transpose(-2, -1)


def run_layer(layer, x):
    return x @ layer.w


def with_default(x, weight=None):
    return F.linear(x, weight=weight)


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


class Matrix(nn.Module):
    """x (tokens, in) → (tokens, out), by a weight of two dimensions."""

    shape = (IN, OUT)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(self.shape))


class Rows(Matrix):
    shape = (OUT, IN)


class Experts(Matrix):
    """The sum over experts of three dimensions."""

    shape = (EXPERTS, IN, OUT)


class ExpertRows(Matrix):
    shape = (EXPERTS, OUT, IN)


FORMS: list[type[nn.Module]] = []


def form(base, **others):
    """A layer whose forward is the decorated function."""

    def make(forward):
        FORMS.append(type(forward.__name__, (base,), {"forward": forward, **others}))
        return forward

    return make


@form(Experts)
def comprehension(self, x):
    return sum([x @ w for w in self.w])


@form(ExpertRows)
def generator(self, x):
    return sum(F.linear(x, self.w[i]) for i in range(EXPERTS))


@form(Experts)
def zipped(self, x):
    return sum(part @ w for part, w in zip([x, x, x], self.w.unbind(0), strict=True))


@form(Experts)
def stacked(self, x):
    return torch.stack([x @ self.w[i] for i in range(len(self.w))]).sum(0)


@form(ExpertRows)
def loop_that_collects(self, x):
    weights = []
    for i in range(EXPERTS):
        weights.append(self.w[i].transpose(0, 1))
    return sum(x @ w for w in weights)


@form(ExpertRows)
def mapped(self, x):
    return sum(map(lambda w: x @ w.t(), self.w))  # noqa: C417


@form(Experts)
def enumerated(self, x):
    return sum(x @ self.w[i].squeeze() for i, _ in enumerate(self.w))


@form(Rows)
def tensordot_of_two_places(self, x):
    return torch.tensordot(x, self.w, dims=([1], [1]))


@form(Matrix)
def tensordot_of_a_number(self, x):
    return torch.tensordot(x, self.w, 1)


@form(Matrix)
def tensordot_from_the_left(self, x):
    return torch.tensordot(self.w, x, dims=([0], [-1])).t()


@form(Matrix)
def operands_by_keyword(self, x):
    return torch.matmul(input=x, other=self.w)


@form(Matrix)
def operands_by_keyword_the_other_way_round(self, x):
    return torch.mm(mat2=self.w, input=x)


@form(Rows)
def linear_by_keyword(self, x):
    return torch.nn.functional.linear(input=x, weight=self.w)


@form(Matrix)
def addmm_by_keyword(self, x):
    return torch.addmm(torch.zeros(OUT), mat1=x, mat2=self.w)


@form(Matrix)
def helper(self, x):
    return run(x, self.w)


@form(Rows)
def helper_of_a_turned_weight(self, x):
    return run(x, weight=turned(self.w))


@form(Matrix)
def helper_that_gets_the_layer(self, x):
    return run_layer(self, x)


@form(Rows)
def helper_with_a_keyword(self, x):
    return with_default(x, weight=self.w)


@form(Matrix)
def by_getattr(self, x):
    return x @ getattr(self, "w")  # noqa: B009


@form(Matrix)
def from_the_dict_of_parameters(self, x):
    return x @ self._parameters["w"]


@form(Matrix)
def by_get_parameter(self, x):
    return x @ self.get_parameter("w")


@form(Matrix)
def first_argument_of_another_name(this, x):
    return x @ this.w


@form(Matrix)
def scaled(self, x):
    return x @ (self.w * 1.0)


@form(Rows)
def scaled_and_turned(self, x):
    return x @ (2.0 * self.w.to(x.dtype) + 0.0).T


@form(Matrix)
def negated(self, x):
    return -x @ -self.w


@form(Matrix)
def through_a_tuple(self, x):
    other, (weight, _) = x, (self.w, 0)
    return other @ weight


@form(Rows)
def through_a_dict(self, x):
    held = {"weight": self.w, "x": x}
    return F.linear(held["x"], held["weight"])


@form(Rows)
def through_an_entry(self, x):
    held = {}
    held["weight"] = self.w
    return F.linear(x, held.get("weight"))


@form(Matrix)
def through_starred_arguments(self, x):
    pair = (x, self.w)
    return torch.matmul(*pair)


@form(Matrix)
def through_keyword_arguments(self, x):
    options = {"weight": self.w}
    return run(x, **options)


@form(Matrix)
def nested_function(self, x):
    def inner(value):
        return value @ weight

    weight = self.w
    return inner(x)


@form(Matrix)
def nested_function_with_a_default(self, x):
    def inner(value, weight=self.w):
        return value @ weight

    return inner(x)


@form(Rows)
def called_lambda(self, x):
    return (lambda value, weight: F.linear(value, weight))(x, self.w)


@form(Rows)
def walrus(self, x):
    return x @ w.T if (w := self.w) is not None else x


@form(Matrix)
def conditional(self, x):
    weight = self.w if x.is_floating_point() else self.w.double()
    return x @ weight


@form(Matrix)
def branches_that_agree(self, x):
    if x.requires_grad:  # noqa: SIM108
        out = torch.mm(x, self.w)
    else:
        out = x.matmul(self.w)
    return out


@form(Matrix)
def tried(self, x):
    try:
        weight = self.w
    except AttributeError:
        weight = None
    return x @ weight


@form(Rows)
def matched(self, x):
    match x.ndim:
        case 2:
            weight = self.w.t()
        case _:
            weight = self.w.mT
    return x @ weight


@form(ExpertRows)
def an_order_in_a_variable(self, x):
    order = (0, 2, 1)
    return (x @ self.w.permute(*order)).sum(0)


@form(Experts)
def a_dict_of_experts(self, x):
    weights = {i: self.w[i] for i in range(EXPERTS)}
    return sum(x @ w for _, w in weights.items())


@form(Rows)
def one_row_at_a_time(self, x):
    return torch.stack([self.w @ row for row in x])


@form(Matrix)
def partial(self, x):
    return functools.partial(torch.matmul, other=self.w)(x)


OPERATIONS = {"matmul": torch.matmul}


@form(Matrix)
def by_a_table(self, x):
    return OPERATIONS["matmul"](x, self.w)


@form(Experts)
def mapped_by_torch(self, x):
    return torch.vmap(lambda w: x @ w)(self.w).sum(0)


@form(Experts)
def routed(self, x):
    """As layers of experts are written: sizes, masks and tokens are the input's to say."""
    tokens, width = x.shape
    result = torch.zeros((tokens, OUT), dtype=x.dtype, device=x.device)
    chosen = nn.functional.one_hot(torch.arange(tokens) % EXPERTS, num_classes=EXPERTS)
    for expert in chosen.sum(0).nonzero():
        (token,) = torch.where(chosen[:, expert[0]])
        if token.shape[0] == 0:
            continue
        result.index_add_(0, token, x[token].reshape(-1, width) @ self.w[expert[0]])
    return result


@form(Matrix)
def of_the_operator_module(self, x):
    return operator.matmul(x, self.w)


@form(Matrix)
def of_the_tensor_class(self, x):
    return torch.Tensor.matmul(x, self.w)


@form(Matrix)
def under_another_name(self, x):
    return times(x, self.w) + fn.relu(x).sum() * 0


@form(Matrix)
def with_an_import_inside(self, x):
    from torch import mm as multiply

    return multiply(x, self.w)


@form(Matrix)
def autograd_function(self, x):
    return Multiply.apply(x, self.w)


@form(Matrix)
def checkpointed(self, x):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(run, x, self.w, use_reentrant=False)


@form(Rows)
def einsum_of_a_list(self, x):
    return torch.einsum("bi,oi->bo", [x, self.w])


@form(Matrix)
def einsum_without_a_result(self, x):
    return torch.einsum("bi,io", x, self.w)


@form(Experts)
def einsum_with_dots(self, x):
    return torch.einsum("...i,eio->...o", x, self.w)


@form(Matrix)
def broadcast_and_sum(self, x):
    return (x.unsqueeze(-1) * self.w).sum(-2)


@form(Rows)
def broadcast_and_sum_of_rows(self, x):
    return (x[:, None, :] * self.w).sum(dim=-1)


@form(Rows)
def multiplied_in_a_chain(self, x):
    return torch.linalg.multi_dot([x, self.w.mT])


@form(Experts)
def a_permute_that_changes_nothing(self, x):
    return torch.bmm(x.expand(EXPERTS, -1, -1), self.w.permute(0, 1, 2)).sum(0)


@form(ExpertRows)
def a_permute_that_turns(self, x):
    return torch.bmm(x.expand(EXPERTS, -1, -1), self.w.permute(0, 2, 1)).sum(0)


@form(ExpertRows)
def a_permute_of_one_argument(self, x):
    return (x @ torch.permute(self.w, (0, -1, -2))).sum(0)


@form(Experts)
def a_transpose_of_experts(self, x):
    by_input = self.w.transpose(0, 1)  # (in, experts, out)
    return sum(x @ by_input[:, i] for i in range(EXPERTS))


@form(ExpertRows)
def a_transpose_of_experts_and_one_of_sides(self, x):
    return (x @ self.w.transpose(1, 2)).sum(0)


@form(ExpertRows)
def a_transpose_by_keyword(self, x):
    return (x @ torch.transpose(self.w, dim0=1, dim1=-1)).sum(0)


@form(ExpertRows)
def swapped_axes(self, x):
    return (x @ self.w.swapaxes(-1, -2)).sum(0)


@form(ExpertRows)
def moved_dimension(self, x):
    return (x @ self.w.movedim(1, 2)).sum(0)


@form(ExpertRows)
def moved_to_the_front(self, x):
    return (x @ torch.movedim(self.w, -1, 0).permute(1, 0, 2)).sum(0)


@form(Experts)
def turned_twice(self, x):
    return (x @ self.w.mT.transpose(-1, -2)).sum(0)


@form(Matrix)
def a_transpose_of_a_new_dimension(self, x):
    return (x @ self.w.unsqueeze(0).transpose(0, 0))[0]


@form(Experts)
def halves(self, x):
    gate, up = self.w.chunk(2, dim=-1)
    return torch.cat([x @ gate, x @ up], dim=-1).sum(0)


@form(ExpertRows)
def sliced(self, x):
    return sum(F.linear(x, self.w[i, :, :]) for i in range(EXPERTS)) + F.linear(x, self.w[0][..., :])


def _prepare(self):
    self.cached = self.w.t()


@form(Rows, prepare=_prepare)
def through_an_attribute(self, x):
    self.prepare()
    return x @ self.cached


def _init(self):
    Rows.__init__(self)
    self.alias = (self.w,)


@form(Rows, __init__=_init)
def through_an_attribute_since_the_start(self, x):
    return F.linear(x, self.alias[0])


def _weight(self):
    return self.w.T


@form(Rows, weight=property(_weight))
def through_a_property(self, x):
    return x @ self.weight


@form(Matrix, product=staticmethod(run))
def static_method(self, x):
    return self.product(x, self.w)


class ThroughSuper(Matrix):
    def forward(self, x):
        return x @ self.w


class AsInherited(ThroughSuper):
    def forward(self, x):
        return super().forward(x * 2)


FORMS += [AsInherited]


def side_of_the_input(layer: nn.Module) -> int:
    x = torch.randn(4, IN)
    x[:, 0] = 0
    out = layer(x)
    (out * torch.randn_like(out)).sum().backward()
    gradient = layer.w.grad
    assert gradient.any()
    met = [side for side in (-1, -2) if not gradient.select(side, 0).any()]
    assert len(met) == 1
    return met[0]


@pytest.mark.parametrize("layer", FORMS, ids=lambda layer: layer.__name__)
def test_the_code_says_which_side_meets_the_input(layer):
    torch.manual_seed(0)
    built = layer()
    assert input_side(layer, "w", built.w.ndim) == side_of_the_input(built)


class CallsItself(Rows):
    def halve(self, x, weight, depth):
        def inner():
            return self.halve(x, weight, depth - 1), inner

        return inner()[0] if depth else F.linear(x, weight)

    def forward(self, x):
        return self.halve(x, self.w, 2)


def test_functions_that_call_themselves_are_read_once():
    assert input_side(CallsItself, "w", 2) == side_of_the_input(CallsItself())


class ByAnotherObject(Matrix):
    def forward(self, x):
        return self.operation(x, self.w)


class TurnedByAnUnknown(Experts):
    order = None

    def forward(self, x):
        return x @ self.w.permute(*self.order)


class SwappedByAnUnknown(Experts):
    def forward(self, x, first, second):
        return x @ self.w.transpose(first, second)


class BothWays(Matrix):
    def forward(self, x, back=False):
        return x @ (self.w.T if back else self.w)


class Tied(Matrix):
    """Reads and writes by the same weight."""

    def forward(self, x):
        return (x @ self.w).relu() @ self.w.T


class Unused(Matrix):
    def forward(self, x):
        return x


@pytest.mark.parametrize("layer", [ByAnotherObject, TurnedByAnUnknown, SwappedByAnUnknown, BothWays, Tied, Unused])
def test_what_the_code_does_not_say_is_not_guessed(layer):
    assert input_side(layer, "w", len(layer.shape)) is None


class WouldWaitForOthers(Matrix):
    """Only this process may be looking, so the code goes no further than here."""

    def forward(self, x):
        torch.distributed.barrier()
        return x @ self.w


class DrawsAndPrints(Matrix):
    calls = 0

    def forward(self, x):
        x = x + torch.rand(3).sum()
        self.calls += 1
        return x @ self.w


def test_looking_at_code_sends_nothing_and_changes_nothing():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        assert input_side(WouldWaitForOthers, "w", 2) is None
    finally:
        torch.distributed.destroy_process_group()
    before = torch.get_rng_state()
    assert input_side(DrawsAndPrints, "w", 2) == -2
    assert torch.equal(before, torch.get_rng_state()) and DrawsAndPrints.calls == 0


def test_a_turn_that_depends_on_the_number_of_dimensions_is_read_where_that_is_known():
    layer = next(made for made in FORMS if made.__name__ == "a_transpose_of_experts")
    assert input_side(layer, "w", 3) == -2 and input_side(layer, "w") is None


def test_what_other_methods_do_with_the_weight_does_not_count_beside_forward():
    class Merging(Matrix):
        def merge(self, other):
            return self.w.T @ other

        def forward(self, x):
            return x @ self.w

    assert input_side(Merging, "w", 2) == -2
