"""ResNet-50 and DINOv2 as encoders: where a position looks, and a whole run with a model fitted on random weights."""

import sys

import numpy as np
import pytest
import torch
from tiny_run import EXAMPLES, example_names, run
from torch import nn

from patchnetvlad.commands.models import fit_model
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.encoders import make_encoder
from patchnetvlad.errors import UserError
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.resnet50 import ResNet50
from patchnetvlad.timm_encoder import DINOv2


def test_geometry_of_windows_on_paper():
    # Two 3×3 convolutions and a 2×2 pooling: 6 pixels, 2 apart, the first centre between pixels 0 and 1
    geometry = EncoderGeometry.of_windows([(3, 1, 1), (3, 1, 1), (2, 2, 0)])
    assert geometry == EncoderGeometry(stride=2, receptive_field=6, padding=2)
    assert geometry.first_center == 0.5
    vgg = [(3, 1, 1)] * 2 + [(2, 2, 0)] + [(3, 1, 1)] * 2 + [(2, 2, 0)]
    vgg += [(3, 1, 1)] * 3 + [(2, 2, 0)] + [(3, 1, 1)] * 3 + [(2, 2, 0)] + [(3, 1, 1)] * 3
    assert EncoderGeometry.of_windows(vgg) == EncoderGeometry()


def test_resnet_geometry_is_where_a_position_looks():
    """With positive weights everywhere, the gradient of one position reaches its receptive field and nothing else."""
    encoder = ResNet50().eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    assert encoder.geometry == EncoderGeometry(stride=16, receptive_field=267, padding=133)
    assert encoder.geometry.first_center == 0  # not 7.5 as for VGG16: torchvision's stride is in the 3×3 convolutions
    pictures = torch.rand(1, 3, 304, 304, generator=torch.Generator().manual_seed(0)).requires_grad_()
    feature_map = encoder(pictures)
    assert feature_map.shape == (1, 1024, 19, 19)
    feature_map[0, 0, 9, 9].backward()
    rows, columns = np.nonzero(pictures.grad[0].abs().sum(dim=0).numpy())
    center, reach = 16 * 9, 133
    assert (columns.min(), columns.max()) == (center - reach, center + reach)
    assert (rows.min(), rows.max()) == (center - reach, center + reach)


def test_resnet_keys_are_those_of_torchvision():
    keys = ResNet50().state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "layer3.5.bn3.bias"} <= keys
    assert not any(key.startswith(("layer4", "fc")) for key in keys)


def test_dinov2_tokens_lie_where_their_pixels_are():
    pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    encoder = DINOv2().eval()
    pictures = torch.zeros(2, 3, 75, 100)  # 5×7 tokens, the rest cut off
    with torch.inference_mode():
        assert encoder(pictures).shape == (2, 384, 5, 7)
        before = encoder.transformer.patch_embed(pictures[..., :70, :98])
        pictures[0, :, 14 * 3 : 14 * 4, 14 * 2 : 14 * 3] = 1.0
        after = encoder.transformer.patch_embed(pictures[..., :70, :98])
    changed = (after - before).abs().sum(dim=-1)[0].nonzero()
    centers = PatchGrid(5, 7, 1, 1, encoder.geometry).centers()
    assert changed.tolist() == [[3, 2]]  # row, column
    assert centers[3 * 7 + 2].tolist() == [14 * 2 + 6.5, 14 * 3 + 6.5]


def test_dinov2_without_timm_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs the timm package"):
        make_encoder("dinov2")


@pytest.mark.parametrize("backbone", ["resnet50", "dinov2"])
def test_a_whole_run_with_random_weights(tmp_path, capsys, backbone):
    if backbone == "dinov2":
        pytest.importorskip("timm", reason="timm is not installed")
    overrides = [
        f"global_params.backbone={backbone}",
        f"global_params.resumepath={tmp_path / 'own_WPCA'}",
        "global_params.num_pcs=16",
        "global_params.patch_sizes=3",
        "global_params.strides=1",
        "feature_match.patchweights2use=1",
        "feature_match.matcher=RANSAC",
        "feature_match.n_values_all=1,3",
        "feature_match.rerank_top=3",
        "train.num_clusters=4",
        "train.pretrained=none",
    ]
    for section in ("feature_extract", "feature_match"):
        overrides += [f"{section}.imageresizew=128", f"{section}.imageresizeh=96"]
    options = ["--config_path", "builtin.ini", *(part for item in overrides for part in ("--set", item)), "-q"]
    names = example_names("database")[:6]
    (tmp_path / "fit.txt").write_text("".join(f"{name}\n" for name in names))
    source = ["--dataset_root_dir", str(EXAMPLES), "--dataset_file_path", str(tmp_path / "fit.txt")]
    assert fit_model([*options, *source, "--output_path", str(tmp_path / "own_WPCA16.pth.tar"), "--nocuda"]) == 0
    results = run(options, EXAMPLES, tmp_path, names[:2], names, "--report")
    predictions = (results / "PatchNetVLAD_predictions.txt").read_text().splitlines()[2:]
    assert predictions[0] == f"{names[0]}, {names[0]}, 1"  # random weights too know a picture again
    assert predictions[3].startswith(f"{names[1]}, {names[1]},")
    capsys.readouterr()
    same = str(EXAMPLES / names[0])
    pair = ["--first_im_path", same, "--second_im_path", same, "--plot_save_path", str(tmp_path), "--nocuda"]
    assert match_two([*options, *pair]) == 0
    score = float(capsys.readouterr().out.split(": ")[1].split(". ")[0])
    assert score > 0.9  # identical pictures agree in nearly all patches
