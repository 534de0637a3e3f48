"""Index-only sampling skips the classes that cannot win: it must never skip the one that does.

On the CPU the float32 noisy logits are logits + gumbel_noise to the bit, so their argmax is the
exact answer, and equality is asserted without any tolerance.  CUDA kernels round the sum once,
gumbel_noise and the addition here twice: there a class within that rounding of the best may win.
"""

import pytest
import torch
from oracle import SIXTEEN_BIT, eps, runs_cpu_kernels

import gumbel_ext

# Around the length from which rows are searched by bounds, and around summation chunks.
CLASSES = (150, 191, 192, 193, 256, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 5000, 70_001)
ELEMENTS = 1 << 19


def assert_exact(
    index: torch.Tensor,
    logits: torch.Tensor,
    state: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    noise = gumbel_ext.gumbel_noise(
        logits.shape, dtype=torch.float32, device=logits.device, rng_state=state
    )
    noisy = logits.float() + noise
    if mask is not None:
        noisy = noisy.masked_fill(~mask, -torch.inf)
    # torch.argmax may return any of several equal entries: take the first.
    best = noisy.amax(-1, keepdim=True)
    exact = (noisy == best).int().argmax(-1)
    if runs_cpu_kernels(logits.device):
        assert torch.equal(index, exact)
        return
    lost = (best - noisy.gather(-1, index.unsqueeze(-1))).squeeze(-1)
    size = (logits.float().abs().amax(-1) + noise.abs().amax(-1)).clamp(min=1)
    assert (lost <= 4 * eps(torch.float32) * size).all()
    assert int((index != exact).sum()) <= 1 + index.numel() // 1000


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0, 1000.0])
def test_index_is_the_argmax_of_the_noisy_logits(device, classes, spread):
    rows = max(1, ELEMENTS // classes)
    generator = torch.Generator().manual_seed(classes)
    logits = spread * torch.randn(rows, classes, generator=generator).to(device)
    state = torch.tensor([classes, 77], device=device)
    index = gumbel_ext.gumbel_argmax(logits, rng_state=state)
    assert_exact(index, logits, state)
    hard = gumbel_ext.gumbel_softmax(logits, hard=True, rng_state=state)
    assert torch.equal(hard.argmax(-1), index)
    assert torch.equal(hard.sum(-1), torch.ones(rows, device=device))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("classes", [192, 1025, 5000])
def test_sixteen_bit_logits(device, classes, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ELEMENTS // classes, classes, generator=generator).to(device, dtype)
    state = torch.tensor([5, 0], device=device)
    assert_exact(gumbel_ext.gumbel_argmax(logits, rng_state=state), logits, state)


@pytest.mark.parametrize("classes", [192, 333, 1025, 5000])
def test_masked_rows(device, classes):
    """Forbidden classes with the largest logits must neither win nor hide the winner."""
    generator = torch.Generator().manual_seed(2)
    rows = ELEMENTS // classes
    mask = (torch.rand(rows, classes, generator=generator) < 0.3).to(device)
    mask[:, 17] = True
    logits = torch.randn(rows, classes, generator=generator).to(device)
    logits = torch.where(mask, logits, logits + 30)
    state = torch.tensor([9, 3], device=device)
    index = gumbel_ext.gumbel_argmax(logits, mask=mask, rng_state=state)
    assert mask.gather(-1, index.unsqueeze(-1)).all()
    assert_exact(index, logits, state, mask)


def test_rows_whose_words_start_anywhere(device):
    """Rows of a view: noise positions follow the view, whatever the address they start at."""
    generator = torch.Generator().manual_seed(3)
    storage = torch.randn(300, 1201, generator=generator).to(device)
    state = torch.tensor([11, 0], device=device)
    for start in range(5):
        logits = storage[:, start : start + 1001]
        index = gumbel_ext.gumbel_argmax(logits, rng_state=state)
        assert_exact(index, logits, state)


@pytest.mark.parametrize("position", [0, 5, 191, 192, 700, 1023, 1024, 2999])
def test_first_nan_ends_the_search(device, position):
    logits = torch.zeros(4, 3000, device=device)
    logits[1, position] = torch.nan
    logits[1, position + 1 :: 7] = torch.nan
    logits[1, 0] = 50.0 if position else torch.nan
    index = gumbel_ext.gumbel_argmax(logits, rng_state=torch.tensor([1, 1], device=device))
    assert index[1] == position


def test_minus_infinity_until_the_last_class(device):
    logits = torch.full((64, 4099), -torch.inf, device=device)
    logits[:, -1] = -3e38
    index = gumbel_ext.gumbel_argmax(logits, rng_state=torch.tensor([1, 1], device=device))
    assert (index == 4098).all()
