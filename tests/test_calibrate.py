"""models/calibrate.py: the best temperature by another minimiser, a fair sample, files that do not fit."""
import json
import math

import numpy as np
import pytest
import torch
from gloo import on_ranks
from scipy.optimize import minimize_scalar

from data.common import IGNORE, BadInput
from models.calibrate import (
    PixelSample, confidence, fit_temperature, log_loss, probabilities, read_temperature)


def overconfident(n=3000, k=4, factor=2.5):
    """Logits (n, k) that are `factor` times too large, and labels drawn by the right ones."""
    g = torch.Generator().manual_seed(1)
    z = 1.5 * torch.randn(n, k, generator=g)
    return factor * z, torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]


def loss_by_hand(z, y, temperature):
    z = z.double().numpy() / temperature
    return float(np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y.numpy()]))


def test_the_temperature_has_the_lowest_log_likelihood():
    z, y = overconfident()
    found = fit_temperature(z, y)
    best = minimize_scalar(lambda t: loss_by_hand(z, y, t), bounds=(0.1, 10), method="bounded",
                           options=dict(xatol=1e-7))
    assert found == pytest.approx(best.x, rel=1e-4) and found == pytest.approx(2.5, abs=0.2)
    assert log_loss(z, y, found) == pytest.approx(loss_by_hand(z, y, found))
    assert fit_temperature(z / 5, y) == pytest.approx(found / 5, rel=1e-6)
    assert fit_temperature(z, z.argmax(1)) == pytest.approx(0.02)  # never wrong: as sure as may be
    assert fit_temperature(z, z.argmin(1)) == pytest.approx(50)


def test_confidence_and_probabilities_are_those_of_the_softmax():
    z = 30 * torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.4, 7.0):
        e = np.exp((z - z.max(0).values).double().numpy() / temperature)
        p = e / e.sum(0)
        np.testing.assert_allclose(confidence(z, temperature).numpy(), p.max(0), rtol=1e-5)
        got = probabilities(z, temperature)
        assert got.shape == (6, 7, 5) and got.dtype == np.uint8
        assert np.abs(got - 255 * p.transpose(1, 2, 0)).max() < 0.501


def images(n=5):
    """(logits, y) whose first logit numbers the pixels of all images; a part is ignored."""
    for i in range(n):
        y = torch.full((4, 5), i % 3)
        y[0] = IGNORE
        number = 100 * i + torch.arange(20.0).view(4, 5)
        yield torch.stack([number, 0 * number, 0 * number]), y


def add_in_two(sample, z, y, i):
    """Image number i, its last rows first."""
    keys = sample.keys(y, i)
    for rows in (slice(1, None), slice(0, 1)):
        sample.add(z[:, rows], y[rows], keys[rows])


def sampled(n, start=0, step=1):
    sample = PixelSample(n)
    for i, (z, y) in enumerate(images()):
        if i % step == start:
            add_in_two(sample, z, y, i)
    z, y = sample.pixels()
    return z[:, 0].int().tolist(), y.tolist()


def test_the_sample_is_of_labelled_pixels_each_once_and_the_same_on_any_ranks(tmp_path):
    whole, labels = sampled(1000)
    assert sorted(whole) == [100 * i + j for i in range(5) for j in range(5, 20)]
    assert labels == [number // 100 % 3 for number in whole]
    some, _ = sampled(9)  # fewer than an image has
    assert some == whole[:9]
    assert on_ranks(tmp_path, 2, lambda rank, world: sampled(9, rank, world)) == [sampled(9)] * 2


def test_each_pixel_is_as_likely_as_any_other():
    sample = PixelSample(4000)
    for i, size in enumerate((2000, 14000)):  # images of unequal size
        z = torch.stack([torch.full((1, size), float(i)), torch.arange(size).view(1, -1) / size])
        y = torch.zeros(1, size, dtype=torch.uint8)
        sample.add(z, y, sample.keys(y, i))
    z, _ = sample.pixels()
    share, place = z.mean(0).tolist()
    assert share == pytest.approx(14 / 16, abs=0.02)
    assert place == pytest.approx(0.5, abs=3 * math.sqrt(1 / 12 / 4000))


def test_a_temperature_counts_for_its_weights_alone(tmp_path):
    file = tmp_path / "calibration.json"
    assert read_temperature(tmp_path, "abc") is None
    file.write_text(json.dumps(dict(temperature=2, weights="abc")))
    assert read_temperature(tmp_path, "abc") == 2 and read_temperature(tmp_path, "abd") is None
    assert read_temperature(tmp_path / "best.safetensors", "abc") == 2
    for wrong in (0, -1, True, "2", None, 1e999):
        file.write_text(json.dumps(dict(temperature=wrong, weights="abc")))
        with pytest.raises(BadInput, match="calibration.json"):
            read_temperature(tmp_path, "abc")
