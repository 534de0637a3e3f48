"""Published models, unmodified, run on our ops: transformers and vector-quantize-pytorch.

Random weights of tiny configurations; nothing is downloaded.
"""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from oracle import DispatchLog
from scipy import stats
from torch import nn

import gumbel_ext

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
vq = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")

ALPHA = 1e-4


HARD_STEP = ["gumbel_softmax", "gumbel_softmax_hard_backward"]


@pytest.fixture
def patch():
    with gumbel_ext.patch_torch():
        yield


@pytest.fixture
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Recorded:
    """A backend that runs what it is given, and keeps the graphs."""

    def __init__(self, backend="aot_eager"):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.ours = []

    def __call__(self, module, inputs):
        self.ours.append(
            sum("gumbel_ext.gumbel_softmax" in str(node.target) for node in module.graph.nodes)
        )
        return self.backend(module, inputs)


# ---- wav2vec 2.0's pre-training -----------------------------------------------------------------

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 8,
    "num_codevector_groups": 2,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_negatives": 4,
    # The only random numbers are to be those of the samples.
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
}


@pytest.fixture
def wav2vec2(device):
    """A model in training, and a batch for it."""
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**TINY))
    model = model.to(device).train()
    length = int(model._get_feat_extract_output_lengths(torch.tensor(800)))
    batch = {
        "input_values": torch.randn(2, 800, device=device),
        "mask_time_indices": torch.rand(2, length, device=device) < 0.3,
        "sampled_negative_indices": torch.randint(0, 2 * length, (2, length, 4), device=device),
    }
    return model, batch


def step(function, model, batch):
    """Loss, perplexity and gradients of one step from one seed."""
    model.zero_grad()
    torch.manual_seed(7)
    out = function(**batch)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), out.codevector_perplexity.detach(), gradients


client = pytest.mark.feature(
    "transformers: Wav2Vec2ForPreTraining", ops=("gumbel_softmax_hard",), modes=("eager",)
)
compiled_client = pytest.mark.feature(
    "transformers: Wav2Vec2ForPreTraining", ops=("gumbel_softmax_hard",), modes=("compiled",)
)


@client
def test_wav2vec2_step(wav2vec2, patch):
    """One straight-through sample forward and backward; the loss and all gradients are finite."""
    model, batch = wav2vec2
    with DispatchLog() as counted:
        loss, perplexity, gradients = step(model, model, batch)
    assert counted.names == HARD_STEP
    assert loss.isfinite()
    # Two groups of eight codes: from 2, one code each, to 16, all codes alike.
    assert 2 < perplexity <= 16
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name in ("quantizer.weight_proj.weight", "quantizer.codevectors"):
        assert gradients[name].abs().max() > 0


@client
def test_wav2vec2_evaluation_is_untouched(wav2vec2):
    model, batch = wav2vec2
    model.eval()
    expected = model(**batch)
    with gumbel_ext.patch_torch(), DispatchLog() as counted:
        actual = model(**batch)
    assert counted.names == []
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.projected_quantized_states, expected.projected_quantized_states)


@client
def test_wav2vec2_trains(wav2vec2, patch):
    """On one batch, with the annealed temperature of the recipe."""
    model, batch = wav2vec2
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for i in range(25):
        model.set_gumbel_temperature(max(2.0 * 0.95**i, 0.5))
        out = model(**batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@client
@pytest.mark.parametrize("which", ["original", "patched"])
def test_wav2vec2_codes_follow_the_probabilities(wav2vec2, which, request):
    """Both: the codes of one frame, drawn 4000 times in each group (chi-square, alpha = 1e-4)."""
    if which == "patched":
        request.getfixturevalue("patch")
    quantizer = wav2vec2[0].quantizer
    with torch.no_grad():
        quantizer.codevectors.normal_()
        frame = torch.randn(1, 1, 16, device=quantizer.codevectors.device)
        probabilities = quantizer.weight_proj(frame).view(2, 8).softmax(-1)
        vectors, _ = quantizer(frame.expand(4, 1000, 16))
    codes = quantizer.codevectors.view(2, 8, 8)
    for group in range(2):
        drawn = torch.cdist(vectors.reshape(-1, 2, 8)[:, group], codes[group]).argmin(-1)
        counts = torch.bincount(drawn, minlength=8).cpu().double()
        expected = probabilities[group].cpu().double()
        expected *= 4000 / expected.sum()
        assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > ALPHA


@client
def test_wav2vec2_under_autocast(wav2vec2, patch, device):
    """The quantiser casts to float32 and back; the codes come out in the dtype of autocast."""
    model, batch = wav2vec2
    with torch.autocast(device, torch.bfloat16), DispatchLog() as counted:
        loss, _, gradients = step(model, model, batch)
    assert counted.names == HARD_STEP
    assert loss.isfinite()
    assert gradients["quantizer.weight_proj.weight"].abs().max() > 0


@compiled_client
@pytest.mark.usefixtures("clean_compiler", "patch")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_wav2vec2_compiled(wav2vec2):
    """As eager, from the same seed. The model itself breaks the graph, patched or not."""
    model, batch = wav2vec2
    # Otherwise it sets requires_grad in its forward, which Dynamo cannot follow.
    model.freeze_feature_encoder()
    expected = step(model, model, batch)
    backend = Recorded()
    actual = step(torch.compile(model, backend=backend), model, batch)
    assert sum(backend.ours) == 1
    for a, b in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(actual[2][name], gradient, rtol=1e-4, atol=1e-5)


@compiled_client
@pytest.mark.usefixtures("clean_compiler", "patch")
def test_wav2vec2_quantizer_in_one_graph(wav2vec2):
    """With inductor, fullgraph; the rest of the model stays eager."""
    model, batch = wav2vec2
    expected = step(model, model, batch)
    backend = Recorded("inductor")
    model.quantizer.compile(backend=backend, fullgraph=True)
    actual = step(model, model, batch)
    assert backend.ours == [1]
    torch.testing.assert_close(actual[0], expected[0])
    for name, gradient in expected[2].items():
        torch.testing.assert_close(actual[2][name], gradient, rtol=1e-4, atol=1e-5)


# ---- others in transformers ---------------------------------------------------------------------

QUANTIZERS = {
    "wav2vec2": "Wav2Vec2GumbelVectorQuantizer",
    "wav2vec2_conformer": "Wav2Vec2ConformerGumbelVectorQuantizer",
    "unispeech": "UniSpeechGumbelVectorQuantizer",
    "unispeech_sat": "UniSpeechSatGumbelVectorQuantizer",
    "wavlm": "WavLMGumbelVectorQuantizer",
}


@pytest.mark.feature(
    "transformers: other speech models", ops=("gumbel_softmax_hard",), modes=("eager",)
)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_of_speech_models(device, patch, name):
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = transformers.Wav2Vec2Config(**TINY)
    quantizer = getattr(modeling, QUANTIZERS[name])(config).to(device).train()
    with torch.no_grad():
        quantizer.codevectors.normal_()
    with DispatchLog() as counted:
        vectors, perplexity = quantizer(torch.randn(2, 30, 16, device=device))
        (vectors * torch.randn_like(vectors)).sum().backward()
    assert counted.names == HARD_STEP
    assert 2 < perplexity <= 16
    assert quantizer.weight_proj.weight.grad.abs().max() > 0


@pytest.mark.feature(
    "transformers: Ovis2 visual tokenizer",
    ops=("gumbel_softmax_hard",),
    modes=("eager", "compiled"),
)
@pytest.mark.usefixtures("clean_compiler", "patch")
def test_ovis2_visual_tokenizer(device):
    """The whole model in one graph, forward and backward, as eager from the same seed."""
    modeling = pytest.importorskip("transformers.models.ovis2.modeling_ovis2")
    torch.manual_seed(0)
    config = transformers.models.ovis2.configuration_ovis2.Ovis2VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vocab_size=37,
        tokenize_function="gumbel_argmax",
    )
    model = modeling.Ovis2VisionModel(config).to(device).train()
    images = torch.randn(2, 3, 16, 16, device=device)
    weight = torch.randn(2, 16, 32, device=device)

    def sample(function):
        model.zero_grad()
        torch.manual_seed(7)
        y = function(images).pooler_output
        (y * weight).sum().backward()
        return y.detach(), model.head_linear.weight.grad

    with DispatchLog() as counted:
        expected = sample(model)
    assert counted.names == HARD_STEP
    assert torch.equal(expected[0].sum(-1), torch.ones(2, 16, device=device))
    backend = Recorded()
    actual = sample(torch.compile(model, backend=backend, fullgraph=True))
    assert backend.ours == [1]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- vector-quantize-pytorch --------------------------------------------------------------------
#
# It samples codes from softmax(similarity / temperature) by the Gumbel-max trick with noise of its
# own. Two places take ours: its function `gumbel_noise`, and the sampler that a codebook holds.


def our_noise(like):
    return gumbel_ext.gumbel_noise(like.shape, dtype=like.dtype, device=like.device)


def our_sampler(logits, dim=-1, temperature=1.0, training=True, topk=None):
    """The signature of the package's gumbel_sample(), the index by gumbel_argmax()."""
    assert topk is None
    if training and temperature > 0:
        index = gumbel_ext.gumbel_argmax(logits / temperature, dim)
    else:
        index = logits.argmax(dim)
    return index, F.one_hot(index, logits.shape[dim]).type_as(logits)


@pytest.fixture(params=["noise", "sampler"])
def vector_quantizer(request, monkeypatch):
    """A function that makes a VectorQuantize whose codes are drawn by our ops."""

    def make(**options):
        torch.manual_seed(0)
        layer = vq.VectorQuantize(
            dim=8,
            codebook_size=16,
            use_cosine_sim=True,
            stochastic_sample_codes=True,
            sample_codebook_temp=0.3,
            **options,
        )
        if request.param == "sampler":
            layer._codebook.gumbel_sample = our_sampler
        return layer

    if request.param == "noise":
        monkeypatch.setattr(vq, "gumbel_noise", our_noise)
    make.op = {"noise": "gumbel_noise", "sampler": "gumbel_argmax"}[request.param]
    return make


vq_client = pytest.mark.feature(
    "vector-quantize-pytorch", ops=("gumbel_noise", "gumbel_argmax"), modes=("eager",)
)


@vq_client
def test_vector_quantizer_codes_follow_the_probabilities(device, vector_quantizer):
    """Codes of one vector, drawn 4000 times (chi-square, alpha = 1e-4)."""
    layer = vector_quantizer().to(device).train()
    x = torch.randn(1, 1, 8, device=device)
    codebook = F.normalize(layer.codebook.detach(), dim=-1)
    p = ((F.normalize(x, dim=-1) @ codebook.mT).flatten() / 0.3).softmax(-1).cpu().double()
    with DispatchLog() as counted:
        _, codes, _ = layer(x.expand(4, 1000, 8), freeze_codebook=True)
    assert counted.names == [vector_quantizer.op]
    counts = torch.bincount(codes.flatten().cpu(), minlength=16).double()
    assert stats.chisquare(counts.numpy(), (4000 * p / p.sum()).numpy()).pvalue > ALPHA


@vq_client
def test_vector_quantizer_draws_the_codes_of_gumbel_argmax(device, vector_quantizer):
    """Both places draw the same codes from the same seed, and none in evaluation."""
    layer = vector_quantizer().to(device).train()
    x = torch.randn(4, 20, 8, device=device)
    codebook = F.normalize(layer.codebook.detach(), dim=-1)
    logits = F.normalize(x, dim=-1).flatten(0, 1) @ codebook.mT / 0.3
    torch.manual_seed(5)
    codes = layer(x, freeze_codebook=True)[1]
    torch.manual_seed(5)
    expected = gumbel_ext.gumbel_argmax(logits).view(4, 20)
    # Similarities are computed in another order here: near-ties may fall the other way.
    assert (codes == expected).double().mean() > 0.98
    layer.eval()
    with DispatchLog() as counted:
        codes = layer(x)[1]
    assert counted.names == []
    assert torch.equal(codes, logits.argmax(-1).view(4, 20))


@vq_client
@pytest.mark.parametrize("rotation", [True, False], ids=["rotation", "straight-through"])
def test_vector_quantizer_trains(device, vector_quantizer, rotation):
    """An autoencoder of two linear layers around it."""
    torch.manual_seed(1)
    layer = vector_quantizer(rotation_trick=rotation).to(device)
    encoder, decoder = nn.Linear(12, 8).to(device), nn.Linear(8, 12).to(device)
    modules = nn.ModuleList([encoder, layer, decoder]).train()
    optimizer = torch.optim.Adam(modules.parameters(), lr=3e-2)
    data = torch.randn(4, 12, device=device)[torch.randint(0, 4, (8, 25), device=device)]
    losses = []
    for _ in range(25):
        quantized, _, commitment = layer(encoder(data))
        loss = F.mse_loss(decoder(quantized), data) + commitment.sum()
        optimizer.zero_grad()
        loss.backward()
        assert encoder.weight.grad.isfinite().all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
