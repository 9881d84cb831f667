"""Poses against the kapture package and kapture-localization, on a small dataset that kapture itself writes."""

import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from patchnetvlad.commands.places import evaluate_poses
from patchnetvlad.datasets.makers import MAKERS, finish
from patchnetvlad.errors import UserError
from patchnetvlad.localization.pose_approximation import (
    approximate_poses,
    barycentric_weights,
    equal_weights,
    mean_pose,
    similarity_weights,
)
from patchnetvlad.localization.poses import (
    SUBMISSION_NAMES,
    Pose,
    by_condition,
    pose_errors,
    read_kapture,
    read_poses,
    score_poses,
    write_submission,
)
from patchnetvlad.result_files import NamedRanking, write_kapture_pairs


def refused(complaint: str):
    return pytest.raises(UserError, match=complaint)


def random_pose(rng: np.random.Generator, spread: float = 5.0) -> Pose:
    quaternion = rng.standard_normal(4)
    return Pose(quaternion / np.linalg.norm(quaternion), rng.standard_normal(3) * spread)


def near(pose: Pose, rng: np.random.Generator, metres: float, degrees: float) -> Pose:
    """A camera that far away and turned by that much."""
    axis, way = rng.standard_normal((2, 3))
    turn = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis))
    rotation = turn * Rotation.from_quat(pose.quaternion, scalar_first=True)
    center = pose.center + metres * way / np.linalg.norm(way)
    return Pose(rotation.as_quat(scalar_first=True), -rotation.apply(center))


@pytest.fixture(scope="module")
def kapture():
    pytest.importorskip("kapture_localization")
    return pytest.importorskip("kapture")


@pytest.fixture(scope="module")
def dataset(kapture, tmp_path_factory) -> Path:
    """A Kapture dataset of two rigs of two cameras: `mapping` with 12 pictures, `query` with 6 in three conditions."""
    from kapture.io.csv import kapture_to_dir

    rng = np.random.default_rng(3)
    root = tmp_path_factory.mktemp("kapture")

    def transform(pose: Pose):
        return kapture.PoseTransform(pose.quaternion.tolist(), pose.translation.tolist())

    mounted = {camera: random_pose(rng, 0.5) for camera in ("rear", "left")}
    for part, places in (("mapping", 6), ("query", 3)):
        sensors, rigs = kapture.Sensors(), kapture.Rigs()
        records, trajectories = kapture.RecordsCamera(), kapture.Trajectories()
        for camera, pose in mounted.items():
            sensors[camera] = kapture.Camera(kapture.CameraType.UNKNOWN_CAMERA, [32, 24])
            rigs["car", camera] = transform(pose)
        for time in range(places):
            trajectories[time, "car"] = transform(random_pose(rng))
            for camera in mounted:
                condition = "reference" if part == "mapping" else ("dawn", "night", "snow")[time]
                records[time, camera] = f"{condition}/{camera}/{time}.jpg"
        kapture_to_dir(
            str(root / part),
            kapture.Kapture(sensors=sensors, rigs=rigs, records_camera=records, trajectories=trajectories),
        )
        for time in range(places):
            for camera in mounted:
                path = root / part / "sensors" / "records_data" / records[time, camera]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return root


def test_poses_as_kapture_reads_them(kapture, dataset):
    from kapture.io.csv import kapture_from_dir
    from kapture_localization.evaluation import get_poses

    theirs = kapture_from_dir(str(dataset / "query"))
    ours = read_kapture(dataset / "query")
    names = [name for _, _, name in kapture.flatten(theirs.records_camera)]
    assert set(ours) == set(names) and len(ours) == 6
    for name, pose in get_poses(theirs, names):
        assert ours[name].translation == pytest.approx(np.array(pose.t).ravel(), abs=1e-9)
        assert abs(ours[name].quaternion @ np.array(pose.r_raw)) == pytest.approx(1)
        assert ours[name].center == pytest.approx(np.array(pose.inverse().t).ravel(), abs=1e-9)


@pytest.mark.parametrize("method", ["equal", "barycentric", "similarity"])
def test_approximations_as_kapture_localization(kapture, dataset, method):
    pytest.importorskip("cvxpy")  # with which it solves for barycentric weights
    from kapture.io.csv import kapture_from_dir
    from kapture_localization.image_retrieval.pairing import StackedGlobalFeatures
    from kapture_localization.pose_approximation import PoseApproximationMethods
    from kapture_localization.pose_approximation.pose_interpolation import get_interpolated_pose
    from kapture_localization.pose_approximation.weight_estimation import get_interpolation_weights

    rng = np.random.default_rng(1)
    mapping, query = (kapture_from_dir(str(dataset / part)) for part in ("mapping", "query"))
    database = read_kapture(dataset / "mapping")
    queries = read_kapture(dataset / "query")
    vectors = {part: np.abs(rng.standard_normal((count, 8))) for part, count in (("query", 6), ("mapping", 12))}
    vectors = {part: rows / np.linalg.norm(rows, axis=1, keepdims=True) for part, rows in vectors.items()}
    theirs = {
        "equal": PoseApproximationMethods.equal_weighted_barycenter,
        "barycentric": PoseApproximationMethods.barycentric_descriptor_interpolation,
        "similarity": PoseApproximationMethods.cosine_similarity,
    }[method]
    weights = get_interpolation_weights(
        theirs,
        StackedGlobalFeatures(np.array(list(queries), dtype=object), vectors["query"]),
        StackedGlobalFeatures(np.array(list(database), dtype=object), vectors["mapping"]),
        4,
        {"alpha": 8},
    )
    expected = get_interpolated_pose(mapping, query, weights)
    predictions = np.argsort(-(vectors["query"] @ vectors["mapping"].T), axis=1)
    ours = approximate_poses(
        predictions,
        list(database.values()),
        4,
        {"equal": equal_weights, "barycentric": barycentric_weights, "similarity": similarity_weights(8)}[method],
        vectors["query"],
        vectors["mapping"],
    )
    place_of = {name: (time, camera) for time, camera, name in kapture.flatten(query.records_camera)}
    for name, pose in zip(queries, ours, strict=True):
        theirs_pose = expected[place_of[name]]
        theirs_here = Pose(np.array(theirs_pose.r_raw), np.array(theirs_pose.t).ravel())
        assert pose_errors(pose, theirs_here) == pytest.approx((0, 0), abs=1e-5)


def test_barycentric_weights_are_the_best_that_sum_to_one():
    rng = np.random.default_rng(0)
    query, matches = rng.standard_normal(16), rng.standard_normal((4, 16))
    weights = barycentric_weights(query, matches)
    best = minimize(
        lambda w: np.square(w @ matches - query).sum(),
        np.full(4, 0.25),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-12,
    )
    assert weights == pytest.approx(best.x, abs=1e-4) and weights.sum() == pytest.approx(1)
    twice = barycentric_weights(query, matches[[0, 0]])
    assert twice == pytest.approx([0.5, 0.5])


def test_scores_as_kapture_localization(kapture):
    from kapture_localization.evaluation import evaluate_error_absolute, fill_bins

    rng = np.random.default_rng(5)
    truths = {f"night/{i}.jpg": random_pose(rng) for i in range(40)}
    offsets = [(0.1, 1), (0.3, 1), (0.1, 3), (3, 7), (6, 1), (1, 20), (0.24, 1.9), (0.26, 0)] * 5
    estimates = {name: near(pose, rng, *offset) for (name, pose), offset in zip(truths.items(), offsets, strict=True)}
    for name, offset in zip(truths, offsets, strict=True):
        assert pose_errors(estimates[name], truths[name]) == pytest.approx(offset, abs=1e-6)
    score = score_poses(estimates, truths)

    def listed(poses):
        return [(n, kapture.PoseTransform(p.quaternion.tolist(), p.translation.tolist())) for n, p in poses.items()]

    results = evaluate_error_absolute(listed(estimates), listed(truths))
    bins = fill_bins(results, [(0.25, 2), (0.5, 5), (5, 10)])
    assert score.percentages == tuple(100 * count / 40 for _, _, count in bins) == (25.0, 62.5, 75.0)
    del estimates["night/0.jpg"]
    assert score_poses(estimates, truths).percentages[0] == 22.5  # without an estimate: not within
    assert score_poses({}, truths).percentages == (0, 0, 0) and np.isnan(score_poses({}, truths).medians[0])


def test_mean_of_opposite_signs_and_matches_without_pose():
    rng = np.random.default_rng(2)
    pose = random_pose(rng)
    same = Pose(-pose.quaternion, pose.translation)
    assert pose_errors(mean_pose([pose, same], np.array([0.5, 0.5])), pose) == pytest.approx((0, 0), abs=1e-6)
    database = [None, pose, random_pose(rng)]
    found = approximate_poses(np.array([[0, 1, 2], [0, -1, -1]]), database)
    assert found == [pose, None]


def test_lists_of_kapture_folders(dataset, tmp_path):
    (made,) = MAKERS["robotcar"].make(dataset, only_posed=False)
    made, files = finish(made, dataset, tmp_path, tmp_path)
    assert "mapping/sensors/records_data/reference/left/0.jpg" in made.database.names and len(made.database) == 12
    truth = np.load(files.ground_truth)
    poses = read_kapture(dataset / "query")
    assert truth["utmQ"] == pytest.approx(np.stack([pose.center for pose in poses.values()]))
    trajectories = (dataset / "query/sensors/trajectories.txt").read_text()
    for part in ("query", "mapping"):
        (tmp_path / "held_back" / part / "sensors").mkdir(parents=True)
        for file in ("records_camera.txt", "rigs.txt", "trajectories.txt"):
            text = (dataset / part / "sensors" / file).read_text()
            (tmp_path / "held_back" / part / "sensors" / file).write_text(text)
    (tmp_path / "held_back/query/sensors/trajectories.txt").write_text(
        "".join(line for line in trajectories.splitlines(True) if not line.lstrip().startswith("1,"))
    )
    (held_back,) = MAKERS["robotcar"].make(tmp_path / "held_back", only_posed=False)
    assert held_back.ground_truth() is None and held_back.notes == ("2 of 6 pictures of query have no pose",)
    (posed,) = MAKERS["robotcar"].make(tmp_path / "held_back", only_posed=True)
    assert len(posed.queries) == 4 and "left out: 2 of 6" in posed.notes[0] and posed.ground_truth() is not None


def test_the_command_from_predictions_to_percentages_and_submission(dataset, tmp_path, capsys):
    (made,) = MAKERS["robotcar"].make(dataset, only_posed=False)
    _, files = finish(made, dataset, tmp_path, tmp_path)
    predictions = tmp_path / "predictions.txt"
    write_kapture_pairs(predictions, [NamedRanking(name, made.database.names[:3]) for name in made.queries.names])
    options = ["--predictions", str(predictions), "--query_file_path", str(files.queries)]
    options += ["--index_file_path", str(files.database), "--dataset_root_dir", str(dataset)]
    options += ["--database_poses", str(dataset / "mapping")]
    submission = tmp_path / "submission.txt"
    more = ["--query_poses", str(dataset / "query"), "--submission", str(submission), "--names", "robotcar"]
    assert evaluate_poses([*options, *more, "--json", str(tmp_path / "poses.json")]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 queries have a pose (best)" in printed
    assert [line.split()[0] for line in printed.splitlines()[2:6]] == ["dawn", "night", "snow", "all"]
    database = read_kapture(dataset / "mapping")
    first = database[made.database.names[0].removeprefix("mapping/sensors/records_data/")]
    written = read_poses(submission)
    assert "left/0.jpg" in written and len(written) == 6
    assert pose_errors(written["left/0.jpg"], first) == pytest.approx((0, 0), abs=1e-6)
    assert evaluate_poses([*options, "--approximation", "barycentric"]) == 2
    assert "needs --query_input_features_dir" in capsys.readouterr().err
    assert evaluate_poses([*options[:-1], str(dataset)]) == 2
    assert "neither a Kapture folder" in capsys.readouterr().err
    # the queries' own poses as the database: every query is exact
    own = ["--predictions", str(predictions), "--index_file_path", str(files.queries)]
    write_kapture_pairs(predictions, [NamedRanking(name, (name,)) for name in made.queries.names])
    own += ["--query_file_path", str(files.queries), "--database_poses", str(dataset / "query")]
    assert evaluate_poses([*own, "--query_poses", str(dataset / "query")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:5] == ["all", "6", "100.0", "100.0", "100.0"]


def test_colmap_models_and_hloc_poses(tmp_path):
    rng = np.random.default_rng(4)
    poses = {f"a/{i} b.jpg": random_pose(rng) for i in range(3)}
    text, binary = "# comment\n", struct.pack("<Q", 3)
    for number, (name, pose) in enumerate(poses.items(), start=1):
        values = (*pose.quaternion, *pose.translation)
        text += f"{number} {' '.join(map(repr, map(float, values)))} 1 {name}\n" + ("1 2 -1\n" if number % 2 else "\n")
        binary += struct.pack("<i7di", number, *values, 1) + name.encode() + b"\0"
        binary += struct.pack("<Q", number) + struct.pack("<ddq", 1, 2, -1) * number
    (tmp_path / "text").mkdir()
    (tmp_path / "text/images.txt").write_text(text)
    (tmp_path / "images.bin").write_bytes(binary)
    for path in (tmp_path / "text", tmp_path):
        read = read_poses(path)
        assert list(read) == list(poses)
        for name, pose in poses.items():
            assert pose_errors(read[name], pose) == pytest.approx((0, 0), abs=1e-6)
    lines = tmp_path / "poses.txt"
    write_submission(lines, {name.replace(" ", "_"): pose for name, pose in poses.items()})
    assert list(read_poses(lines)) == ["a/0_b.jpg", "a/1_b.jpg", "a/2_b.jpg"]
    (dataset,) = MAKERS["poses"].make(tmp_path, "text", "images.bin", images="pictures")
    assert dataset.queries.names[0] == "pictures/a/0 b.jpg"
    assert dataset.database.coordinates == pytest.approx(np.stack([pose.center for pose in poses.values()]))
    (tmp_path / "images.bin").write_bytes(binary[:-30])
    with refused("not COLMAP's images.bin, or damaged"):
        read_poses(tmp_path / "images.bin")


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("a.jpg 1 0 0 0 1 2", "line 2: expected qw qx qy qz tx ty tz"),
        ("a.jpg 0 0 0 0 1 2 3", "line 2: expected qw"),
        ("a.jpg 1 0 0 0 nan 2 3", "line 2: expected qw"),
        ("q.jpg 1 0 0 0 1 2 3", "line 2: q.jpg appears a second time"),
    ],
)
def test_poses_that_cannot_be_right(tmp_path, line, complaint):
    (tmp_path / "poses.txt").write_text(f"q.jpg 1 0 0 0 1 2 3\n{line}\n")
    with refused(complaint):
        read_poses(tmp_path / "poses.txt")


def test_conditions_and_submission_names(tmp_path):
    assert by_condition(["night/1.jpg", "dawn/2.jpg", "3.jpg"]) == {
        "(none)": ["3.jpg"],
        "dawn": ["dawn/2.jpg"],
        "night": ["night/1.jpg"],
    }
    with refused("expected a regular expression with one group"):
        by_condition(["a"], "night")
    assert SUBMISSION_NAMES["cmu"]("slice2/query/img_1.jpg") == "img_1.jpg"
    pose = Pose(np.array([1.0, 0, 0, 0]), np.zeros(3))
    with refused("is not a name of one picture"):
        write_submission(tmp_path / "s.txt", {"a/1.jpg": pose, "b/1.jpg": pose}, SUBMISSION_NAMES["cmu"])
