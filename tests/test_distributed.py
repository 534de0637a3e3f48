"""Split over processes, samples are those of one device: plain parts, with Gloo on the CPU."""

import itertools

import pytest
import torch
import torch.distributed as dist
from oracle import DTYPES
from processes import WORLD

import gumbel_ext
from gumbel_ext import distributed
from gumbel_ext.distributed import Shard


def whole_sample(logits, tau, hard, dim, mask, weight, state):
    """On one device: y, index, gradients of logits and tau."""
    leaf = logits.clone().requires_grad_()
    tau = tau.clone().requires_grad_()
    y, index = gumbel_ext.gumbel_softmax(
        leaf, tau, hard, dim=dim, mask=mask, return_index=True, rng_state=state
    )
    (y * weight).sum().backward()
    return y.detach(), index, leaf.grad, tau.grad


def cut(tensor, dims, places):
    for d, (offset, size) in zip(dims, places, strict=True):
        if tensor.shape[d] != 1:
            tensor = tensor.narrow(d, offset, size)
    return tensor


def part_of_chunks(size, rank, world):
    """Offset and size of the part that torch.chunk gives."""
    step = -(-size // world)
    offset = min(rank * step, size)
    return offset, min(step, size - offset)


class CountedReductions:
    """Counts what is sent."""

    def __enter__(self):
        self.calls, self.elements = 0, 0
        self.all_reduce = dist.all_reduce
        dist.all_reduce = self.count
        return self

    def count(self, tensor, *args, **kwargs):
        self.calls += 1
        self.elements += tensor.numel()
        return self.all_reduce(tensor, *args, **kwargs)

    def __exit__(self, *_):
        dist.all_reduce = self.all_reduce


# ---- rows split over processes ------------------------------------------------------------------


def examples_case(rank, world, shape, dims, dim, dtype, hard, tau_rows, masked):
    logits, weight = torch.randn(2, *shape).to(dtype)
    state = torch.tensor([1234567890123, 77])
    mask = torch.rand(shape) < 0.6 if masked else None
    if masked:
        mask.select(dims[0], 1).fill_(False)
    reduced = [1 if d == dim else n for d, n in enumerate(shape)]
    tau = 0.5 + torch.rand(reduced) if tau_rows else torch.tensor(0.7)
    y, index, grad, grad_tau = whole_sample(logits, tau, hard, dim, mask, weight, state)

    # The ranks are the cells of a grid over the split dimensions.
    grid = [world] if len(dims) == 1 else [2, world // 2]
    place = [rank] if len(dims) == 1 else [rank // grid[1], rank % grid[1]]
    places = [part_of_chunks(shape[d], p, n) for d, p, n in zip(dims, place, grid, strict=True)]
    shards = [
        Shard(d, offset=offset, size=shape[d]) for d, (offset, _) in zip(dims, places, strict=True)
    ]
    leaf = cut(logits, dims, places).clone().requires_grad_()
    own_tau = cut(tau, dims, places).clone().requires_grad_() if tau_rows else tau
    own_mask = None if mask is None else cut(mask, dims, places)
    with CountedReductions() as sent:
        own_y, own_index = distributed.gumbel_softmax(
            leaf,
            own_tau,
            hard,
            dim,
            shards=shards,
            mask=own_mask,
            return_index=True,
            rng_state=state,
        )
        (own_y * cut(weight, dims, places)).sum().backward()
        only = distributed.gumbel_argmax(
            leaf, dim, keepdim=True, shards=shards, mask=own_mask, rng_state=state
        )
    assert sent.calls == 0
    assert torch.equal(own_y, cut(y, dims, places))
    expected = cut(index.unsqueeze(dim), dims, places)
    assert torch.equal(own_index, expected.squeeze(dim))
    assert torch.equal(only, expected)
    assert torch.equal(leaf.grad, cut(grad, dims, places))
    if tau_rows:
        assert torch.equal(own_tau.grad, cut(grad_tau, dims, places))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("shape", "dims", "dim"),
    [
        ((8, 3, 37), (0,), 2),
        ((6, 7, 37), (1,), 2),
        ((6, 7, 9, 33), (1, 2), 3),
        ((4, 21, 5, 40), (0,), 1),
        ((2, 21, 9, 40), (2,), 1),
        ((2, 21, 5, 43), (2, 3), 1),
        ((2, 21, 5), (2,), 1),
    ],
    ids=str,
)
@pytest.mark.feature(
    "rows split over processes",
    ops=("gumbel_softmax", "gumbel_argmax"),
    modes=("eager",),
)
def test_rows_split_over_processes(ranks, hard, shape, dims, dim, masked, dtype):
    """Bit for bit: values, index, gradients; even and uneven parts; nothing is sent."""
    ranks.run(examples_case, shape, dims, dim, dtype, hard, dtype == torch.float64, masked)


def one_seed_case(rank, world, hard):
    torch.manual_seed(5)
    batch = torch.randn(4, 30)
    torch.manual_seed(9)
    own = distributed.gumbel_softmax(batch, 0.5, hard, shards=Shard(0))
    noise = distributed.gumbel_noise((4, 30), shards=Shard(0))
    after = torch.rand(())
    torch.manual_seed(9)
    whole = gumbel_ext.gumbel_softmax(batch.repeat(world, 1), 0.5, hard)
    assert torch.equal(own, whole[4 * rank : 4 * rank + 4])
    assert torch.equal(noise, gumbel_ext.gumbel_noise((4 * world, 30))[4 * rank : 4 * rank + 4])
    assert torch.equal(after, torch.rand(()))
    return own


@pytest.mark.feature(
    "data parallel: different noise from one seed",
    ops=("gumbel_softmax", "gumbel_noise"),
    modes=("eager",),
)
def test_ranks_draw_different_noise_from_one_seed(ranks, hard):
    """Together they draw what one device would, and leave their generators in one state."""
    for a, b in itertools.combinations(ranks.run(one_seed_case, hard), 2):
        assert not torch.equal(a, b)


# ---- classes split over processes ---------------------------------------------------------------

SPECIAL = {"plain", "masked", "special"}


def special_rows(logits, dim):
    """Rows of each kind: a NaN, all -inf, half -inf, a tie."""
    rows = logits.movedim(dim, -1)
    if rows.dim() > 1:
        flat = rows.reshape(-1, rows.shape[-1]).clone()
        flat[0, flat.shape[1] // 2 :: 3] = torch.nan
        flat[1] = -torch.inf
        flat[2, ::2] = -torch.inf
        return flat.view(rows.shape).movedim(-1, dim).contiguous()
    return logits


def classes_case(rank, world, shape, dim, dtype, hard, kind, places):
    logits, weight = torch.randn(2, *shape).to(dtype)
    state = torch.tensor([-987654321, 3])
    mask = None
    if kind == "masked":
        mask = torch.rand(shape) < 0.5
        mask = mask.movedim(dim, -1).clone()
        mask[(0,) * (len(shape) - 1)] = False
        mask = mask.movedim(-1, dim)
        # A row that the mask forbids has no gradient, whatever comes in.
        weight.movedim(dim, -1)[(0,) * (len(shape) - 1)] = torch.inf
    if kind == "special":
        logits = special_rows(logits, dim)
    reduced = [1 if d == dim else n for d, n in enumerate(shape)]
    tau = 0.5 + torch.rand(reduced) if kind == "plain" else torch.tensor(0.6)
    y, index, grad, grad_tau = whole_sample(logits, tau, hard, dim, mask, weight, state)

    offset, size = places[rank]
    shard = Shard(dim, offset=offset, size=shape[dim])
    leaf = logits.narrow(dim, offset, size).clone().requires_grad_()
    own_tau = tau.clone().requires_grad_()
    own_mask = None if mask is None else mask.narrow(dim, offset, size)
    with CountedReductions() as forward:
        own_y, own_index = distributed.gumbel_softmax(
            leaf,
            own_tau,
            hard,
            dim,
            shards=shard,
            mask=own_mask,
            return_index=True,
            rng_state=state,
        )
    with CountedReductions() as backward:
        (own_y * weight.narrow(dim, offset, size)).sum().backward()
    only = distributed.gumbel_argmax(leaf, dim, shards=shard, mask=own_mask, rng_state=state)

    # Two small sums each; the third is that of the gradient of tau.
    assert (forward.calls, backward.calls) == (2, 3)
    rows = index.numel()
    assert forward.elements + backward.elements <= rows * (
        4 * (shape[dim] // 1024 + world + 1) + world + 2
    )
    assert torch.equal(own_index, index)
    assert torch.equal(only, index)
    expected = y.narrow(dim, offset, size), grad.narrow(dim, offset, size), grad_tau
    actual = own_y.detach(), leaf.grad, own_tau.grad
    if hard or all(offset % 1024 == 0 for offset, _ in places):
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0, equal_nan=True)
    if all(offset % 1024 == 0 for offset, _ in places):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        return
    # The sum that divides a row is rounded in another order.
    eps = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(
        actual[0], expected[0], rtol=max(eps, 4 * wide), atol=0, equal_nan=True
    )
    bound = eps + 64 * wide
    torch.testing.assert_close(actual[1:], expected[1:], rtol=bound, atol=bound, equal_nan=True)


def even(size, world=WORLD):
    return [part_of_chunks(size, rank, world) for rank in range(world)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(SPECIAL))
@pytest.mark.parametrize(
    ("shape", "dim", "places"),
    [
        ((5, 4096), 1, even(4096)),
        ((5, 3500), 1, [(0, 1024), (1024, 2048), (3072, 428), (3500, 0)]),
        ((3, 2, 37), 2, even(37)),
        ((3, 2, 5), 2, even(5)),
        ((3, 9000), 1, even(9000)),
        ((9, 4096, 3), 1, even(4096)),
        ((2, 50, 17), 1, even(50)),
    ],
    ids=str,
)
@pytest.mark.feature(
    "classes split over processes",
    ops=("gumbel_softmax", "gumbel_argmax"),
    modes=("eager",),
)
def test_classes_split_over_processes(ranks, hard, shape, dim, places, kind, dtype):
    """Index and one-hot bit for bit; soft values and gradients too, of shards of whole chunks."""
    ranks.run(classes_case, shape, dim, dtype, hard, kind, places)


def both_case(rank, world, hard):
    shape, state = (6, 5, 3000), torch.tensor([3, 1])
    logits, weight = torch.randn(2, *shape)
    y, index, grad, _ = whole_sample(logits, torch.tensor(0.5), hard, 2, None, weight, state)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    row, column = rank // 2, rank % 2
    window = (slice(3 * row, 3 * row + 3), slice(None), slice(1500 * column, 1500 * column + 1500))
    leaf = logits[window].clone().requires_grad_()
    own, own_index = distributed.gumbel_softmax(
        leaf,
        0.5,
        hard,
        shards=[Shard(0, offset=3 * row, size=6), Shard(2, groups[row])],
        return_index=True,
        rng_state=state,
    )
    (own * weight[window]).sum().backward()
    assert torch.equal(own_index, index[window[:2]])
    torch.testing.assert_close(own, y[window], rtol=5e-7, atol=0)
    torch.testing.assert_close(leaf.grad, grad[window], rtol=1e-5, atol=1e-6)


def test_rows_and_classes_split(ranks, hard):
    ranks.run(both_case, hard)


def compiled_case(rank, world, dim, hard):
    state = torch.tensor([1, 2])
    logits, weight = torch.randn(2, 5, 30)

    def loss(x):
        y = distributed.gumbel_softmax(x, 0.5, hard, shards=Shard(dim), rng_state=state)
        return (y * weight).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "dim",
    [
        pytest.param(
            dim, marks=pytest.mark.feature(name, ops=("gumbel_softmax",), modes=("compiled",))
        )
        for dim, name in enumerate(("rows split over processes", "classes split over processes"))
    ],
)
def test_compiled(ranks, hard, dim):
    ranks.run(compiled_case, dim, hard)


def second_derivative_case(rank, world):
    leaf = torch.randn(3, 8, requires_grad=True)
    y = distributed.gumbel_softmax(leaf, shards=Shard(1))
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_second_derivative_over_split_classes_is_an_error(ranks):
    ranks.run(second_derivative_case)


# ---- errors -------------------------------------------------------------------------------------


def error_case(rank, world):
    logits = torch.randn(3, 8)
    with pytest.raises(TypeError, match="shards must be Shards, got 3"):
        distributed.gumbel_softmax(logits, shards=[3])
    with pytest.raises(IndexError, match="shards: dim must be between -2 and 1, got 2"):
        distributed.gumbel_softmax(logits, shards=Shard(2))
    with pytest.raises(ValueError, match="got 0 twice"):
        distributed.gumbel_softmax(logits, shards=[Shard(0), Shard(-2)])
    with pytest.raises(ValueError, match="got offset 7 and 3 elements of 9 in dimension 0"):
        distributed.gumbel_softmax(logits, shards=Shard(0, offset=7, size=9))
    for hard in (False, True):
        with pytest.raises(ValueError, match="tau must be positive and finite, got -1"):
            distributed.gumbel_softmax(logits, -1, hard, shards=Shard(1))
        with pytest.raises(ValueError, match="tau must be positive and finite, got 0"):
            distributed.gumbel_softmax(logits, torch.tensor(0.0), hard, shards=Shard(1))
        with pytest.raises(ValueError, match="mask must broadcast"):
            distributed.gumbel_softmax(
                logits, 1, hard, shards=Shard(1), mask=torch.ones(4, 8, dtype=torch.bool)
            )
    both = {"generator": torch.Generator(), "rng_state": torch.tensor([1, 2])}
    for function in (distributed.gumbel_softmax, distributed.gumbel_argmax):
        with pytest.raises(ValueError, match="give either generator or rng_state, not both"):
            function(logits, shards=Shard(0), **both)
    with pytest.raises(ValueError, match="give either generator or rng_state, not both"):
        distributed.gumbel_noise((3, 8), shards=Shard(0), **both)
    with pytest.raises(TypeError, match="logits must have dtype"):
        distributed.gumbel_softmax(logits.long(), shards=Shard(1))
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        distributed.gumbel_argmax([1.0], shards=Shard(0))


def test_errors(ranks):
    ranks.run(error_case)
