"""Global descriptors of one encoder and patches of another: joined, stored, exported, ranked with a share of each."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import EXAMPLES, example_names, run

from patchnetvlad.checkpoints import build_model, join_models, read_checkpoint, write_checkpoint
from patchnetvlad.commands.models import combine_models, fit_model
from patchnetvlad.config import Config, FeatureMatchConfig, GlobalParams, TrainConfig
from patchnetvlad.encoders.rootsift import DenseRootSIFT
from patchnetvlad.encoders.table import encoder_geometry, make_encoder
from patchnetvlad.errors import UserError
from patchnetvlad.export.onnx_model import export_script
from patchnetvlad.ini import load_config
from patchnetvlad.model import PlaceModel
from patchnetvlad.netvlad import NetVLAD
from patchnetvlad.recognizer import PlaceRecognizer
from patchnetvlad.reranking import Reranking, fuse, with_similarities
from patchnetvlad.weights import initialise_encoder

SIZES = (2, 3)


def write_model(path: Path, backbone: str, clusters: int, num_pcs: int, seed: int) -> Path:
    torch.manual_seed(seed)
    model = PlaceModel(backbone, "netvlad", clusters, num_pcs)
    assert isinstance(model.pool, NetVLAD)
    channels = model.pool.channels
    model.pool.initialise(torch.rand(clusters, channels), torch.rand(200, channels) ** 4)
    write_checkpoint(path, model)
    return path


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half-size RootSIFT for the global descriptor, 24 of 32 dimensions; whole RootSIFT for patches."""
    folder = tmp_path_factory.mktemp("joined")
    first = write_model(folder / "global.pth.tar", "half:rootsift", 4, 32, 0)
    second = write_model(folder / "patches.pth.tar", "rootsift", 8, 24, 1)
    options = ["--global_path", str(first), "--patches_path", str(second), "-q"]
    assert combine_models([*options, "--output_path", str(folder / "both_WPCA24.pth.tar")]) == 0
    return folder


PARAMS = GlobalParams(backbone="half:rootsift", patch_backbone="rootsift", num_pcs=24, patch_sizes=SIZES)


def test_half_size_lies_where_the_pixels_are() -> None:
    whole, half = encoder_geometry("rootsift"), encoder_geometry("half:rootsift")
    # Position 0 is centred between pixels 7 and 8 of the half, which are pixels 14 to 17 of the whole picture
    assert (whole.stride, whole.first_center, half.stride, half.first_center) == (16, 7.5, 32, 15.5)
    pictures = torch.rand(2, 3, 128, 192)
    expected = DenseRootSIFT()(torch.nn.functional.avg_pool2d(pictures, 2))
    torch.testing.assert_close(make_encoder("half:rootsift")(pictures), expected)
    before, learned = make_encoder("half:vgg16").in_two()
    assert isinstance(before, torch.nn.Sequential) and len(list(learned.parameters())) == 6


def test_each_part_is_that_of_its_model(joined: Path) -> None:
    model = build_model(read_checkpoint(joined / "both_WPCA24.pth.tar"), PARAMS)
    pictures = torch.randn(2, 3, 96, 128)
    described = model.describe(pictures)
    parts = [read_checkpoint(joined / f"{name}.pth.tar") for name in ("global", "patches")]
    own = [
        GlobalParams(backbone="half:rootsift", pooling="netvlad", num_pcs=32),
        GlobalParams(backbone="rootsift", num_pcs=24, patch_sizes=SIZES),
    ]
    alone = [build_model(part, params).describe(pictures) for part, params in zip(parts, own, strict=True)]
    first = torch.nn.functional.normalize(alone[0].global_[:, :24], dim=1)
    torch.testing.assert_close(described.global_, first, atol=2e-3, rtol=0)  # WPCA is kept in 16 bits
    assert described.grids == alone[1].grids
    for ours, theirs in zip(described.patches, alone[1].patches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_encoders_are_kept_in_16_bits(tmp_path: Path) -> None:
    """Their convolutions alone, which are most of them; batch normalisation and clusters stay as they are."""
    first = write_model(tmp_path / "global.pth.tar", "half:efficientnet_lite0", 4, 24, 0)
    second = write_model(tmp_path / "patches.pth.tar", "rootsift", 8, 24, 1)
    options = ["--global_path", str(first), "--patches_path", str(second), "-q"]
    assert combine_models([*options, "--output_path", str(tmp_path / "both_WPCA24.pth.tar")]) == 0
    state = torch.load(tmp_path / "both_WPCA24.pth.tar", weights_only=True)["state_dict"]
    halves = {key for key, value in state.items() if value.dtype == torch.float16}
    convolutions = {key for key, value in state.items() if value.ndim == 4}
    assert convolutions - halves == {"pool.conv.weight", "patch_branch.pool.conv.weight"}
    assert halves < convolutions and len(halves) > 20
    params = replace(PARAMS, backbone="half:efficientnet_lite0")
    model, alone = (
        build_model(read_checkpoint(path), one)
        for path, one in (
            (tmp_path / "both_WPCA24.pth.tar", params),
            (first, GlobalParams(backbone="half:efficientnet_lite0", pooling="netvlad", num_pcs=24)),
        )
    )
    pictures = torch.randn(2, 3, 128, 192)
    similar = (model.describe(pictures).global_ * alone.describe(pictures).global_).sum(dim=1)
    assert similar.min() > 0.999


@pytest.mark.parametrize("names", [("half:vgg16", "vgg16"), ("vgg16", "half:vgg16"), ("half:half:vgg16", "half:vgg16")])
def test_an_encoder_at_half_size_starts_the_whole_one(names: tuple[str, str], tmp_path: Path) -> None:
    """And the other way round: their weights are the same, only what they are shown differs."""
    torch.manual_seed(4)
    made, model = (PlaceModel(name, "max") for name in names)
    write_checkpoint(tmp_path / "made.pth.tar", made)
    params = replace(PARAMS, backbone=names[1], patch_backbone=None)
    train = TrainConfig(pretrained=str(tmp_path / "made.pth.tar"))
    initialise_encoder(model, Config(global_params=params, train=train))
    before, after = made.encoder.state_dict(), model.encoder.state_dict()
    assert len(before) == len(after) and list(before) != list(after)
    assert all(map(torch.equal, before.values(), after.values()))


def test_a_global_model_of_the_same_file(joined: Path) -> None:
    checkpoint = read_checkpoint(joined / "both_WPCA24.pth.tar")
    alone = build_model(checkpoint, replace(PARAMS, pooling="netvlad", patch_backbone=None))
    both = build_model(checkpoint, PARAMS)
    pictures = torch.randn(1, 3, 96, 128)
    torch.testing.assert_close(alone.describe(pictures).global_, both.describe(pictures).global_)


def test_what_does_not_fit_is_refused(joined: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(joined / "both_WPCA24.pth.tar")
    with pytest.raises(UserError, match=r"made for patch_backbone = rootsift, the configuration says .* None"):
        build_model(checkpoint, replace(PARAMS, patch_backbone=None))
    with pytest.raises(UserError, match=r"made for patch_backbone = None, the configuration says .* rootsift"):
        build_model(read_checkpoint(joined / "patches.pth.tar"), replace(PARAMS, backbone="rootsift"))
    with pytest.raises(UserError, match="expected a model of one encoder"):
        join_models(checkpoint, checkpoint)
    parts = [read_checkpoint(joined / f"{name}.pth.tar") for name in ("global", "patches")]
    with pytest.raises(UserError, match="have 24 dimensions in common, not 30"):
        join_models(parts[0], parts[1], 30)
    with pytest.raises(UserError, match="pooling = netvlad has no patches"):
        Config(global_params=replace(PARAMS, pooling="netvlad"))
    options = ["--config_path", "rootsift.ini", "--dataset_root_dir", str(EXAMPLES), "-q", "--nocuda"]
    options += ["--output_path", str(tmp_path / "no.pth.tar")]
    assert fit_model([*options, "--set", "global_params.patch_backbone=rootsift"]) == 2
    assert fit_model([*options, "--set", "train.augmentation=noise"]) == 2


def test_a_whole_run(joined: Path, tmp_path: Path) -> None:
    overrides = [
        f"global_params.resumepath={joined / 'both_WPCA'}",
        *("global_params.num_pcs=24", "global_params.patch_sizes=2,3", "global_params.strides=1,1"),
        *("global_params.backbone=half:rootsift", "global_params.patch_backbone=rootsift"),
        *("feature_match.patchweights2use=0.6,0.4", "feature_match.global_weight=0.5"),
        *("feature_extract.imageresizew=160", "feature_extract.imageresizeh=120"),
        *("feature_match.imageresizew=160", "feature_match.imageresizeh=120"),
    ]
    options = ["--config_path", "rootsift.ini", *(part for item in overrides for part in ("--set", item))]
    queries, database = example_names("queries")[:4], example_names("database")[:8]
    results = run(options, EXAMPLES, tmp_path, queries, database)
    scores = np.load(results / "scores.npz")
    config = load_config(Path(__file__).parent.parent / "configs/rootsift.ini", overrides)
    places = PlaceRecognizer.load(config)
    described = places.database([EXAMPLES / name for name in database])
    for row, name in enumerate(queries):
        answers = described.query(EXAMPLES / name, top=8)
        assert [answer.index for answer in answers] == scores["indices"][row].tolist()
        np.testing.assert_allclose([answer.score for answer in answers], scores["fused"][row], atol=1e-4)
    export_script(places.model, 120, 160, tmp_path / "both.pt")


def test_share_of_the_similarity_by_hand() -> None:
    per_scale = np.array([[3.0], [2.0], [1.0], [2.0]])
    fused = fuse(per_scale, (1.0,))
    before = Reranking(np.argsort(-fused, kind="stable"), fused, per_scale)
    similarities = np.array([0.1, 0.1, 0.9, 0.9])
    after = with_similarities(before, similarities, 2.0)
    # z-scores of the patches are √2, 0, −√2, 0, those of the similarities −1, −1, 1, 1
    np.testing.assert_allclose(after.fused, [2**0.5 - 2, -2, 2 - 2**0.5, 2])
    assert after.order.tolist() == [3, 2, 0, 1] and before.order.tolist() == [0, 1, 3, 2]
    assert with_similarities(before, np.full(4, 0.3), 5.0).order.tolist() == before.order.tolist()
    assert FeatureMatchConfig().global_weight == 0
