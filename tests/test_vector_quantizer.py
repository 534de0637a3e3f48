"""The quantiser: that of wav2vec 2.0, with its weights, its perplexities and its schedule."""

import math

import pytest
import torch
from oracle import rng_state
from torch import nn

from gumbel_ext import gumbel_embedding
from gumbel_ext.nn import GumbelVectorQuantizer
from gumbel_ext.temperature import ExponentialTemperature, LearnableTemperature


def quantizer(device, **keywords):
    sizes = {"input_dim": 6, "num_vars": 5, "groups": 2, "vq_dim": 8}
    return GumbelVectorQuantizer(**(sizes | keywords)).to(device)


def transformers_quantizer(device, groups=2, num_vars=5):
    wav2vec2 = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")
    config = wav2vec2.Wav2Vec2Config(
        num_codevector_groups=groups, num_codevectors_per_group=num_vars, codevector_dim=8
    )
    config.conv_dim = (6,)
    theirs = wav2vec2.Wav2Vec2GumbelVectorQuantizer(config).to(device)
    nn.init.normal_(theirs.weight_proj.weight)
    nn.init.normal_(theirs.weight_proj.bias)
    nn.init.uniform_(theirs.codevectors)
    return theirs


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_evaluates_as_transformers_with_its_weights(groups, device):
    theirs = transformers_quantizer(device, groups).eval()
    ours = quantizer(device, groups=groups).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 11, 6, device=device)
    time_mask = torch.rand(3, 11, device=device) < 0.7
    for mask in (None, time_mask):
        codevectors, perplexity = theirs(x, mask)
        q = ours(x, time_mask=mask)
        torch.testing.assert_close(q.codevectors, codevectors)
        torch.testing.assert_close(q.code_perplexity, perplexity)
        assert ours(x[0, 0]).codevectors.equal(q.codevectors[0, 0])
    # Theirs in training: the perplexity of the probabilities, and its gradient.
    for mask in (None, time_mask):
        expected = torch.autograd.grad(theirs.train()(x, mask)[1], list(theirs.parameters())[1:])
        q = ours(x, time_mask=mask)
        torch.testing.assert_close(q.prob_perplexity, theirs(x, mask)[1])
        actual = torch.autograd.grad(q.prob_perplexity, list(ours.parameters())[1:])
        torch.testing.assert_close(actual, expected)


def test_training_samples(hard, device):
    module = quantizer(device, temperature=0.6, hard=hard)
    x, state = torch.randn(4, 7, 6, device=device), rng_state(device=device)
    q = module(x, rng_state=state)
    codevectors, index = gumbel_embedding(
        module.weight_proj(x),
        module.codevectors.view(2, 5, 4),
        0.6,
        hard,
        return_index=True,
        rng_state=state,
    )
    assert torch.equal(q.codevectors, codevectors)
    assert torch.equal(q.codes, index)
    assert q.codevectors.shape == (4, 7, 8)
    assert q.codes.shape == (4, 7, 2)
    grad = torch.randn_like(codevectors)
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(q.codevectors, parameters, grad),
        torch.autograd.grad(codevectors, parameters, grad),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0
    generators = [torch.Generator(device).manual_seed(2) for _ in range(2)]
    assert torch.equal(*(module(x, generator=g).codes for g in generators))
    assert not torch.equal(module(x).codes, module(x).codes)


def test_evaluation_has_a_gradient_for_the_codebook(device):
    module = quantizer(device).eval()
    x = torch.randn(9, 6, device=device, requires_grad=True)
    q = module(x)
    grad = torch.randn_like(q.codevectors)
    of_codes, of_logits = torch.autograd.grad(
        q.codevectors, (module.codevectors, module.weight_proj.weight), grad, allow_unused=True
    )
    assert of_logits is None
    expected = torch.zeros(2, 5, 4, device=device)
    for g in range(2):
        expected[g].index_add_(0, q.codes[:, g], grad.view(9, 2, 4)[:, g])
    torch.testing.assert_close(of_codes, expected.view(1, 10, 4))


def test_perplexities(device):
    module = quantizer(device)
    # Logits are the input.
    nn.init.zeros_(module.weight_proj.weight)
    logits = torch.full((12, 2, 5), -1e4, device=device)
    logits[torch.arange(12), 0, torch.arange(12) % 4] = 0
    logits[:, 1, 2] = 0
    module.weight_proj = nn.Identity()
    module.input_dim = 10
    q = module(logits.flatten(1))
    # Four codes of equal share, and one.
    assert q.code_perplexity.item() == pytest.approx(5)
    assert q.prob_perplexity.item() == pytest.approx(5)
    counted = torch.arange(12, device=device) % 4 < 2
    assert module(logits.flatten(1), time_mask=counted).code_perplexity.item() == pytest.approx(3)
    nothing = module(logits.flatten(1), time_mask=counted & False)
    assert nothing.code_perplexity == nothing.prob_perplexity == 2
    assert module(logits[:0].flatten(1)).code_perplexity == 2
    assert not q.code_perplexity.requires_grad
    # What padding holds does not matter, not even to gradients.
    padded = logits.clone().flatten(1)
    padded[~counted] = torch.nan
    padded.requires_grad_()
    q = module(padded, time_mask=counted)
    assert q.prob_perplexity.item() == pytest.approx(3)
    (gradient,) = torch.autograd.grad(q.prob_perplexity, padded)
    assert gradient[counted].isfinite().all()
    # Uniform probabilities use every code.
    assert module(torch.zeros(3, 10, device=device)).prob_perplexity.item() == pytest.approx(10)


def test_temperatures(device):
    x, state = torch.randn(5, 6, device=device), rng_state(device=device)
    schedule = ExponentialTemperature(rate=-math.log(0.999995), minimum=0.5, start=2.0)
    learnt = LearnableTemperature(0.9).to(device)
    module = quantizer(device, temperature=schedule, hard=False)

    def expected(tau):
        logits = module.weight_proj(x)
        codes = module.codevectors.view(2, 5, 4)
        return gumbel_embedding(logits, codes, tau, False, rng_state=state)

    assert torch.equal(module(x, rng_state=state).codevectors, expected(2.0))
    schedule.step()
    assert schedule.tau == pytest.approx(2 * 0.999995)
    assert torch.equal(module(x, rng_state=state).codevectors, expected(schedule.tau))
    assert schedule.at(10**7) == 0.5
    module.temperature = 0.7
    assert torch.equal(module(x, rng_state=state).codevectors, expected(0.7))
    assert set(module.state_dict()) == {"codevectors", "weight_proj.weight", "weight_proj.bias"}
    module = quantizer(device, temperature=learnt)
    assert any(name.startswith("temperature.") for name in module.state_dict())
    q = module(x).codevectors
    (gradient,) = torch.autograd.grad(q, next(learnt.parameters()), torch.randn_like(q))
    assert gradient.abs() > 0


def test_compiles_in_one_graph(device):
    schedule = ExponentialTemperature(rate=0.1, start=2.0)
    module = quantizer(device, temperature=schedule)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, state = torch.randn(5, 6, device=device), rng_state(device=device)
    mask = torch.rand(5, device=device) < 0.7
    for _ in range(2):
        actual, expected = (f(x, time_mask=mask, rng_state=state) for f in (compiled, module))
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        schedule.step()


def test_bfloat16_counts_in_float32(device):
    module = quantizer(device).to(torch.bfloat16)
    q = module(torch.randn(1000, 6, device=device, dtype=torch.bfloat16))
    assert q.codevectors.dtype == torch.bfloat16
    assert q.code_perplexity.dtype == q.prob_perplexity.dtype == torch.float32


def test_repr_names_what_was_chosen(device):
    text = repr(quantizer(device, temperature=0.5))
    assert "input_dim=6, num_vars=5, groups=2, vq_dim=8, temperature=0.5, hard=True" in text
    assert "(temperature): LearnableTemperature" in repr(
        quantizer(device, temperature=LearnableTemperature())
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"vq_dim": 9}, ValueError, "vq_dim must be divisible by groups, 2, got 9"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"num_vars": 5.0}, TypeError, "num_vars must be an int, got 5.0"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"temperature": "2"}, TypeError, "temperature must be a number, .* got '2'"),
    ],
)
def test_errors_of_the_constructor(arguments, error, words):
    with pytest.raises(error, match=f"GumbelVectorQuantizer: {words}"):
        quantizer("cpu", **arguments)


def test_errors_of_a_call():
    module = quantizer("cpu")
    x = torch.randn(3, 4, 6)
    with pytest.raises(TypeError, match="features must be a tensor, got list"):
        module([1.0])
    with pytest.raises(ValueError, match=r"features must be of shape .*6\], got shape \[3, 4\]"):
        module(x[..., 0])
    with pytest.raises(TypeError, match="time_mask must have dtype bool, got"):
        module(x, time_mask=x[..., 0])
    with pytest.raises(ValueError, match=r"time_mask must be of shape \[3, 4\].* got shape \[4\]"):
        module(x, time_mask=x[0, :, 0] > 0)
