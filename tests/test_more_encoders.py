"""Encoders of timm: where a position looks, what learns, where weights come from, and a whole run with random ones."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import EXAMPLES, example_names, run
from torch import nn

from patchnetvlad.checkpoints import write_checkpoint
from patchnetvlad.commands.models import fit_model
from patchnetvlad.commands.pairs import match_two
from patchnetvlad.config import Config, GlobalParams, TrainConfig
from patchnetvlad.encoders.table import encoder_geometry, make_encoder, same_encoder
from patchnetvlad.errors import UserError
from patchnetvlad.frozen_layers import FrozenPart, LearnedPart, freeze, learning_layers
from patchnetvlad.images import IMAGENET_MEAN, IMAGENET_STD
from patchnetvlad.model import PlaceModel
from patchnetvlad.patch_grid import EncoderGeometry, PatchGrid
from patchnetvlad.weights import initialise_encoder

ROOT = Path(__file__).parent.parent
timm = pytest.importorskip("timm", reason="timm is not installed")


def test_geometry_of_windows_on_paper():
    # Two 3×3 convolutions and a 2×2 pooling: 6 pixels, 2 apart, the first centre between pixels 0 and 1
    geometry = EncoderGeometry.of_windows([(3, 1, 1), (3, 1, 1), (2, 2, 0)])
    assert geometry == EncoderGeometry(stride=2, receptive_field=6, padding=2)
    assert geometry.first_center == 0.5
    vgg = [(3, 1, 1)] * 2 + [(2, 2, 0)] + [(3, 1, 1)] * 2 + [(2, 2, 0)]
    vgg += [(3, 1, 1)] * 3 + [(2, 2, 0)] + [(3, 1, 1)] * 3 + [(2, 2, 0)] + [(3, 1, 1)] * 3
    assert EncoderGeometry.of_windows(vgg) == EncoderGeometry()


# name: stride, centre of position 0, channels; by paper and pencil from the papers' convolutions
KNOWN = {
    "timm:resnet18": (16, 0.0, 256),  # 7×7 and 3×3 windows of stride 2, padded by half their size
    "timm:resnet18:layer2": (8, 0.0, 128),
    "timm:resnet18:1": (4, 0.0, 64),
    "timm:convnext_atto": (16, 7.5, 160),  # 4×4, 2×2 and 2×2, side by side
    "timm:efficientnet_lite0": (16, 0.0, 112),
    "timm:tf_efficientnet_lite0": (16, 15.0, 112),  # padded at the right and below: 1 + 2 + 4 + 8
    "efficientnet_lite0": (16, 15.0, 112),  # as TensorFlow's
    "half:efficientnet_lite0": (32, 30.5, 112),
    "timm:mobilenetv3_small_050": (16, 0.0, 24),
    "timm:vgg11": (16, 7.5, 512),
    "timm:densenet121:features.denseblock2": (8, 2.0, 512),  # 2×2 means at stride 4
    "timm:cs3darknet_focus_s": (16, 0.5, 256),  # the first layer joins 2×2 pixels
    "timm:vovnet39a:stages.1": (8, 4.0, 512),  # its first pooling begins at the border
    "timm:vit_tiny_patch16_224": (16, 7.5, 192),
    "timm:vit_small_patch14_dinov2.lvd142m:blocks.1": (14, 6.5, 384),
    "timm:vit_small_patch16_dinov3.lvd1689m:blocks.1": (16, 7.5, 384),
    "timm:swin_tiny_patch4_window7_224": (16, 7.5, 384),  # 4×4, then twice four tokens that become one
    "timm:pvt_v2_b0": (16, 0.0, 160),
}


@pytest.mark.parametrize("name", KNOWN)
def test_geometry_and_channels_without_weights(name):
    stride, first, channels = KNOWN[name]
    geometry = encoder_geometry(name)
    with torch.device("meta"):
        encoder = make_encoder(name)
    assert (geometry.stride, encoder.channels) == (stride, channels)
    assert geometry.first_center == first
    assert encoder.geometry == geometry


@pytest.mark.parametrize("name", [name for name in KNOWN if "pvt" not in name])
def test_a_dot_that_moves_is_seen_where_it_is(name):
    """The centre of what a dot changes follows the dot over a whole stride.

    Weights are random, and convolutions mirrored so that no side of a window counts more. A transformer without
    training spreads a dot over all tokens alike, by attention; that share is taken off.
    """
    torch.manual_seed(0)
    encoder = make_encoder(name).eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            weight.copy_((weight + weight.flip(2) + weight.flip(3) + weight.flip(2, 3)) / 4)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # some begin with blocks switched off
    stride = encoder.geometry.stride
    offsets = [stride * eighth // 8 - 1 for eighth in (1, 3, 5, 7)]  # of dots of 2×2 pixels around its middle
    places = [(8 * stride + row, 7 * stride + column) for row in offsets for column in offsets]
    pictures = torch.zeros(len(places), 3, 16 * stride, 16 * stride)
    for picture, (row, column) in zip(pictures, places, strict=True):
        picture[:, row : row + 2, column : column + 2] = torch.tensor([2.0, -2.0, 2.0])[:, None, None]
    with torch.inference_mode():
        change = torch.cat([encoder(picture[None]) for picture in pictures]) - encoder(torch.zeros_like(pictures[:1]))
    strength = change.square().sum(dim=1)
    strength = (strength - strength.flatten(1).median(dim=1).values[:, None, None]).clamp(min=0).double()
    centers = PatchGrid(*strength.shape[1:], 1, 1, encoder.geometry).centers().double()
    seen = (strength.flatten(1) @ centers) / strength.sum(dim=(1, 2))[:, None]  # x, y
    truth = torch.tensor(places, dtype=torch.float64).flip(1) + 0.5
    error = (seen - truth).mean(dim=0)
    assert error.abs().max() < 0.1 * stride


def test_resnet_position_looks_at_its_receptive_field():
    """With positive weights everywhere, the gradient of one position reaches its receptive field and nothing else."""
    encoder = make_encoder("resnet50").eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    assert encoder.geometry == EncoderGeometry(stride=16, receptive_field=267, padding=133)
    assert encoder.geometry.first_center == 0  # not 7.5 as for VGG16: the stride is in the 3×3 convolutions
    pictures = torch.rand(1, 3, 304, 304, generator=torch.Generator().manual_seed(0)).requires_grad_()
    feature_map = encoder(pictures)
    assert feature_map.shape == (1, 1024, 19, 19)
    feature_map[0, 0, 9, 9].backward()
    rows, columns = np.nonzero(pictures.grad[0].abs().sum(dim=0).numpy())
    center, reach = 16 * 9, 133
    assert (columns.min(), columns.max()) == (center - reach, center + reach)
    assert (rows.min(), rows.max()) == (center - reach, center + reach)


def test_keys_are_those_of_timm_without_what_lies_behind_the_map():
    keys = make_encoder("resnet50").state_dict().keys()
    assert {"model.conv1.weight", "model.bn1.running_mean", "model.layer3.5.bn3.bias"} <= keys
    assert not any(key.startswith(("model.layer4", "model.fc")) for key in keys)


def test_dinov2_tokens_lie_where_their_pixels_are():
    torch.manual_seed(0)
    encoder = make_encoder("dinov2").eval()
    pictures = torch.zeros(2, 3, 75, 100)  # 5×7 tokens, the rest cut off
    with torch.inference_mode():
        assert encoder(pictures).shape == (2, 384, 5, 7)
        before = encoder.model.patch_embed(pictures[..., :70, :98])
        pictures[0, :, 14 * 3 : 14 * 4, 14 * 2 : 14 * 3] = 1.0
        after = encoder.model.patch_embed(pictures[..., :70, :98])
    changed = (after - before).abs().sum(dim=-1)[0].nonzero()
    centers = PatchGrid(5, 7, 1, 1, encoder.geometry).centers()
    assert changed.tolist() == [[3, 2]]  # row, column
    assert centers[3 * 7 + 2].tolist() == [14 * 2 + 6.5, 14 * 3 + 6.5]


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_pictures_are_normalised_as_the_model_wants(name):
    """ImageNet's mean and deviation go in; these two want a half of each."""
    encoder = make_encoder(f"timm:{name}").eval()
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    seen = []
    forward = encoder.model.forward_intermediates
    encoder.model.forward_intermediates = lambda pictures, **options: (
        seen.append(pictures) or forward(pictures, **options)
    )
    with torch.inference_mode():
        encoder((pixels - mean) / std)
    torch.testing.assert_close(seen[0], (pixels - 0.5) / 0.5, atol=1e-5, rtol=1e-5)


def test_our_efficientnet_is_that_of_tensorflow():
    """Weights by their order, statistics of batch normalisation as small as some that are published."""
    torch.manual_seed(0)
    theirs, ours = make_encoder("timm:tf_efficientnet_lite0").eval(), make_encoder("efficientnet_lite0").eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0, 0.01)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    assert ours.geometry == theirs.geometry
    before, learned = ours.in_two()
    assert sum(
        parameter.numel() for name in ours.last_stage() for parameter in ours.get_submodule(name).parameters()
    ) == (sum(parameter.numel() for parameter in learned.parameters()))
    with torch.inference_mode():
        for height, width in ((96, 128), (64, 208)):
            pictures = torch.randn(2, 3, height, width)
            expected = theirs(pictures)
            torch.testing.assert_close(ours(pictures), expected, atol=1e-3 * expected.abs().max().item(), rtol=1e-4)
            torch.testing.assert_close(learned(before(pictures)), ours(pictures))
        assert ours(torch.zeros(1, 3, 95, 111)).shape == (1, 112, 5, 6)


SPLIT = {  # what learns, and whether the layers before it can be computed once and kept
    "timm:resnet18": (("layer3",), True),
    "timm:tf_efficientnet_lite0": (("blocks.3", "blocks.4"), True),
    "timm:convnext_atto": (("stages.2",), True),
    "timm:vit_tiny_patch16_224": (("blocks.10", "blocks.11", "norm"), False),
    "timm:vgg11": (("features.16", "features.18"), False),  # a ReLU between them
}


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("learns", ["last", "all", "none"])
def test_two_parts_equal_the_encoder_and_only_the_second_learns(name, learns):
    torch.manual_seed(0)
    model = PlaceModel(name, "netvlad", 4).eval()
    layers, kept = SPLIT[name]
    assert model.encoder.last_stage() == tuple(f"model.{layer}" for layer in layers)
    freeze(model, learns)
    pictures = torch.randn(2, 3, 64, 96)
    frozen, learned = FrozenPart(model, False, 0), LearnedPart(model, False)
    maps = frozen(pictures)
    descriptors, feature_map = learned(maps)
    with torch.no_grad():
        torch.testing.assert_close(descriptors, model(pictures), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(feature_map, model.encoder(pictures), atol=1e-6, rtol=1e-5)
    (descriptors[0] - descriptors[1]).norm().backward()
    changed = {key for key, value in model.encoder.named_parameters() if value.grad is not None}
    prefixes = {"last": tuple(f"model.{layer}." for layer in layers), "all": ("model.",), "none": ()}[learns]
    assert changed == {key for key, _ in model.encoder.named_parameters() if key.startswith(prefixes)}
    assert model.pool.centroids.grad is not None
    assert torch.equal(maps, pictures) == (learns == "all" or (learns == "last" and not kept))
    said = learning_layers(model)
    assert {"last": layers[0], "all": "all layers", "none": "nothing of the encoder"}[learns] in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm", "timm:NAME"),
        ("timm:resnet5o", "did you mean resnet50"),
        ("timm:resnet18.nobody", "no such weights, only a1_in1k"),
        ("timm:resnet18:layer7", "expected one of act1, layer1"),
        ("timm:resnet18:9", "or 0 to 4"),
        ("timm:volo_d1_224", "cannot be found"),
        ("vgg17", "expected one of vgg16"),
        ("vgg16:conv4", "expected one of vgg16"),
    ],
)
def test_what_is_no_encoder_is_refused(name, reason):
    for function in (encoder_geometry, make_encoder):
        with pytest.raises(UserError, match=reason) as refused:
            function(name)
        assert "\n" not in str(refused.value) and "backbone = " in str(refused.value)


def test_a_model_of_one_size_says_which():
    encoder = make_encoder("timm:beit_base_patch16_224:blocks.0").eval()
    with (
        pytest.raises(UserError, match=r"224×224 pixels alone, not 96×64 .*imageresizew = 224"),
        torch.inference_mode(),
    ):
        encoder(torch.zeros(1, 3, 64, 96))
    with pytest.raises(UserError, match="8×8 pixels is too small"):
        make_encoder("timm:resnet18").eval()(torch.zeros(1, 3, 8, 8))


def test_without_timm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs the timm package"):
        make_encoder("timm:resnet26")


def test_two_names_of_one_encoder():
    assert same_encoder("resnet50", "timm:resnet50.tv2_in1k:layer3")
    assert not same_encoder("resnet50", "timm:resnet50.a1_in1k")


def test_timm_is_imported_for_its_encoders_alone():
    code = (
        "import sys; from patchnetvlad.encoders.table import encoder_geometry, make_encoder\n"
        "make_encoder('vgg16'), encoder_geometry('rootsift')\n"
        "sys.exit('timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def started(backbone: str, pretrained: str) -> PlaceModel:
    """A model with its starting weights."""
    model = PlaceModel(backbone, "netvlad", 4)
    params = GlobalParams(backbone=backbone, pooling="netvlad", num_pcs=0)
    initialise_encoder(model, Config(global_params=params, train=TrainConfig(pretrained=pretrained)))
    return model.eval()


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A whole model as somebody would publish it, its classifier included."""
    torch.manual_seed(3)
    return {key: value.clone() for key, value in timm.create_model("mobilenetv3_small_050").state_dict().items()}


@pytest.mark.parametrize("kind", ["state.pth", "state_dict.pth.tar", "model.safetensors", "renamed.pth", "package:own"])
def test_weights_from_a_file_or_a_package(tmp_path, monkeypatch, caplog, published, kind):
    state = {f"layer_{n}.{key.rpartition('.')[2]}": value for n, (key, value) in enumerate(published.items())}
    state = state if kind == "renamed.pth" else published
    path = tmp_path / kind
    if kind.startswith("package:"):
        (tmp_path / "own" / "models").mkdir(parents=True)
        (tmp_path / "own" / "__init__.py").touch()
        torch.save(state, tmp_path / "own" / "models" / "weights.pth")
        monkeypatch.syspath_prepend(tmp_path)
    elif kind.endswith("safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind.endswith("tar") else state, path)
    backbone = "timm:mobilenetv3_small_050"
    model = started(backbone, kind if kind.startswith("package:") else str(path))
    for key, value in model.encoder.model.state_dict().items():
        torch.testing.assert_close(value, published[key], atol=0, rtol=0)
    assert ("taken in order" in caplog.text) == (kind == "renamed.pth")
    # As timm itself would see the picture
    whole = timm.create_model("mobilenetv3_small_050").eval()
    whole.load_state_dict(published)
    picture = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole.forward_intermediates(picture, intermediates_only=True)[3]
        torch.testing.assert_close(model.encoder(picture), expected, atol=1e-5, rtol=1e-4)


def test_an_encoder_is_taken_from_a_checkpoint(tmp_path):
    made = started("timm:mobilenetv3_small_050", "none")
    write_checkpoint(tmp_path / "made.pth.tar", made)
    model = started("timm:mobilenetv3_small_050", str(tmp_path / "made.pth.tar"))
    for key, value in made.encoder.state_dict().items():
        torch.testing.assert_close(model.encoder.state_dict()[key], value, atol=0, rtol=0)
    with pytest.raises(UserError, match=r"made\.pth\.tar: lacks encoder.*another architecture"):
        started("timm:resnet18", str(tmp_path / "made.pth.tar"))


def test_weights_that_do_not_fit_are_refused(tmp_path, published):
    path = tmp_path / "other.pth"
    torch.save(dict(list(published.items())[:7]), path)
    with pytest.raises(UserError, match="has 7 tensors"):
        started("timm:mobilenetv3_small_050", str(path))
    torch.save({f"x{n}.weight": torch.zeros(n) for n in range(500)}, path)
    with pytest.raises(UserError, match=r"has x0.weight \[0\] where the encoder has"):
        started("timm:mobilenetv3_small_050", str(path))
    path.with_suffix(".safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        started("timm:mobilenetv3_small_050", str(path.with_suffix(".safetensors")))
    with pytest.raises(UserError, match="no such package"):
        started("timm:mobilenetv3_small_050", "package:nobody_wrote_it")
    with pytest.raises(UserError, match="expected one file of weights"):
        started("timm:mobilenetv3_small_050", "package:hypothesis")


def test_torchvisions_vgg16_file_is_read(tmp_path):
    torch.manual_seed(0)
    state = {f"features.{key}": value for key, value in make_encoder("vgg16").state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(3)}, tmp_path / "vgg16.pth")
    model = started("vgg16", str(tmp_path / "vgg16.pth"))
    for key, value in model.encoder.state_dict().items():
        torch.testing.assert_close(value, state[f"features.{key}"], atol=0, rtol=0)


def test_random_weights_are_said(caplog):
    started("timm:mobilenetv3_small_050", "none")
    assert "random" in caplog.text
    caplog.clear()
    started("rootsift", "none")
    assert not caplog.text


@pytest.mark.parametrize("backbone", ["resnet50", "dinov2"])
def test_a_whole_run_with_random_weights(tmp_path, capsys, backbone):
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
    options = ["--config_path", "rootsift.ini", *(part for item in overrides for part in ("--set", item)), "-q"]
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
