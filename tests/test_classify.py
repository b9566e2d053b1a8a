"""models/classify.py: k-NN and the linear probe against scikit-learn, CNNs against torchvision."""
import numpy as np
import pytest
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from models.classify import ChannelMeans, Classifier, Knn, cnn, fit_linear


@pytest.fixture(scope="module")
def blobs():
    """Features (N, 24) and labels of five classes, 600 to learn from and 300 others."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (5, 24)) * rng.uniform(0.1, 5, 24)
    y = rng.integers(0, 5, 900)
    x = centres[y] + rng.normal(0, 2, (900, 24)) * rng.uniform(0.5, 3, 24) + 3
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return x[:600], y[:600], x[600:], y[600:]


def standardised(x, by):
    return (x - by.mean(0)) / by.std(0, correction=0)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_is_scikit_learns(blobs, unit, k):
    x, y, x2, _ = blobs
    head = Knn(len(x), x.shape[1], 5, k, 0.5, unit).fit(x, y)
    if unit:
        a, b = (t / t.norm(dim=1, keepdim=True) for t in (x, x2))
    else:
        a, b = standardised(x, x), standardised(x2, x)
    oracle = KNeighborsClassifier(k, weights=lambda d: np.exp(-d**2 / (2 * 0.5)), algorithm="brute")
    oracle.fit(a.double().numpy(), y)
    p = head(x2).softmax(1).numpy()
    np.testing.assert_allclose(p, oracle.predict_proba(b.double().numpy()), atol=2e-3)
    same = p.argmax(1) == oracle.predict(b.double().numpy())
    assert same.mean() > 0.99  # ties may go either way


def test_the_linear_probe_is_as_good_as_logistic_regression(blobs):
    x, y, x2, y2 = blobs
    oracle = LogisticRegression(C=10.0, max_iter=2000).fit(standardised(x, x).numpy(), y)
    want = accuracy_score(y2, oracle.predict(standardised(x2, x).numpy()))
    probes = fit_linear(x, y, 5, [1e-4, 0.03, 0.1], epochs=60)
    got = [(probe(x2).argmax(1) == y2).float().mean().item() for probe in probes]
    assert 0.6 < want < 0.98 and max(got) == pytest.approx(want, abs=0.02)
    assert len(set(got)) > 1  # the rates are tried apart
    again = fit_linear(x, y, 5, [0.1], epochs=60)[0]
    torch.testing.assert_close(again.weight, probes[2].weight)


def test_channel_means_are_the_means():
    x = torch.randn(2, 3, 5, 7)
    net = Classifier(ChannelMeans(), nn.Identity(), "mean")
    torch.testing.assert_close(net(x), torch.tensor(x.numpy().mean((2, 3))))


def test_a_torchvision_file_fits_the_resnet_of_stem_imagenet():
    net = torchvision.models.resnet18(weights=None, num_classes=7).eval()
    ours = cnn("resnet18", "imagenet", 7).eval()
    ours.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), net(x))


@pytest.mark.parametrize("name", ["nano", "resnet18"])
@pytest.mark.parametrize("side", [64, 33, 28, 100])
def test_cnns_take_images_of_any_size(name, side):
    net = cnn(name, "small", 7).eval()
    assert net(torch.randn(2, 3, side, side)).shape == (2, 7)
