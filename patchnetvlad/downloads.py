"""Files from the internet: at once or not at all. A server that does not answer is asked once, for a few seconds."""

from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

ANSWER_SECONDS = 4.0


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
