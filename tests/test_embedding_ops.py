"""Codebook lookup as an op: higher derivatives, transforms, compilation, other devices."""

import pytest
import torch
from oracle import lookup_inputs, rng_state

from gumbel_ext import gumbel_embedding, gumbel_softmax

_ops = torch.ops.gumbel_ext


def feature(name, mode="eager"):
    return pytest.mark.feature(name, ops=("gumbel_embedding",), modes=(mode,))


@feature("gradcheck, gradgradcheck")
@feature("forward-mode AD, dual tensors")
@pytest.mark.parametrize(
    ("shape", "dim", "book"), [((3, 5), -1, (5, 2)), ((2, 6, 3), 1, (2, 3, 2))], ids=str
)
def test_gradcheck(shape, dim, book, state, device):
    logits, weight = lookup_inputs(shape, book, device, torch.float64)
    tau = torch.tensor(0.8, dtype=torch.float64, device=device, requires_grad=True)

    def soft(logits, weight, tau):
        return gumbel_embedding(logits, weight, tau, False, dim, rng_state=state)

    leaves = (logits.requires_grad_(), weight.requires_grad_(), tau)
    assert torch.autograd.gradcheck(soft, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(soft, leaves)


def composite(logits, weight, tau, hard, dim, state, mask=None):
    """The product with this package's own sample."""
    if weight.dim() == 2:
        y = gumbel_softmax(logits, tau, hard, dim=dim, mask=mask, rng_state=state)
        return (y.movedim(dim, -1) @ weight).movedim(-1, dim)
    dim %= logits.dim()
    y = gumbel_softmax(
        logits.unflatten(dim, weight.shape[:2]), tau, hard, dim=dim + 1, rng_state=state
    )
    rows = torch.einsum("...gv,gvd->...gd", y.movedim((dim, dim + 1), (-2, -1)), weight)
    return rows.flatten(-2).movedim(-1, dim)


@pytest.mark.parametrize(
    ("shape", "dim", "book"), [((3, 5), -1, (5, 2)), ((2, 6, 3), 1, (2, 3, 2))], ids=str
)
def test_higher_orders_are_those_of_the_product(shape, dim, book, hard, state, device):
    logits, weight = lookup_inputs(shape, book, device, torch.float64)
    tau = torch.tensor(0.8, dtype=torch.float64, device=device, requires_grad=True)
    leaves = (logits.requires_grad_(), weight.requires_grad_(), tau)
    second = []
    for function in (gumbel_embedding, composite):
        if function is gumbel_embedding:
            out = gumbel_embedding(*leaves, hard, dim, rng_state=state)
        else:
            out = composite(*leaves, hard, dim, state)
        torch.manual_seed(3)
        # Not randn_like, whose values go by the order in memory.
        grad = torch.randn(out.shape, dtype=out.dtype).to(device)
        first = torch.autograd.grad(out, leaves, grad, create_graph=True)
        total = sum((g * torch.randn(g.shape, dtype=g.dtype).to(device)).sum() for g in first)
        second.append((*first, *torch.autograd.grad(total, leaves)))
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b)


@feature("torch.func jvp")
@feature("vmap of grad, per-sample gradients")
def test_transforms(hard, state, device):
    logits, weight = lookup_inputs((4, 3, 6), (6, 2), device, torch.float64)

    def lookup(x, w):
        return gumbel_embedding(x, w, 0.7, hard, rng_state=state)

    def plain(x, w):
        return composite(x, w, 0.7, hard, -1, state)

    tangents = (torch.randn_like(logits), torch.randn_like(weight))
    for a, b in zip(
        torch.func.jvp(lookup, (logits, weight), tangents),
        torch.func.jvp(plain, (logits, weight), tangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    grads = [
        torch.vmap(torch.func.grad(lambda x, w, f=f: f(x, w).cos().sum(), (0, 1)), (0, None))(
            logits, weight
        )
        for f in (lookup, plain)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@feature("vmap randomness=error")
@feature("vmap randomness=same")
@feature("vmap randomness=different")
@feature("vmap with rng_state")
@feature("vmap over rng_state")
@pytest.mark.parametrize("book", [(6, 2), (2, 3, 4)], ids=["", "groups"])
def test_vmap(book, hard, state, device):
    logits, weight = lookup_inputs((4, 3, 6), book, device)
    books = torch.randn(4, *book, device=device)
    mask = torch.rand(4, 3, 6, device=device) < 0.8

    def lookup(x, w, m=None, s=None):
        return gumbel_embedding(x, w, 0.7, hard, mask=m, return_index=True, rng_state=s)

    def same(actual, expected):
        torch.testing.assert_close(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])

    def one_by_one(*args):
        results = [lookup(*(a[i] for a in args), s=state) for i in range(4)]
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    each = weight.expand(4, *book)
    same(
        torch.vmap(lambda x, m: lookup(x, weight, m, state))(logits, mask),
        one_by_one(logits, each, mask),
    )
    same(torch.vmap(lambda x, w: lookup(x, w, s=state))(logits, books), one_by_one(logits, books))
    same(
        torch.vmap(lambda w: lookup(logits[0], w, s=state))(books),
        one_by_one(logits[:1].expand_as(logits), books),
    )
    states = torch.stack([state + i for i in range(4)])
    results = [lookup(logits[i], weight, s=states[i]) for i in range(4)]
    same(
        torch.vmap(lambda x, s: lookup(x, weight, s=s))(logits, states),
        [torch.stack(parts) for parts in zip(*results, strict=True)],
    )
    # As one call on the whole batch, whether the codebook has the batch dimension or not.
    torch.manual_seed(1)
    whole = lookup(logits, weight)
    for w, dims in ((weight, (0, None)), (each, (0, 0))):
        torch.manual_seed(1)
        same(torch.vmap(lookup, dims, randomness="different")(logits, w), whole)
    torch.manual_seed(1)
    single = lookup(logits[0], weight)
    for w, dims in ((weight, (0, None)), (each, (0, 0))):
        torch.manual_seed(1)
        actual = torch.vmap(lookup, dims, randomness="same")(logits, w)
        same([part[0] for part in actual], single)
    with pytest.raises(RuntimeError, match="gumbel_embedding: vmap"):
        torch.vmap(lookup, (0, None))(logits, weight)
    # Below the transform autograd runs as ever.
    leaf = weight.clone().requires_grad_()
    out = torch.vmap(lambda x: gumbel_embedding(x, leaf, 0.7, hard, rng_state=state))(logits)
    grad = torch.randn_like(out)
    expected = torch.stack([gumbel_embedding(x, leaf, 0.7, hard, rng_state=state) for x in logits])
    torch.testing.assert_close(
        torch.autograd.grad(out, leaf, grad), torch.autograd.grad(expected, leaf, grad)
    )


# ---- what PyTorch asks of an op -----------------------------------------------------------------


@feature("torch.library.opcheck")
def test_opcheck(hard, device):
    logits, weight = lookup_inputs((3, 6, 2), (2, 3, 4), device)
    tau = torch.rand(3, 1, 2, device=device).add(0.5).requires_grad_()
    mask = torch.rand(6, 1, device=device) < 0.7
    args = (logits.requires_grad_(), weight.requires_grad_(), 1.0, tau, hard, 1, mask, None)
    # What is traced is the same for both.
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    utils += ["test_aot_dispatch_dynamic"] if hard else []
    op = _ops.gumbel_embedding.default
    torch.library.opcheck(op, (*args, rng_state(device=device)), test_utils=utils)
    out, index, state = _ops.gumbel_embedding(*args, None)
    op = _ops.gumbel_embedding_backward.default
    rest = (torch.randn_like(out), logits, weight, index, *args[2:7], state, True, True, True)
    torch.library.opcheck(op, rest, test_utils=utils)


@feature("torch.compile(fullgraph=True), forward and backward", "compiled")
@feature("torch.compile(dynamic=True)", "compiled")
@feature("two calls in one graph draw different noise", "compiled")
def test_compile(hard, state, device):
    logits, weight = lookup_inputs((4, 9), (9, 3), device)
    leaves = (logits.requires_grad_(), weight.requires_grad_())

    def lookup(x, w, tau, s):
        return gumbel_embedding(x, w, tau, hard, return_index=True, rng_state=s)

    compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 3):
        x = logits[:rows]
        out, index = compiled(x, weight, 0.7, state)
        expected, expected_index = lookup(x, weight, 0.7, state)
        assert torch.equal(out, expected)
        assert torch.equal(index, expected_index)
        grad = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, leaves, grad),
            torch.autograd.grad(expected, leaves, grad),
            strict=True,
        ):
            assert torch.equal(a, b)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(x, w):
        return gumbel_embedding(x, w, hard=False), gumbel_embedding(x, w, hard=False)

    first, second = twice(*leaves)
    assert not torch.equal(first, second)


@feature("torch.export non-strict", "exported")
def test_export(hard, state, device):
    class Quantizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(2, 4, 3, device=device))

        def forward(self, logits, s):
            return gumbel_embedding(logits, self.weight, 0.5, hard, rng_state=s)

    module, logits = Quantizer(), torch.randn(5, 8, device=device)
    program = torch.export.export(module, (logits, state), strict=False)
    assert torch.equal(program.module()(logits, state), module(logits, state))


@feature("autocast")
def test_autocast_leaves_the_dtypes(hard, state, device):
    logits, weight = lookup_inputs((4, 9), (9, 3), device, torch.bfloat16, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = gumbel_embedding(logits, weight, 0.7, hard, rng_state=state)
    assert out.dtype == torch.float32
    assert torch.equal(out, gumbel_embedding(logits, weight, 0.7, hard, rng_state=state))
