"""Files from the internet: whole ones or none, and a server that does not answer is asked once, for a few seconds."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from patchnetvlad.errors import UserError
from patchnetvlad.files import file_sha256, make_folder, replacing, write_text
from patchnetvlad.paths import PUBLISHED_CHECKPOINTS

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 4.0
HUB_REPOSITORY = "TobiasRobotics/Patch-NetVLAD"  # of the published checkpoints


def require_answer(url: str) -> None:
    """Raises OSError unless the server of a URL answers, whatever it says, within ANSWER_SECONDS.

    The libraries that download try again and again, and say so each time; this is asked before.
    """
    answers: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=ANSWER_SECONDS).close()
        except HTTPError:
            answers.put(None)
        except (OSError, HTTPException) as error:
            answers.put(str(error.reason if isinstance(error, URLError) else error) or type(error).__name__)
        else:
            answers.put(None)

    # Looking a name up knows no time limit; a thread that is still at it must not keep the process from ending
    Thread(target=ask, daemon=True).start()
    host = urlsplit(url).hostname
    try:
        problem = answers.get(timeout=ANSWER_SECONDS)
    except Empty:
        raise OSError(f"{host} does not answer within {ANSWER_SECONDS:g} s") from None
    if problem is not None:
        raise OSError(f"{host}: {problem}")


def fetch_from_hub(repository: str, names: Sequence[str]) -> Path:
    """The first of the files that a repository of the Hugging Face hub has, from the hub's cache if it is there.

    Raises OSError when it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    require_answer(hf_hub_url(repository, names[0]))
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's HTTP library, and so its errors, change with its version
            raise OSError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
    raise OSError(f"{repository} has no {' or '.join(names)}")


def published_bytes(name: str, folder: Path) -> int | None:
    """What a published checkpoint, by its local name, will take in a folder; None where the hub does not say.

    Raises UserError when the hub cannot be reached.
    """
    with _reaching_hub(name, folder):
        return _on_hub(name)[1]


def fetch_published(name: str, folder: Path) -> Path:
    """Fetch one published checkpoint into a folder, by its local name; an interrupted download goes on.

    The file appears under its name only when it is whole and its SHA-256 is the hub's; the hash is kept beside it.
    Raises UserError when it cannot be fetched, or arrives as another.
    """
    from huggingface_hub import hf_hub_download

    target = folder / name
    with _reaching_hub(name, folder):
        expected, size = _on_hub(name)
        logger.info("fetching %s from %s into %s", download_text(name, size), HUB_REPOSITORY, folder)
        make_folder(folder)
        fetched = Path(hf_hub_download(HUB_REPOSITORY, PUBLISHED_CHECKPOINTS[name], local_dir=folder))
    digest = file_sha256(fetched)
    if re.fullmatch("[0-9a-f]{64}", expected) and digest != expected:
        fetched.unlink()
        raise UserError(f"{fetched}: SHA-256 {digest[:12]}… is not the hub's {expected[:12]}… (try again)")
    write_text(hash_file(target), f"{digest}  {name}\n")
    with replacing(target) as temporary:
        fetched.replace(temporary)
    return target


def download_text(name: str, size: int | None) -> str:
    """A file's name with its size in bytes, where that is known."""
    return name if size is None else f"{name} ({size / 1e6:.3g} MB)"


def hash_file(path: Path) -> Path:
    """Where the hash of a checkpoint that was fetched is kept."""
    return path.with_name(path.name + ".sha256")


def _on_hub(name: str) -> tuple[str, int | None]:
    """What the hub says of a published checkpoint: its hash, if it is one, and its bytes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(HUB_REPOSITORY, PUBLISHED_CHECKPOINTS[name])
    require_answer(url)
    metadata = get_hf_file_metadata(url, timeout=10)
    return metadata.etag or "", metadata.size


@contextmanager
def _reaching_hub(name: str, folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the hub into a UserError that says the ways out."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's HTTP library, and so its errors, change with its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: not at hand and cannot be fetched from the hub ({reason}); {ways_out(folder)}"
        ) from error


def ways_out(folder: Path) -> str:
    """What helps where a published checkpoint is not fetched into a folder."""
    return (
        f"ways out: go online and run download_models.py, copy the file from another machine into {folder}, or use "
        "configs/builtin.ini, whose model is included"
    )
