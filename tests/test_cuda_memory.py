"""Peak memory on a GPU: results, and what is small beside them.

Logits are no leaves, as what a network makes of its input: of a leaf a copy is kept.
"""

import pytest
import torch
from oracle import DTYPES, SIXTEEN_BIT

import gumbel_ext

OPS = torch.ops.gumbel_ext
pytestmark = [pytest.mark.cuda_only, pytest.mark.gpu_only(reason="memory statistics")]


def requested_bytes(when):
    """What was asked of the allocator; the blocks that it hands out may be a megabyte larger."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def peak_of(call):
    """Bytes at once beyond those before the call, and its result."""
    call()
    before = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    result = call()
    return requested_bytes("peak") - before, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((4096, 256), -1),
        ((512, 2048), -1),
        ((80, 20_000), -1),
        ((70, 60_000), -1),
        ((2, 500_000), -1),
        ((4, 512, 512), 1),
    ],
    ids=str,
)
def test_peak_memory_is_output_and_gradient(device, state, hard, shape, dim, dtype):
    """And O(rows): the hard backward makes its soft sample where the gradient will be."""
    leaf, grad = torch.randn(2, *shape).to(device, dtype)
    logits = leaf.requires_grad_().clone()

    def train():
        y = gumbel_ext.gumbel_softmax(logits, 0.5, hard, dim=dim, rng_state=state)
        return y, torch.autograd.grad(y, logits, grad)

    train()
    before = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    result = train()
    peak = requested_bytes("peak") - before
    size = logits.numel() * dtype.itemsize
    rows = logits.numel() // shape[dim]
    assert peak >= 2 * size
    assert peak <= 2 * size + 16 * rows + (64 << 10)
    del result


def test_index_alone_stores_nothing_of_the_size_of_the_logits(device, state):
    logits = torch.randn(4096, 1024).to(device)
    gumbel_ext.gumbel_argmax(logits, rng_state=state)
    before = requested_bytes("current")
    torch.cuda.reset_peak_memory_stats()
    index = gumbel_ext.gumbel_argmax(logits, rng_state=state)
    peak = requested_bytes("peak") - before
    assert 8 * index.numel() <= peak <= 8 * index.numel() + (16 << 10)


# ---- the relatives ------------------------------------------------------------------------------


def trained(function, *arguments):
    """The value and its gradients, which live at once."""
    arguments = [t.detach().requires_grad_().clone() for t in arguments]
    grad = torch.ones_like(function(*arguments))

    def train():
        y = function(*arguments)
        return y, torch.autograd.grad(y, arguments, grad)

    return train


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_binary_samples_keep_nothing(device, state, hard, dtype):
    logits = torch.randn(4_000_003).to(device, dtype)

    def sample(x):
        return gumbel_ext.binary_concrete(x, 0.5, hard, rng_state=state)

    peak, _ = peak_of(trained(sample, logits))
    assert 2 * logits.nbytes <= peak <= 2 * logits.nbytes + (64 << 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50_000, 30), (2000, 1000), (200, 20_000)], ids=str)
def test_log_samples_and_densities(device, state, shape, dtype):
    """Results and gradients; 16-bit samples are made and kept in float32."""
    logits = torch.randn(shape).to(device, dtype)
    small = (64 << 10) + 32 * shape[0]

    def sample(x):
        return gumbel_ext.gumbel_log_softmax(x, 0.5, rng_state=state)

    peak, log_y = peak_of(trained(sample, logits))
    if dtype in SIXTEEN_BIT:
        # Logits, log y and its gradient in float32 besides.
        assert peak <= 8 * logits.nbytes + small
    else:
        assert 2 * logits.nbytes <= peak <= 2 * logits.nbytes + small
    value = log_y[0].detach()
    del log_y

    def density(v, x):
        return gumbel_ext.concrete_log_prob(v, x, 0.5, log_space=True)

    peak, _ = peak_of(trained(density, value, logits))
    assert 2 * logits.nbytes <= peak <= 2 * logits.nbytes + small


def test_top_k_scores_are_those_of_rows_at_work(device, state):
    logits = torch.randn(300_000, 256).to(device)
    peak, index = peak_of(lambda: gumbel_ext.gumbel_topk(logits, 4, rng_state=state))
    assert index.nbytes <= peak <= 2 * index.nbytes + (32 << 20)
    assert peak < logits.nbytes / 4


@pytest.mark.parametrize("name", ["zgr", "reinmax", "gapped"])
def test_estimators_take_the_memory_of_the_gradient(device, name):
    logits = torch.randn(512, 4096).to(device)
    index = logits.argmax(-1)
    backward = {
        "zgr": lambda: OPS.zgr_backward(logits, logits, index, -1, None),
        "reinmax": lambda: OPS.reinmax_backward(logits, logits, index, 0.5, None, -1, None),
        "gapped": lambda: OPS.gapped_straight_through_backward(
            logits, logits, index, 0.5, None, 1.0, -1, None
        ),
    }[name]
    peak, out = peak_of(backward)
    assert out.nbytes <= peak <= out.nbytes + 4096


def test_the_lookup_never_holds_the_sample(device, state, hard):
    """Logits of 256 MB in tiles; its own gradient is of their size."""
    logits = torch.randn(100_000, 640).to(device)
    codebook = torch.randn(2, 320, 8).to(device)
    tile, of_rows = 4 << 24, 4 * 100_000 * 16
    of_row = 64 * 2 * 100_000  # indices, codes and flags

    def look_up():
        return gumbel_ext.gumbel_embedding(logits, codebook, 0.7, hard, rng_state=state)

    peak, out = peak_of(look_up)
    assert peak <= 3 * of_rows + of_row + (0 if hard else 2 * tile) + (1 << 20)
    assert peak < logits.nbytes
    assert out.nbytes == of_rows
