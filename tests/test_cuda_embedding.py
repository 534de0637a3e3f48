"""The codebook lookup on a GPU: tiles, products on tensor cores, the same bits each time."""

import pytest
import torch
from oracle import DTYPES, SIXTEEN_BIT, eps, lookup_inputs, noise, row_shape

import gumbel_ext
from gumbel_ext import _reference

pytestmark = pytest.mark.cuda_only

# Shape of logits, dim, shape of the codebook.
CASES = {
    "rows": ((37, 11), -1, (11, 5)),
    "odd": ((203, 321), -1, (321, 33)),
    "images": ((3, 24, 5, 7), 1, (24, 70)),
    "groups": ((50, 90), -1, (2, 45, 6)),
    "groups_of_images": ((2, 14, 3, 4), 1, (2, 7, 5)),
}
every_case = pytest.mark.parametrize(("shape", "dim", "book"), CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def looked_up(logits, weight, hard, dim, state, tau):
    leaves = [t.detach().requires_grad_() for t in (logits, weight, tau)]
    out, index = gumbel_ext.gumbel_embedding(*leaves, hard, dim, return_index=True, rng_state=state)
    grad = torch.arange(out.numel(), device=out.device).remainder(9).sub(4)
    return out.detach(), index, *torch.autograd.grad(out, leaves, grad.view(out.shape).to(out))


@pytest.mark.sanitizer
@every_dtype
@every_case
def test_against_the_product_with_the_sample(device, state, hard, shape, dim, book, dtype):
    logits, weight = lookup_inputs(shape, book, device, dtype)
    rows = row_shape(shape, dim)
    tau = (0.5 + torch.rand(rows)).to(device, torch.promote_types(dtype, torch.float32))
    actual = looked_up(logits, weight, hard, dim, state, tau)

    leaves = [t.detach().cpu().double().requires_grad_() for t in (logits, weight, tau)]
    expected, index = _reference.gumbel_embedding(
        leaves[0], leaves[1], leaves[2], hard, dim, noise=noise(shape)
    )
    assert torch.equal(actual[1].cpu(), index)
    grad = torch.arange(expected.numel()).remainder(9).sub(4).view(expected.shape).double()
    wanted = torch.autograd.grad(expected, leaves, grad)
    # Relative to the largest entry: sums have terms of both signs, and tensor cores round operands
    # of 16 bits, among them the sample and its gradient.
    unit = 8 * eps(dtype) if dtype in SIXTEEN_BIT else 512 * eps(dtype)
    if hard:
        assert torch.equal(actual[0].cpu().double(), expected.detach())
    for ours, theirs in zip((actual[0], *actual[2:]), (expected.detach(), *wanted), strict=True):
        size = theirs.abs().max()
        assert ((ours.cpu().double() - theirs).abs() <= unit * size).all()


@pytest.mark.gpu_only(reason="several tiles of 16 million elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "dim", "book"),
    [((60_001, 640), -1, (2, 320, 16)), ((3, 8192, 40, 41), 1, (8192, 8))],
    ids=["groups", "images"],
)
def test_several_tiles(device, state, hard, shape, dim, book, dtype):
    """Against the product with the sample, which the GPU has room for."""
    logits, weight = lookup_inputs(shape, book, "cpu", torch.float32)
    logits, weight = logits.to(device, dtype), weight.to(device, dtype)
    tau = torch.tensor(0.7, device=device)
    out, index, *gradients = looked_up(logits, weight, hard, dim, state, tau)
    again = looked_up(logits, weight, hard, dim, state, tau)
    for ours, theirs in zip((out, index, *gradients), again, strict=True):
        assert torch.equal(ours, theirs)

    leaves = [t.detach().double().requires_grad_() for t in (logits, weight)]
    groups = book[0] if len(book) == 3 else 1
    parts = []
    for number, part in enumerate(leaves[0].movedim(dim, -1).chunk(groups, -1)):
        # One state for all groups: positions are those of the whole.
        whole = logits.shape
        strides = [1] * len(whole)
        for d in reversed(range(len(whole) - 1)):
            strides[d] = strides[d + 1] * whole[d + 1]
        first = number * (whole[dim] // groups) * strides[dim % len(whole)]
        order = [d for d in range(len(whole)) if d != dim % len(whole)] + [dim % len(whole)]
        positions = [first, *(strides[d] for d in order)]
        y, chosen, _ = torch.ops.gumbel_ext.gumbel_softmax(
            part.contiguous(), 0.7, None, hard, -1, None, True, None, state, positions
        )
        ours = index.select(dim, number) if len(book) == 3 else index
        share = (chosen != ours).double().mean()
        # The logits are those of the tiles, the float64 noise tells near-ties apart.
        assert share <= 1e-4
        parts.append(y @ leaves[1].view(groups, -1, book[-1])[number])
    expected = torch.cat(parts, -1).movedim(-1, dim)
    grad = torch.arange(out.numel(), device=device).remainder(9).sub(4).view(out.shape)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    unit = 8 * eps(dtype) if dtype == torch.bfloat16 else 2e-3
    rows = (out.double() - expected.detach()).abs().movedim(dim, -1).amax(-1)
    assert (rows > unit * expected.detach().abs().max()).double().mean() <= 1e-3
    off = (gradients[1].double() - wanted[1]).abs().max()
    assert off <= 4 * unit * wanted[1].abs().max()
    rows = (gradients[0].double() - wanted[0]).abs().movedim(dim, -1).amax(-1)
    assert (rows > unit * wanted[0].abs().max()).double().mean() <= 1e-3


@pytest.mark.parametrize("book", [(40, 8), (2, 20, 8)], ids=["one_book", "groups"])
def test_codes_that_many_rows_chose(device, state, book):
    """Sums of a codebook's gradient in an order of their own: the same bits in every run."""
    logits, weight = lookup_inputs((5000, 40), book, device)
    logits[:, 3] += 6
    tau = torch.tensor(1.0, device=device)
    first = looked_up(logits, weight, True, -1, state, tau)
    assert (first[1] == 3).double().mean() > 0.3
    for ours, theirs in zip(looked_up(logits, weight, True, -1, state, tau), first, strict=True):
        assert torch.equal(ours, theirs)
