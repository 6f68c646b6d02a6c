"""Feature networks: what they capture, where weights are looked for, and the pooling of the FID network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from filtrun.errors import UserError
from filtrun.metrics import features
from filtrun.metrics.features import ClassifierFeatures, InceptionFeatures, feature_matrix, find_inception
from filtrun.metrics.small_cnn import SmallCNN


def test_classifier_features_are_the_input_of_the_head():
    net = SmallCNN(seed=0).train()
    x = torch.rand(10, 1, 8, 8)
    extract = ClassifierFeatures(net, "judge")
    got = feature_matrix(extract, x, batch_size=4)
    assert net.training and not net.head._forward_pre_hooks and not got.requires_grad
    torch.testing.assert_close(got, net.eval().features(x))
    assert extract.name == "judge" and got.shape == (10, 128)


def test_head_is_found_or_given_and_normalize_is_applied():
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.rand(5, 1, 2, 2)
    torch.testing.assert_close(ClassifierFeatures(body, "a")(x), body[:3](x))
    torch.testing.assert_close(ClassifierFeatures(body, "b", head=body[1])(x), x.flatten(1))
    torch.testing.assert_close(
        ClassifierFeatures(body, "c", head=body[1], normalize=lambda z: 2 * z - 1)(x), 2 * x.flatten(1) - 1
    )
    with pytest.raises(UserError, match="no linear layer"):
        ClassifierFeatures(nn.Sequential(nn.Conv2d(1, 1, 1)), "d")


def test_weights_are_looked_for_in_the_stated_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FILTRUN_INCEPTION", raising=False)
    assert find_inception() is None
    with pytest.raises(UserError, match="set FILTRUN_INCEPTION=FILE"):
        features.inception_features()
    cached = tmp_path / ".cache" / "filtrun" / "inception.safetensors"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_inception() == cached
    monkeypatch.setenv("FILTRUN_INCEPTION", str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="absent.pth is not a file"):
        find_inception()


@pytest.mark.filterwarnings("ignore")  # the scripted module is there to be refused, deprecated or not
def test_files_that_are_no_state_dict_are_refused(tmp_path):
    from safetensors.torch import save_file

    broken, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    broken.write_bytes(b"nothing")
    save_file({"fc.weight": torch.zeros(10, 2048)}, other)
    script = tmp_path / "c.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    module = tmp_path / "d.pth"
    torch.save(nn.Linear(2, 2), module)
    for path, text in (
        (broken, "not a readable"),
        (other, "1000 or 1008"),
        (script, "not a readable"),
        (module, "not a"),
    ):
        with pytest.raises(UserError, match=text):
            InceptionFeatures(path)


@pytest.mark.parametrize("classes", (1000, 1008))
def test_inception_features_are_pooled_activations_of_the_named_weights(tmp_path, classes):
    from filtrun.compat import torchvision

    torchvision()
    from safetensors.torch import save_file
    from torchvision.models import inception as source

    torch.manual_seed(0)
    # the ImageNet file carries its training head and input transform
    plain = source.Inception3(num_classes=classes, aux_logits=classes == 1000, init_weights=False).eval()
    path = tmp_path / "weights.safetensors"
    save_file(plain.state_dict(), path)
    net = InceptionFeatures(path)
    assert net.name.startswith("inception_v3-" + ("imagenet-" if classes == 1000 else "fid2015-"))
    x = torch.rand(1, 1, 32, 32)
    got = net(x)
    assert got.shape == (1, 2048)
    large = nn.functional.interpolate(x.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear", align_corners=False)
    plain.fc = nn.Identity()
    with torch.no_grad():
        reference = plain(2 * large - 1)
    if classes == 1000:
        torch.testing.assert_close(got, reference)
    else:  # the two differ by pooling alone, and not by much on random weights
        assert not torch.allclose(got, reference)
    for name, block in net.net.named_children():
        if hasattr(block, "branch_pool") and classes == 1008:
            channels = block.branch_pool.conv.in_channels
            z = torch.randn(1, channels, 5, 5)
            mean = nn.functional.unfold(z, 3, padding=1).reshape(channels, 9, 25).sum(1)
            count = nn.functional.unfold(torch.ones(1, 1, 5, 5), 3, padding=1).sum(1)
            pooled = (mean / count).reshape(1, channels, 5, 5)
            if name == "Mixed_7c":
                padded = nn.functional.pad(z, (1, 1, 1, 1), value=-1e9)
                pooled = nn.functional.unfold(padded, 3).reshape(channels, 9, 25).amax(1).reshape(1, channels, 5, 5)
            with torch.no_grad():
                expected = block.branch_pool(pooled)
                torch.testing.assert_close(block(z)[:, -expected.shape[1] :], expected, rtol=1e-4, atol=1e-5)
