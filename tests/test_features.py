"""models/features.py: the mean of a CNN's last map by the layers called one by one (of a ViT: test_eval.py)."""
import pytest
import torch

from models.features import MeanFeatures
from models.nets import make

RESNET = "backbone.conv1 backbone.bn1 backbone.relu backbone.maxpool backbone.layer1 backbone.layer2 backbone.layer3"
LAYERS = {
    "unetformer": [*RESNET.split(), "backbone.layer4"],
    "deeplabv3": [*RESNET.split(), "backbone.layer4"],
    "effunet": [f"encoder.{i}" for i in range(8)],
}


@pytest.mark.parametrize("name, width", [("unetformer", 512), ("deeplabv3", 2048), ("effunet", 448)])
def test_features_are_the_mean_over_the_last_maps_of_all_windows(name, width):
    net = make(name, 3)[0].eval()
    features = MeanFeatures(net)
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, 32, 32, generator=g) for n in (3, 1)]  # of three windows and of one
    found = []
    with torch.no_grad():
        for windows in images:
            for some in windows.split(2):
                net(some)
            found.append(features.take())
        for x, got in zip(images, found):
            for layer in LAYERS[name]:
                x = net.get_submodule(layer)(x)
            assert got.shape == (width,) and x.shape[1] == width
            torch.testing.assert_close(got.float(), x.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
