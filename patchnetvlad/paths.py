"""Where shipped files and the user's files are: in a checkout, installed from a wheel, in the older layout."""

import glob
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from patchnetvlad.errors import UserError

Kind = Literal["configs", "dataset_imagenames", "dataset_gt_files", "pretrained_models", "example_images"]
KINDS: tuple[str, ...] = get_args(Kind)

RUNS_FOLDER = "runs"  # of training, unless another is named
PUBLISHED_CHECKPOINTS = {  # local name: name on the hub
    f"{local}_WPCA{num_pcs}.pth.tar": f"{remote}_WPCA{num_pcs}.pth.tar"
    for local, remote in (("mapillary", "mapillary"), ("pittsburgh", "pitts"))
    for num_pcs in (128, 512, 4096)
}

_CHECKPOINT_END = ".pth.tar"
_WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
_PACKAGE = Path(__file__).resolve().parent
_OLD_LAYOUT = "patchnetvlad"  # folder that held the data folders in the published release
# What begins the names of a public dataset's files, and the arguments that make them
_MADE_BY = (
    (re.compile(r"pitts(30|250)k_(train|val)"), r"pitts\1k PICTURES --split \2"),
    (re.compile(r"pitts(30|250)k"), r"pitts\1k PICTURES"),
    (re.compile(r"(tokyo247|nordland)"), r"\1 PICTURES"),
    (re.compile(r"(robotcar|extended_cmu)"), r"\1 --help"),
    (re.compile(r"mapillary([a-z]+)"), r"msls PICTURES --cities \1"),
)


def shipped_folder(kind: Kind) -> Path:
    """Folder of shipped files: beside the package in a checkout, inside it when installed from a wheel."""
    return _shipped(kind)


def download_folder() -> Path:
    """Where downloaded weights go: ``pretrained_models`` of a checkout, otherwise of the user's cache.

    The folder may not exist yet.
    """
    checkout = _checkout()
    return (user_cache() if checkout is None else checkout) / "pretrained_models"


def user_cache() -> Path:
    """Folder of this toolkit in the user's cache; it may not exist yet, and whatever is in it may be deleted."""
    return _user_cache() / "patchnetvlad"


def in_checkout() -> bool:
    """Whether the scripts are at hand by their file names, and not only as installed commands."""
    return _checkout() is not None


def command_name(script: str) -> str:
    """How a script of the checkout, such as tools/measure.py, is called here: by its file, or by what is installed."""
    return f"python {script}" if in_checkout() else f"patchnetvlad-{Path(script).stem.replace('_', '-')}"


def making_folder(kind: Kind) -> Path:
    """Where made lists and ground truth go: the checkout's folder of the kind, otherwise the current folder."""
    return Path() if _checkout() is None else _shipped(kind)


def find_file(name: str, kind: Kind, beside: Path | None = None) -> Path | None:
    """The first existing file that ``name`` can mean, or None.

    Searched in this order: as given from the current folder; beside an INI file (``beside`` is the file or
    its folder); in the shipped folder of the kind, or of the kind that the name begins with; for checkpoints
    also in the folder of downloads and in ``pretrained_models`` of the older layout. A leading
    ``patchnetvlad/`` may be absent. A configuration may be named without ``.ini``.
    """
    return next((path for path in _candidates(name, kind, beside) if _is_readable_file(path)), None)


def require_file(name: str, kind: Kind, beside: Path | None = None) -> Path:
    """As ``find_file``; raises UserError naming the places searched when there is no such file."""
    path = find_file(name, kind, beside)
    if path is not None:
        return path
    if kind == "configs":
        advice = "shipped: " + ", ".join(sorted(file.stem for file in shipped_folder(kind).glob("*.ini")))
    else:
        advice = _advice(Path(name), kind)
    folders = dict.fromkeys(str(candidate.parent) for candidate in _candidates(name, kind, beside))
    advice = f" ({advice})" if advice else ""
    raise UserError(f"{name}: no such file, searched in {', '.join(folders)}{advice}")


def _advice(name: Path, kind: Kind) -> str:
    """The command that makes a file which is not there, as far as its name tells."""
    if kind == "pretrained_models":
        return f"{command_name('download_models.py')} fetches the published weights"
    if kind == "example_images":
        shipped = f"{command_name('match_two.py')} without pictures compares two of the examples here"
        return shipped if kind in name.parts else ""
    if name.suffix == ".json":
        return f"{command_name('tools/build_index.py')} makes search indices"
    maker = command_name("tools/make_dataset.py")
    for beginning, arguments in _MADE_BY:
        match = beginning.match(name.name)
        if match:
            return f"lists and ground truth are not shipped; made by: {maker} {match.expand(arguments)}"
    return f"{maker} makes lists and ground truth, of public datasets and of your own pictures"


def find_checkpoint(name: str, num_pcs: int, beside: Path | None = None) -> Path | None:
    """The checkpoint that a name means, wherever one is named, or None where there is no such file.

    The name is the file's without its end, which is the number of WPCA dimensions (nothing for 0) and ``.pth.tar``, or
    it is the whole file name. Searched as ``find_file`` says.
    """
    paths = (find_file(form, "pretrained_models", beside) for form in _checkpoint_names(name, num_pcs))
    return next((path for path in paths if path is not None), None)


def require_checkpoint(name: str, num_pcs: int, beside: Path | None = None) -> Path:
    """As ``find_checkpoint``; raises UserError when there is none.

    A published one that is nowhere at hand is named where it will be downloaded to, and is not there yet.
    """
    path = find_checkpoint(name, num_pcs, beside)
    if path is not None:
        return path
    forms = _checkpoint_names(name, num_pcs)
    for form in forms:
        if Path(form).name in PUBLISHED_CHECKPOINTS:
            return download_folder() / Path(form).name
    sizes = sorted(_sizes_at_hand(name, beside).items())
    if sizes:
        # A name that ends in a number of dimensions is not the beginning of the other names
        by_name = name.endswith((_CHECKPOINT_END, *"0123456789"))
        there = [
            f"{path} is there: set {f'resumepath to {path} and ' if by_name else ''}num_pcs to {size}"
            for size, path in sizes
        ]
        raise UserError(
            f"[global_params] resumepath = {name}: no such checkpoint with num_pcs = {num_pcs} ({'; '.join(there)})"
        )
    raise UserError(
        f"{' and '.join(forms)}: no such checkpoint (named whole, or without its end, which is num_pcs and .pth.tar; "
        f"published ones are {', '.join(PUBLISHED_CHECKPOINTS)}; configs/builtin.ini needs no download)"
    )


def _sizes_at_hand(name: str, beside: Path | None) -> dict[int, Path]:
    """Checkpoints that the name means with another number of dimensions, which stands in their names."""
    stem = name.removesuffix(_CHECKPOINT_END).rstrip("0123456789") or name
    by_size: dict[int, Path] = {}
    for form in _candidates(stem, "pretrained_models", beside):
        folder = form.parent
        for path in sorted(folder.glob(f"{glob.escape(form.name)}*{_CHECKPOINT_END}")) if folder.is_dir() else ():
            size = path.name[len(form.name) : -len(_CHECKPOINT_END)]
            if size.isdecimal():
                by_size.setdefault(int(size), _from_here(path))
    return by_size


def _from_here(path: Path) -> Path:
    """As it is called from the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def package_weights(package: str) -> Path:
    """The one file of weights in an installed Python package; raises UserError for none or several."""
    spec = find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError("no such package is installed")
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*")) if file.suffix in _WEIGHT_FILES]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"expected one file of weights in it, found {names}")
    return files[0]


def with_wpca(path: Path, num_pcs: int) -> Path:
    """What the checkpoint of this name is called once it has WPCA of so many dimensions."""
    return path.with_name(f"{path.name.removesuffix(_CHECKPOINT_END)}_WPCA{num_pcs}.pth.tar")


def check_new_checkpoint(path: Path, num_pcs: int | None, overwrite: bool) -> None:
    """Raises UserError for a checkpoint to be written that would replace a file, or whose name tells a wrong size.

    num_pcs: WPCA dimensions, None where they are not known yet.
    """
    named = re.search(r"WPCA(\d+)(?=\D*$)", path.name)
    if named is not None and num_pcs is not None and int(named.group(1)) != num_pcs:
        raise UserError(
            f"{path}: its name says {named.group(1)} dimensions, [global_params] num_pcs {num_pcs} (rename it, or set "
            "num_pcs)"
        )
    if path.is_dir():
        raise UserError(f"{path}: a folder (expected the name of a checkpoint, such as own_WPCA{num_pcs}.pth.tar)")
    if not path.name.endswith((_CHECKPOINT_END, *_WEIGHT_FILES)):
        raise UserError(f"{path}: expected a name that ends in {_CHECKPOINT_END}, such as {path.name}{_CHECKPOINT_END}")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already (--overwrite replaces it)")


def _checkpoint_names(name: str, num_pcs: int) -> tuple[str, ...]:
    return (name,) if name.endswith(_CHECKPOINT_END) else (f"{name}{num_pcs or ''}{_CHECKPOINT_END}", name)


def _checkout() -> Path | None:
    root = _PACKAGE.parent
    # Another package may have put a stray "configs" into site-packages, hence the second condition.
    return root if (root / "configs").is_dir() and (root / "pyproject.toml").is_file() else None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _shipped(kind: str) -> Path:
    checkout = _checkout()
    return (_PACKAGE if checkout is None else checkout) / kind


def _candidates(name: str, kind: Kind, beside: Path | None) -> Iterator[Path]:
    """Every path that the name can mean, best first, all absolute."""
    given = Path(name).expanduser() if name.startswith("~/") else Path(name)
    bare = Path(*given.parts[1:]) if given.parts[:1] == (_OLD_LAYOUT,) else given
    folders = [Path.cwd()]
    if beside is not None:
        folders.append((beside if beside.is_dir() else beside.parent).absolute())
    paths = [folder / form for folder in folders for form in (given, bare)]
    if not given.is_absolute():
        named_kind = bool(bare.parts) and bare.parts[0] in KINDS
        home, inner = (bare.parts[0], Path(*bare.parts[1:])) if named_kind else (kind, bare)
        places = [_shipped(home)]
        if home == "pretrained_models":
            old = Path(_OLD_LAYOUT) / home
            places += [download_folder(), Path.cwd() / home, Path.cwd() / old, _PACKAGE / home]
        paths += [place / inner for place in places]
    for path in dict.fromkeys(paths):
        yield path
        if kind == "configs" and path.suffix.lower() != ".ini":
            yield Path(f"{path}.ini")


def _is_readable_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()  # pipes of the shell, such as <(…), count too
    except (OSError, ValueError):  # a name too long, a folder that may not be entered, a NUL
        return False
