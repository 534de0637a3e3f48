"""The examples run, and training moves where it should; docs/examples.md is what results say."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import gumbel_ext

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.cpu_only(reason="the examples' tensors are on the CPU")


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """The examples import each other as scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cells(folder, example, *arguments):
    """Runs an example and returns its numbers by row and column, all checked to be finite."""
    module = __import__(example)
    module.main([*arguments, "--seeds", "2", "--out", str(folder)])
    document = json.loads((folder / f"{example}.json").read_text())
    assert document["settings"]["seeds"] == [0, 1]
    for row in document["rows"].values():
        for values in row.values():
            assert len(values) in (0, 2)
            assert all(math.isfinite(value) for value in values)
    return document["rows"]


def test_categorical_vae(tmp_path, monkeypatch, capsys):
    import categorical_vae

    monkeypatch.setattr(categorical_vae, "TEST_SAMPLES", 5)
    monkeypatch.setattr(sys, "argv", ["", "--steps", "10", "--out", str(tmp_path)])
    categorical_vae.main()
    assert "test negative ELBO" in capsys.readouterr().out
    assert (tmp_path / "categorical_vae.png").stat().st_size > 10_000


def test_vae_estimators(tmp_path, monkeypatch):
    import vae_estimators

    monkeypatch.setattr(vae_estimators, "TEST_SAMPLES", 5)
    monkeypatch.setattr(vae_estimators, "LEARNING_RATES", (4e-3,))
    monkeypatch.setattr(vae_estimators, "TEMPERATURES", (1.0,))
    rows = cells(tmp_path, "vae_estimators", "--steps", "25")
    assert len(rows) == 10
    # An untrained model has log 2 for each pixel and a KL of almost nothing.
    for row in rows.values():
        assert max(row["test_nats"] + row["train_nats"]) < 0.9 * 64 * math.log(2)


def test_structured_prediction(tmp_path, monkeypatch):
    import structured_prediction

    monkeypatch.setattr(structured_prediction, "TEST_SAMPLES", 20)
    rows = cells(tmp_path, "structured_prediction", "--steps", "25")
    assert len(rows) == 8
    for row in rows.values():
        assert max(row["one"]) < 0.9 * 32 * math.log(2)
        assert all(many < one for many, one in zip(row["many"], row["one"], strict=True))


def test_multi_sample_loss():
    """The log of a mean of probabilities, by its definition."""
    import structured_prediction

    torch.manual_seed(0)
    losses = 20 * torch.rand(6, 3, dtype=torch.float64)
    expected = -(-losses).exp().mean(0).log()
    torch.testing.assert_close(structured_prediction.multi_sample_loss(losses), expected)


def test_semi_supervised(tmp_path):
    rows = cells(tmp_path, "semi_supervised", "--steps", "40")
    assert len(rows) == 4
    for name, row in rows.items():
        assert min(row["accuracy"]) > 40  # of ten classes, 10 % by guessing
        if not name.startswith("classifier"):
            assert max(row["test_nats"]) < 0.9 * 64 * math.log(2) + math.log(10)


def test_actor_critic(tmp_path, monkeypatch):
    import actor_critic

    monkeypatch.setattr(actor_critic, "RANDOM_STEPS", 50)
    monkeypatch.setattr(actor_critic, "TEST_EPISODES", 2)
    rows = cells(tmp_path, "actor_critic", "--steps", "100")
    assert len(rows) == 4
    for row in rows.values():
        assert 1 <= min(row["test_return"]) <= max(row["test_return"]) <= 500


def test_vector_quantizer(tmp_path):
    rows = cells(tmp_path, "vector_quantizer", "--steps", "20")
    assert len(rows) == 3
    for name, row in rows.items():
        # One code for all patches is the mean: 9.5 dB.
        assert min(row["psnr"]) > 12
        assert all(1 <= p <= 128 for p in row["perplexity"])
        assert all(
            p <= 1.28 * u + 1e-3 for p, u in zip(row["perplexity"], row["used"], strict=True)
        )
        if "without" not in name:
            other = rows["GumbelVectorQuantizer, without the diversity loss"]
            assert min(row["perplexity"]) > max(other["perplexity"])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_quantizers_agree(training):
    """On the same noise: pixels, codes, perplexities and the gradients of all parameters."""
    import vector_quantizer

    x = torch.randn(30, vector_quantizer.PIXELS)
    weight = torch.randn(30, vector_quantizer.PIXELS)
    schedule = vector_quantizer.ExponentialTemperature(0.1, start=2.0)
    schedule.step()

    def results(composite):
        torch.manual_seed(0)
        model = vector_quantizer.PatchCoder(schedule, codes=9, composite=composite)
        model.train(training)
        torch.manual_seed(3)
        pixels, quantized = model(x)
        loss = (weight * pixels).sum() + quantized.prob_perplexity
        parameters = list(model.parameters())
        return [pixels, *quantized, *torch.autograd.grad(loss, parameters)]

    ours = results(None)
    with gumbel_ext.patch_torch():
        theirs = results(vector_quantizer.multiply_and_sum)
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def exact_gradient(loss_of_class, logits):
    """Of the expected loss, one categorical variable, by its definition: a sum over the classes."""
    logits = logits.detach().clone().requires_grad_()
    (logits.softmax(-1) * loss_of_class).sum().backward()
    return logits.grad


def test_score_functions_are_unbiased():
    """With the exact gradient, both score-function estimators agree within their own error."""
    import vae_estimators

    torch.manual_seed(0)
    model = vae_estimators.CategoricalVAE()
    x = torch.randint(2, (1, 64)).float()
    latents, classes = 30, 10
    # All latent variables but the first are certain, so that ten cases are all there are.
    logits = torch.full((1, latents, classes), -200.0)
    logits[..., 0] = 0
    logits[:, 0] = torch.randn(classes)
    z = torch.zeros(classes, latents, classes)
    z[:, 1:, 0] = 1
    z[:, 0] = torch.eye(classes)
    with torch.no_grad():
        # An untrained decoder hardly cares for z.
        for parameter in model.decoder.parameters():
            parameter.mul_(4)
        losses = vae_estimators.negative_log_likelihood(model.decode(z), x)
    expected = exact_gradient(losses, logits[0, 0])
    assert expected.abs().max() > 0.1

    many = 2000
    for name in ("moving average", "leave-one-out"):
        method = next(m for key, m in vae_estimators.METHODS.items() if name in key)
        estimate = method.make()
        repeated = logits.expand(many, -1, -1).clone().requires_grad_()
        for _ in range(2):  # the moving average of the first call is the second's baseline
            repeated.grad = None
            estimate(model, x.expand(many, -1), repeated, 1.0).sum().backward()
        samples = repeated.grad[:, 0]
        error = samples.std(0) / math.sqrt(many)
        # Ten classes and two estimators at alpha = 1e-4 in all: 4.6 standard errors.
        assert ((samples.mean(0) - expected).abs() <= 4.6 * error + 1e-6).all(), name


def test_policy_gradients_agree():
    """Straight-through on a linear critic points where the exact gradient does; the score function
    is an estimate of it without bias.
    """
    import actor_critic

    torch.manual_seed(0)
    critics = actor_critic.TwoCritics(actor_critic.LinearCritic)
    many = 20_000
    state = torch.randn(1, 4).expand(many, -1)
    values = torch.tensor([1.0, -2.0])
    critics.of_all_actions = lambda state: values.expand(len(state), -1)
    critics.minimum = lambda state, action: (values * action).sum(-1)

    def gradients(method):
        logits = torch.tensor([0.3, -0.4]).expand(many, -1).clone().requires_grad_()
        method(critics, state, logits).sum().backward()
        return logits.grad

    exact = gradients(actor_critic.expectation)[0]
    score = gradients(actor_critic.score_function)
    error = score.std(0) / math.sqrt(many)
    # Two numbers, one the other's negative, at alpha = 1e-4: 3.9 standard errors.
    assert ((score.mean(0) - exact).abs() <= 3.9 * error).all()
    through = gradients(actor_critic.straight_through).mean(0)
    assert (through.sign() == exact.sign()).all()
    assert (through.abs() > 0.3 * exact.abs()).all()


def test_marginalised_is_the_exact_sum():
    """With the style's noise taken away, the batch of all classes is the sum one by one."""
    import semi_supervised

    torch.manual_seed(0)
    model = semi_supervised.StyleAndClass(classes=7)
    x = torch.randint(2, (5, 64)).float()
    style = torch.zeros(1).expand
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda mean: style(mean.shape))
        actual = semi_supervised.marginalised(model, x, 1.0)
        log_q = model.classifier(x).log_softmax(-1)
        expected = torch.zeros(5)
        for label in range(7):
            y = torch.nn.functional.one_hot(torch.full((5,), label), 7).float()
            expected += log_q[:, label].exp() * (model.bound(x, y) + log_q[:, label])
    torch.testing.assert_close(actual, expected)


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import pages

    return pages


def test_the_page_shows_the_results(pages, capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().err


def test_the_page_follows_the_results(pages, tmp_path, monkeypatch):
    """Another number makes --check fail; written, it stands in the page, and the text is kept."""
    monkeypatch.setattr(pages, "default_results", list)
    from results import Column, Results

    names = ("vae_estimators", "structured_prediction", "semi_supervised", "actor_critic", "times")
    sections = ["\n".join(pages.markers(name)) + "\n" for name in names]
    page = tmp_path / "examples.md"
    page.write_text("Before.\n" + "\n".join(sections) + "After.\n", encoding="utf-8")
    results = Results("actor_critic", [Column("score", "score", 1)], [3, 4], {"steps": 7})
    columns = [Column("rate", "rate", 2), Column("test_nats", "", 1), Column("train_nats", "", 1)]
    vae = Results("vae_estimators", columns, [3, 4], {"steps": 7})
    for each in (results, vae):
        for seed in each.each_seed(tmp_path / "examples"):
            values = {"score": 10.0} if each is results else {"test_nats": 1.0, "train_nats": 2.0}
            each.add("a method", **{key: value * seed for key, value in values.items()})
            if each is vae:
                each.add("a method", rate=0.25)

    for option, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        assert pages.main(["--docs", str(tmp_path), *option]) == code
    text = page.read_text(encoding="utf-8")
    assert "| a method | 35.0 ± 7.1 |" in text
    assert "| a method | 0.25 | 3.5 ± 0.7 | 7.0 ± 1.4 |" in re.sub(" +", " ", text)
    assert (tmp_path / "vae-estimators.png").read_bytes().startswith(b"\x89PNG")
    assert "7 steps, seeds 3 to 4" in text
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
