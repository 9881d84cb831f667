"""What all commands share: common options, the device, logging, and how errors end."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from patchnetvlad.config import Config
from patchnetvlad.errors import UserError
from patchnetvlad.files import make_folder, told
from patchnetvlad.ini import load_config
from patchnetvlad.paths import require_file

logger = logging.getLogger("patchnetvlad")


class Parser(argparse.ArgumentParser):
    """An argument parser whose help says every default."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_Help)

    def add_config_options(self, default: str) -> None:
        """--config_path and --set."""
        self.add_argument("--config_path", default=default, metavar="INI", help="configuration file")
        self.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            help="change one key of the configuration; may be given several times",
        )

    def add_device_options(self) -> None:
        """--device and --nocuda."""
        self.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps")
        self.add_argument("--nocuda", action="store_true", help="the same as --device cpu")

    def add_output_options(self) -> None:
        """-q and -v."""
        self.add_argument("-q", "--quiet", action="store_true", help="only results, warnings and errors")
        self.add_argument("-v", "--verbose", action="store_true", help="details as well")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []) or action.required:
            return action.help
        return super()._get_help_string(action)


def run(
    parser: Parser,
    command: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn a user's mistake into one line and exit status 2."""
    parser.add_output_options()
    args = parser.parse_args(arguments)
    console = _log_to_console(args)
    try:
        return command(args) or 0
    except UserError as error:
        logger.debug("raised here", exc_info=True)
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, head for one, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - what is left is flushed there at exit
        return 1
    finally:
        logger.removeHandler(console)


def configuration(args: argparse.Namespace) -> Config:
    """The configuration that --config_path and --set describe."""
    return load_config(require_file(args.config_path, "configs"), args.overrides)


def device(args: argparse.Namespace) -> torch.device:
    """The device that --device and --nocuda ask for; raises UserError when there is none such."""
    name = "cpu" if args.nocuda else args.device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: must be auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine offers {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine offers none")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: must be auto, cpu, cuda, cuda:N or mps")
    return chosen


def folder(name: str, option: str) -> Path:
    """A folder that must exist; the empty name is the current one."""
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{option} {name}: no such folder")
    return path


def progress(args: argparse.Namespace) -> bool:
    """Whether to show progress bars."""
    return not args.quiet


def _log_to_console(args: argparse.Namespace) -> logging.Handler:
    logger.setLevel(logging.DEBUG)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    return console


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append everything that is logged, with times, to a file for as long as the context lasts."""
    make_folder(path.parent)
    with told(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.debug("command: %s", " ".join(sys.argv))
    try:
        yield
    except UserError as error:
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, str(error), (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
