"""What the documentation says to type works as written: commands, Python and the notebook, with the bundled model."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import tiny_model

from patchnetvlad.paths import find_file

ROOT = Path(__file__).parent.parent
MODEL = "builtin_WPCA768.pth.tar"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A line of a table whose last cell is one statement
STATEMENT = re.compile(r"^\| .+ \| `(\w[^`]*(?: = |\.\w+\()[^`]*)` \|$", re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, in which results do no harm."""
    for source in ROOT.iterdir():
        if source.suffix == ".py" or source.name in ("tools", "example_images", "patchnetvlad"):
            (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def tables_as_before() -> Iterator[None]:
    """Pages add encoders and matchers, of which later tests should know nothing."""
    from patchnetvlad.config import ENCODERS, MATCHERS

    before = [(table, set(table)) for table in (ENCODERS, MATCHERS)]
    yield
    for table, known in before:
        for name in set(table) - known:
            del table[name]


@pytest.fixture
def small_builtin(checkout: Path) -> Path:
    """The checkout with INI files of its own, found first: small pictures, RootSIFT, 8 clusters, to save time."""
    tiny_model(checkout)
    text = (ROOT / "configs" / "rootsift.ini").read_text(encoding="utf-8")
    for key, value in (("imageresizew", 320), ("imageresizeh", 240), ("num_pcs", 0), ("resumepath", "./tiny")):
        text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert count
    for name in ("builtin.ini", "rootsift.ini"):
        (checkout / name).write_text(text, encoding="utf-8")
    return checkout


def run_commands(text: str) -> None:
    """A block in bash, which stops at the first error; what it gives to `python` runs in this process.

    That spares the imports of a process each. `make` lines are left out: they build an environment of their own.
    """
    (asked, asking), (answered, answering) = os.pipe(), os.pipe()
    python = f"python() {{ printf '%s\\n' $# \"$@\" >&{asking}; read -r status <&{answered}; return $status; }}"
    script = "\n".join(["set -eu", python, re.sub(r"(?m)^make .*$", "", text)])
    with (
        subprocess.Popen(["bash", "-c", script], pass_fds=(asking, answered)) as shell,
        os.fdopen(asked, encoding="utf-8") as questions,
        os.fdopen(answering, "w", encoding="utf-8") as answers,
    ):
        os.close(asking)
        os.close(answered)
        while count := questions.readline():
            words = [questions.readline().removesuffix("\n") for _ in range(int(count))]
            print(run_script(*words), file=answers, flush=True)
    assert shell.returncode == 0, text


def run_script(script: str, *arguments: str) -> int:
    """The exit status of `python SCRIPT ARGUMENTS`."""
    before = sys.argv
    sys.argv = [script, *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # the pages say that TorchScript is deprecated
@pytest.mark.usefixtures("tables_as_before")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_written(page, small_builtin, monkeypatch):
    from patchnetvlad import realtime

    monkeypatch.setattr(realtime, "window", lambda: lambda frame: None)  # there is no screen
    text = page.read_text(encoding="utf-8")
    if page.stem == "migrate":  # its tables are in Python
        text = STATEMENT.sub(r"```python\n\1\n```", text)
        assert text.count("```python") > 30
    blocks = BLOCK.findall(text)
    assert {"bash", "python"} & {language for language, _ in blocks}
    names: dict[str, object] = {"__name__": "page"}
    for language, text in blocks:
        if language == "bash":
            run_commands(text)
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)
        else:
            assert language in ("text", "yaml"), "only what cannot run here is not run"
    assert any(path.is_file() for folder in ("demo", "results") for path in (small_builtin / folder).rglob("*"))


def headings(page: Path) -> list[str]:
    """As links name them: small letters, hyphens for blanks, no other marks."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


def test_every_link_of_the_pages_leads_somewhere():
    for page in PAGES:
        for target, _, heading in re.findall(r"\]\(([^)#]+)(#([^)]+))?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
            if heading:
                assert heading in headings(page.parent / target), f"{page.name}: {target}#{heading}"


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[^)#]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {(ROOT / target) for target in linked} == set(PAGES[1:])


def test_notebook_runs_with_the_bundled_model(checkout, monkeypatch):
    if find_file(MODEL, "pretrained_models") is None:
        pytest.skip(f"pretrained_models/{MODEL} is not here")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(checkout / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(checkout)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "of 12 queries" in outputs[-1]["text"]


# Of the published package (0.1.8): what other people's scripts import
PUBLISHED_NAMES = """
PATCHNETVLAD_ROOT_DIR input_transform PlaceDataset images numQ numDb get_positives PatchMatcher match all_keypoints
all_indices torch_nn gen_image_file_list get_backend get_model get_pca_encoding Flatten L2Norm NetVLAD init_params
PatchNetVLAD get_integral_feature get_square_regions_from_integral local_matcher calc_receptive_boxes
calc_keypoint_centers_from_patches normalise_func MSLS new_epoch update_subcache collate_fn ImagesFromList
default_cities get_clusters pca save_checkpoint train_epoch val convert_kapture_to_msls feature_extract feature_match
compute_recall write_kapture_output write_recalls_output match_two apply_patch_weights plot_two download_all_models
ask_yesno
"""


def test_every_published_name_is_on_the_page_of_the_published_code():
    text = BLOCK.sub("", (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8"))
    code = " ".join(re.findall(r"`([^`]+)`", text))
    assert not set(re.findall(r"\w+", PUBLISHED_NAMES)) - set(re.findall(r"\w+", code))
