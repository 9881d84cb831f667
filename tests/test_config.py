"""INI files: published ones load unchanged, mistakes are named, configurations survive writing and reading."""

import dataclasses
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchnetvlad import paths
from patchnetvlad.config import (
    CHANGES,
    ENCODER_ALIASES,
    ENCODERS,
    Config,
    FeatureExtractConfig,
    FeatureMatchConfig,
    GlobalParams,
    TrainConfig,
)
from patchnetvlad.errors import UserError
from patchnetvlad.ini import config_text, load_config, record_config, recorded_config
from patchnetvlad.paths import shipped_folder

CONFIGS = Path(__file__).parent.parent / "configs"

# Written as users write them: mixed case, blanks after commas, comments, and without the sections of ours.
PUBLISHED_STYLE = """\
[feature_extract]
batchsize = 5
cacheBatchSize = 5
imageResizeW = 640
imageresizeh=480

[feature_match]
; a comment
matcher = RANSAC
n_values_all = 1, 5, 10, 20, 50, 100
dataset_name = None
pred_input_path = None  # candidates of another method
imageresizew : 640
imageresizeh = 480
patchWeights2Use = 0.45, 0.15, 0.4

[global_params]
pooling = patchnetvlad
resumePath = patchnetvlad/pretrained_models/mapillary_WPCA
threads = 0
num_pcs = 4096   ; dimensions
ngpu = 1
patch_sizes = 2, 5, 8
strides = 1, 1, 1
vladv2 = false
"""


def write(folder: Path, text: str, **kwargs: str) -> Path:
    path = folder / "config.ini"
    path.write_text(text, encoding=kwargs.get("encoding", "utf-8"), newline=kwargs.get("newline"))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_published_file(tmp_path: Path, encoding: str, newline: str) -> None:
    path = write(tmp_path, PUBLISHED_STYLE, encoding=encoding, newline=newline)
    config = load_config(path)
    assert config == Config(
        global_params=GlobalParams(resumepath="patchnetvlad/pretrained_models/mapillary_WPCA", threads=0)
    )
    assert config.feature_match.n_values_all == (1, 5, 10, 20, 50, 100)
    assert config.feature_match.patchweights2use == (0.45, 0.15, 0.4)
    assert config.feature_match.pred_input_path is None
    assert config.require_checkpoint().name == "mapillary_WPCA4096.pth.tar"
    assert config.path == path
    config.check_matching()
    config.check_training()


def test_absent_keys_take_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, ""))
    assert config == Config()
    assert config.global_params.vladv2 is False
    assert config.global_params.strides == (1, 1, 1)
    assert config.train.margin == 0.1


@pytest.mark.parametrize(
    ("name", "pcs", "sizes", "weights", "matcher"),
    [
        ("performance", 4096, (2, 5, 8), (0.45, 0.15, 0.4), "RANSAC"),
        ("speed", 512, (5,), (1.0,), "spatialApproximator"),
        ("storage", 128, (5,), (1.0,), "spatialApproximator"),
        ("rootsift", 512, (4, 5, 6), (0.3333, 0.3333, 0.3333), "spatialApproximator"),
        ("builtin", 768, (5,), (1.0,), "spatialApproximator"),
    ],
)
def test_shipped_matching_files(
    name: str, pcs: int, sizes: tuple[int, ...], weights: tuple[float, ...], matcher: str
) -> None:
    config = load_config(CONFIGS / f"{name}.ini")
    config.check_matching()
    assert config.global_params.pooling == "patchnetvlad"
    assert config.global_params.num_pcs == pcs
    assert config.global_params.patch_sizes == sizes
    assert config.global_params.strides == (1,) * len(sizes)
    assert config.feature_match.patchweights2use == weights
    assert config.feature_match.matcher == matcher
    assert config.feature_match.n_values_all == (1, 5, 10, 20, 50, 100)
    assert (config.feature_extract.imageresizew, config.feature_extract.imageresizeh) == (640, 480)
    ours = {"rootsift": "rootsift", "builtin": "efficientnet_lite0"}
    assert config.global_params.backbone == ours.get(name, "vgg16") and config.global_params.patch_backbone is None
    trained_on = name if name in ours else "mapillary"
    assert config.require_checkpoint().name == f"{trained_on}_WPCA{pcs}.pth.tar"


def test_other_shipped_files() -> None:
    extract = load_config(CONFIGS / "netvlad_extract.ini").global_params
    assert (extract.pooling, extract.num_pcs, extract.vladv2) == ("netvlad", 512, False)
    train = load_config(CONFIGS / "train.ini")
    assert train.train == TrainConfig()
    assert train.global_params.pooling == "netvlad"


def test_every_shipped_key_is_explained() -> None:
    for path in CONFIGS.glob("*.ini"):
        explained = False
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                explained = False
            assert "=" not in line or line.startswith("#") or explained, (path, line)
            explained = explained or line.startswith("#")


def test_checkpoint_by_the_beginning_of_its_name_or_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in ("vgg.pth.tar", "vgg64.pth.tar", "other.pth"):
        Path("models", name).touch()
    for resumepath, num_pcs, found in (
        ("models/vgg", 0, "vgg.pth.tar"),
        ("models/vgg", 64, "vgg64.pth.tar"),
        ("models/vgg64.pth.tar", 64, "vgg64.pth.tar"),
        ("models/vgg.pth.tar", 64, "vgg.pth.tar"),  # what is in it says that it does not fit
        ("models/other.pth", 64, "other.pth"),
        ("models/vgg", 32, None),
    ):
        config = Config(global_params=GlobalParams(num_pcs=num_pcs, resumepath=resumepath))
        assert config.find_checkpoint() == (tmp_path / "models" / found if found else None)
        if found is None:
            with pytest.raises(UserError, match=r"models/vgg64.pth.tar is there: set num_pcs to 64\)$"):
                config.require_checkpoint()


@pytest.mark.parametrize("name", ["builtin.ini", "rootsift.ini"])
def test_own_configurations_name_every_encoder(name: str) -> None:
    words = set(re.findall(r"\w+", (CONFIGS / name).read_text()))
    assert {encoder.partition(":")[0] for encoder in (*ENCODERS, *ENCODER_ALIASES)} <= words


def test_the_checkpoints_that_are_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    for name in ("own_WPCA64.pth.tar", "own_WPCA128.pth.tar", "own_WPCA.txt", "owner_WPCA32.pth.tar", "[x]7.pth.tar"):
        Path("demo", name).touch()
    both = "64.pth.tar and num_pcs to 64; demo/own_WPCA128.pth.tar is there: set resumepath to demo/own_WPCA128.pth.tar"
    for resumepath, said in (
        ("demo/own_WPCA", "128.pth.tar is there: set num_pcs to 128)"),
        ("demo/own_WPCA64", f"set resumepath to demo/own_WPCA{both} and num_pcs to 128)"),
        ("demo/own_WPCA32.pth.tar", f"set resumepath to demo/own_WPCA{both} and num_pcs to 128)"),
        ("demo/[x]", "demo/[x]7.pth.tar is there: set num_pcs to 7)"),
        ("demo/other_WPCA", "demo/other_WPCA4096.pth.tar and demo/other_WPCA: no such checkpoint"),
        ("demo/other.pth.tar", "demo/other.pth.tar: no such checkpoint (named whole"),
    ):
        with pytest.raises(UserError) as told:
            Config(global_params=GlobalParams(num_pcs=4096, resumepath=resumepath)).require_checkpoint()
        assert said in str(told.value) and "644096" not in str(told.value)
    # What is advised works
    for resumepath, num_pcs in (("demo/own_WPCA", 128), ("demo/own_WPCA64.pth.tar", 64)):
        assert Config(global_params=GlobalParams(num_pcs=num_pcs, resumepath=resumepath)).require_checkpoint().is_file()


def test_starting_weights_are_named_as_checkpoints_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine_WPCA64.pth.tar", "best.pth.tar", "weights.safetensors"):
        (tmp_path / name).touch()
    for source, found in (
        ("mine_WPCA", "mine_WPCA64.pth.tar"),
        ("mine_WPCA64", "mine_WPCA64.pth.tar"),
        ("mine_WPCA64.pth.tar", "mine_WPCA64.pth.tar"),
        ("best", "best.pth.tar"),
        ("weights.safetensors", "weights.safetensors"),
    ):
        config = Config(global_params=GlobalParams(num_pcs=64), train=TrainConfig(pretrained=source))
        assert config.require_pretrained() == tmp_path / found
    for source in ("imagenet", "none"):
        assert Config(train=TrainConfig(pretrained=source)).require_pretrained() is None
    for source in ("worst", "package:absent_package"):
        with pytest.raises(UserError, match=f"{source}: no such"):
            Config(train=TrainConfig(pretrained=source)).require_pretrained()


def test_published_checkpoint_is_named_where_it_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "download_folder", lambda: tmp_path)
    for resumepath in ("./pretrained_models/pittsburgh_WPCA", "pittsburgh_WPCA512.pth.tar"):
        config = Config(global_params=GlobalParams(num_pcs=512, resumepath=resumepath))
        assert config.find_checkpoint() is None
        assert config.require_checkpoint() == tmp_path / "pittsburgh_WPCA512.pth.tar"


def test_configurations_are_kept_with_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert recorded_config(tmp_path) is None
    shipped = load_config(shipped_folder("configs") / "rootsift.ini")
    record_config(shipped, tmp_path)
    path = recorded_config(tmp_path)
    assert path is not None and load_config(path) == shipped
    # What lies beside the INI or in the current folder is found again from another one
    (tmp_path / "mine").mkdir()
    for name in ("own64.pth.tar", "pairs.npy"):
        (tmp_path / "mine" / name).touch()
    text = "[global_params]\nresumepath = own\nnum_pcs = 64\n[feature_match]\npred_input_path = pairs.npy"
    ini = write(tmp_path / "mine", text)
    record_config(load_config(ini), tmp_path)
    monkeypatch.chdir(tmp_path)
    recorded = load_config(path)
    assert recorded.find_checkpoint() == tmp_path / "mine" / "own64.pth.tar"
    assert recorded.feature_match.pred_input_path == str(tmp_path / "mine" / "pairs.npy")
    assert recorded.path == path and not list(tmp_path.glob("*.partial"))
    record_config(dataclasses.replace(shipped, feature_match=FeatureMatchConfig(dataset_name="a #b")), tmp_path)
    assert "not written" in caplog.text and load_config(path) == recorded


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[global_params]\nnum_pc = 1", ["[global_params] num_pc = 1", "did you mean num_pcs?"]),
        ("[global_params]\nmatcher = RANSAC", ["belongs in [feature_match]"]),
        ("[global_param]\nnum_pcs = 1", ["[global_param]", "did you mean global_params?"]),
        ("[DEFAULT]\nnum_pcs = 1", ["[DEFAULT]", "unknown section", "known: feature_extract"]),
        ("[global_params]\nnum_pcs = many", ["num_pcs = many", "a whole number of 0 or more"]),
        ("[global_params]\nnum_pcs = -1", ["num_pcs = -1", "a whole number of 0 or more"]),
        ("[global_params]\nnum_pcs =", ["num_pcs = ", "a whole number"]),
        ("[global_params]\nnum_pcs = 5\n  threads = 2", ["5 threads = 2", "indented line"]),
        ("[global_params]\nvladv2 = maybe", ["vladv2 = maybe", "True or False"]),
        ("[global_params]\npooling = gem", ["pooling = gem", "netvlad, patchnetvlad, max, avg"]),
        ("[global_params]\npatch_sizes = 2,,5", ["patch_sizes = 2,,5", "whole numbers"]),
        ("[global_params]\npatch_sizes = 5,5\nstrides = 1,1", ["patch_sizes = 5,5", "different"]),
        ("[global_params]\nstrides = 1,0,1", ["strides = 1,0,1"]),
        ("[global_params]\nstrides = 1,1", ["strides = 1,1", "patch_sizes = 2,5,8"]),
        ("[global_params]\nresumepath =", ["resumepath", "some text"]),
        ("[feature_match]\nn_values_all = 0,5", ["n_values_all = 0,5", "1 or more"]),
        ("[feature_match]\npatchweights2use = 0,0,0", ["patchweights2use = 0,0,0", "not all 0"]),
        ("[feature_match]\npatchweights2use = nan,1,1", ["nan,1,1"]),
        ("[feature_match]\ncache_gb = inf", ["cache_gb = inf", "a number of 0 or more"]),
        ("[train]\nlr = 0", ["lr = 0", "a number above 0"]),
        ("[train]\nwhitening = 1.5", ["whitening = 1.5", "at most 1"]),
        ("[train]\noptim = RMSprop", ["optim = RMSprop", "SGD, ADAM, ADAMW"]),
        ("[train]\nseed = 1\nseed = 2", ["line 3", "[train] seed", "second time"]),
        ("[train]\nseed = 1\n[train]\n", ["line 3", "[train]", "second time"]),
        ("num_pcs = 1", ["line 1", "expected a section"]),
        ("[train]\nseed", ["line 2", "expected key = value"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, told: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(path), *told]:
        assert part in message


def test_files_that_are_no_ini(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "absent.ini")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    binary = tmp_path / "binary.ini"
    binary.write_bytes(b"\x93NUMPY\x80")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(binary)


def test_choices_in_any_case_become_ours(tmp_path: Path) -> None:
    text = "[feature_match]\nmatcher = RANSAC\n[train]\noptim = sgd\npretrained = None\n"
    config = load_config(write(tmp_path, text))
    assert config.feature_match.matcher == "RANSAC"
    assert config.train.optim == "SGD"
    assert config.train.pretrained == "none"
    assert load_config(config.path or Path(), ["train.pretrained=Models/None.pth"]).train.pretrained == (
        "Models/None.pth"
    )


def test_recall_counts_are_sorted_and_unique(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[feature_match]\nn_values_all = 10,1,5,1\n"))
    assert config.feature_match.n_values_all == (1, 5, 10)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, PUBLISHED_STYLE)
    config = load_config(
        path,
        [
            "global_params.threads=8",
            "global_params.threads = 9",
            "feature_match.PRED_input_path=a=b.npy",
            "global_params.resumepath=my models #1; new/x",
        ],
    )
    assert config.global_params.threads == 9
    assert config.feature_match.pred_input_path == "a=b.npy"
    assert config.global_params.resumepath == "my models #1; new/x"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("threads=8", "expected section.key=value"),
        ("global_params.threads", "expected section.key=value"),
        ("global.threads=8", "unknown section global"),
        ("global_params.thread=8", "did you mean threads?"),
        ("feature_extract.imagewidth=8", "did you mean imageresizew?"),
        ("feature_match.imageheight=8", "did you mean imageresizeh?"),
        ("global_params.threads=eight", "a whole number"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, ""), [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert told in str(caught.value)


def test_default_weights() -> None:
    def weights(*sizes: int) -> tuple[float, ...]:
        return Config(global_params=GlobalParams(patch_sizes=sizes)).feature_match.patchweights2use

    assert weights(5) == (1.0,)
    assert weights(2, 8) == (0.5, 0.5)
    assert weights(2, 5, 8) == (0.45, 0.15, 0.4)
    assert FeatureMatchConfig().patchweights2use == ()  # the default was not written into


def test_matching_needs_a_weight_for_each_size(tmp_path: Path) -> None:
    text = "[global_params]\npatch_sizes = 5\n[feature_match]\npatchweights2use = 0.5,0.5\n"
    config = load_config(write(tmp_path, text))  # extraction has no use for weights
    with pytest.raises(UserError, match=r"patchweights2use = 0\.5,0\.5: .*patch_sizes = 5$"):
        config.check_matching()


def test_a_picture_size_given_once_holds_everywhere(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[train]\nimageresizew = 320\n"))
    assert config.feature_extract.imageresizew == config.feature_match.imageresizew == 320
    assert config.feature_extract.imageresizeh == 480
    config.check_matching()
    config.check_training()


def test_picture_sizes_must_agree(tmp_path: Path) -> None:
    text = "[feature_extract]\nimageresizeh = 480\n[{}]\nimageresizeh = 240\n"
    config = load_config(write(tmp_path, text.format("feature_match")))
    with pytest.raises(UserError, match=r"\[feature_match\] imageresizeh = 240: expected 480"):
        config.check_matching()
    config = load_config(write(tmp_path, text.format("train")))
    with pytest.raises(UserError, match=r"\[train\] imageresizeh = 240: expected 480"):
        config.check_training()


# One key's text: words with single blanks between, which an INI file can hold.
words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Z", "C"], exclude_characters="#;"), min_size=1, max_size=9
)
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)
optional_texts = st.none() | texts.filter(lambda text: text.lower() != "none")
counts = st.integers(1, 10**9)
sizes = st.integers(-1, 4096)


@st.composite
def configurations(draw: st.DrawFn) -> Config:
    patch_sizes = tuple(draw(st.lists(counts, min_size=1, max_size=4, unique=True)))
    each = {"min_size": len(patch_sizes), "max_size": len(patch_sizes)}
    weight = st.floats(0, 1e300).map(abs)
    return Config(
        FeatureExtractConfig(
            imageresizew=draw(sizes),
            imageresizeh=draw(sizes),
            feature_dtype=draw(st.sampled_from(["float32", "float16", "int8", "pq1", "map32"])),
            exif_rotation=draw(st.booleans()),
        ),
        FeatureMatchConfig(
            matcher=draw(st.sampled_from(["RANSAC", "spatialApproximator"])),
            n_values_all=tuple(sorted(draw(st.sets(counts, min_size=1, max_size=5)))),
            dataset_name=draw(optional_texts),
            pred_input_path=draw(optional_texts),
            imageresizew=draw(sizes),
            patchweights2use=tuple(draw(st.lists(weight, **each).filter(any))),
            rerank_top=draw(st.none() | counts),
            index=draw(st.sampled_from(["Flat", "IVF16,PQ4x4fs"]) | texts.map("{}.json".format)),
            cache_gb=draw(weight),
            disk_cache_gb=draw(weight),
        ),
        GlobalParams(
            resumepath=draw(texts),
            num_pcs=draw(st.integers(0, 10**6)),
            patch_sizes=patch_sizes,
            strides=tuple(draw(st.lists(counts, **each))),
            vladv2=draw(st.booleans()),
            backbone=draw(st.sampled_from(["vgg16", "dinov2", "timm:a.b:c", "half:half:timm:a"])),
        ),
        TrainConfig(
            lr=draw(st.floats(0, 1e300, exclude_min=True)),
            augmentation=tuple(draw(st.lists(st.sampled_from(list(CHANGES)), unique=True))),
            whitening=draw(st.floats(0, 1).map(abs)),
            pretrained=draw(texts.filter(lambda text: text.lower() not in ("imagenet", "none"))),
            imageresizeh=draw(sizes),
        ),
    )


@given(configurations())
def test_round_trip(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(write(Path(folder), config_text(config))) == config


def test_text_has_every_key() -> None:
    text = config_text(Config())
    for section in ("feature_extract", "feature_match", "global_params", "train"):
        for item in dataclasses.fields(getattr(Config(), section)):
            assert f"\n{item.name} = " in text


@pytest.mark.parametrize("name", ["a #b", "a ;b", "#a", "a\nb", " a", "a  b"])
def test_text_that_an_ini_file_cannot_hold(name: str) -> None:
    with pytest.raises(UserError, match=r"\[global_params\] resumepath"):
        config_text(Config(global_params=GlobalParams(resumepath=name)))


def test_no_threads_means_as_many_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GlobalParams(threads=3).loading_threads == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 5, 7, 8}, raising=False)
    assert GlobalParams(threads=0).loading_threads == 5
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert GlobalParams(threads=0).loading_threads == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert GlobalParams(threads=0).loading_threads == 1


def test_what_an_override_breaks_is_blamed_on_it(tmp_path: Path) -> None:
    path = write(tmp_path, PUBLISHED_STYLE)
    for override, said in (
        ("global_params.patch_sizes=2,5", "[global_params] strides = 1,1,1"),
        ("Feature_Extract.imageresizew=320".lower(), "[feature_match] imageresizew = 640: expected 320"),
        ("feature_match.imageresizeh=240", "[feature_match] imageresizeh = 240: expected 480"),
        ("feature_match.patchweights2use=1,2", "[feature_match] patchweights2use = 1.0,2.0"),
        ("train.negative_radius=5", "[train] positive_radius = 10"),
    ):
        with pytest.raises(UserError) as refused:
            config = load_config(path, ["global_params.threads=2", override])
            config.check_matching()
            config.check_training()
        assert str(refused.value).startswith(f"--set {override}: {said}")
    other = write(tmp_path, PUBLISHED_STYLE.replace("strides = 1, 1, 1", "strides = 1, 1"))
    with pytest.raises(UserError, match=f"^{re.escape(str(other))}: "):
        load_config(other, ["global_params.threads=2"])
