"""What all commands share: common options, the device, logging, and how errors end.

Commands are felt at every start: their modules import what parses and checks arguments, and no torch. What does the
work is imported by the function that does it, once the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from patchnetvlad import __version__
from patchnetvlad.config import Config
from patchnetvlad.downloads import download_text, published_bytes, ways_out
from patchnetvlad.encoders.published import check_encoder_names
from patchnetvlad.errors import UserError
from patchnetvlad.ini import load_config, recorded_config
from patchnetvlad.paths import command_name, require_file

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("patchnetvlad")

_DEVICES = "auto, cpu, cuda, cuda:N or mps"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help says every default, and whose errors are UserErrors."""

    def __init__(self, description: str, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_Help)

    def add_config_options(self, default: str, recorded: bool = False) -> None:
        """--config_path and --set; recorded: without --config_path, what is recorded with features comes first."""
        said = f"; without it, the one recorded with the database's features, or else {default}" if recorded else ""
        self.set_defaults(default_config=default)
        self.add_argument(
            "--config_path", default=None if recorded else default, metavar="INI", help=f"configuration file{said}"
        )
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
        self.add_argument("--device", default="auto", type=_device_name, metavar="DEVICE", help=_DEVICES)
        self.add_argument("--nocuda", action="store_true", help="the same as --device cpu")

    def add_common_options(self, below: bool = False) -> None:
        """-q, -v and --version; below: of a subcommand, where they mean the same as before its name."""
        default = argparse.SUPPRESS if below else False
        for short, long, said in (
            ("-q", "--quiet", "only results, warnings and errors"),
            ("-v", "--verbose", "details as well"),
        ):
            self.add_argument(short, long, action="store_true", default=default, help=said)
        self.add_argument("--version", action="version", version=f"patchnetvlad {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, so that wrong arguments end as every other mistake does."""
        raise UserError(f"{message} (--help lists the options)")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], "") or action.required:
            return action.help
        return super()._get_help_string(action)


def run(
    parser: Parser,
    command: Callable[[argparse.Namespace], int | None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn a user's mistake into one line and exit status 2."""
    parser.add_common_options()
    console, level = logging.StreamHandler(sys.stderr), logger.level
    try:
        args = parser.parse_args(arguments)
        _log_to_console(console, args)
        # Torch reads this when it is imported: huge pages for large tensors halve the time that the system spends
        # on fresh memory. Without effect where the kernel offers none; 0 turns it off.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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
        logger.setLevel(level)


def run_step(script: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command as part of another, and print how it is run alone; its exit status."""
    print(f"\n$ {command_name(script)} {shlex.join(arguments)}", flush=True)
    return command(arguments)


def configuration(args: argparse.Namespace, features: Path | None = None) -> Config:
    """The configuration that --config_path and --set describe; features: a folder that may have recorded one."""
    path = recorded_config(features) if features and args.config_path is None else None
    if path is not None:
        logger.info("configuration: %s", path)
    config = load_config(path or require_file(args.config_path or args.default_config, "configs"), args.overrides)
    check_encoder_names(config)
    return config


def device(args: argparse.Namespace) -> torch.device:
    """The device that --device and --nocuda ask for; raises UserError when there is none such."""
    import torch

    name = "cpu" if args.nocuda else args.device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    from patchnetvlad.devices import require_device

    return require_device(name, "--device")


def how_to_use(checkpoint: Path, num_pcs: int, config_path: str, overrides: Sequence[str]) -> list[str]:
    """The two ways to use a checkpoint that has been written: in an INI file, and as options of a script.

    config_path, overrides: what else it needs.
    """
    keys = {"global_params.resumepath": str(checkpoint), "global_params.num_pcs": str(num_pcs)}
    kept = [text for text in overrides if text.partition("=")[0].strip().lower() not in keys]
    changes = [*kept, *(f"{key}={value}" for key, value in keys.items())]
    options = ["--config_path", config_path, *(word for change in changes for word in ("--set", change))]
    lines = "; ".join(f"{key.partition('.')[2]} = {value}" for key, value in keys.items())
    return [f"to use it, in a copy of {config_path}, [global_params]: {lines}", f"or as options: {shlex.join(options)}"]


def require_checkpoint(config: Config) -> None:
    """Refuse a configuration whose checkpoint is nowhere; ask on a terminal before a published one is fetched."""
    path = config.require_checkpoint()
    if path.exists() or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    named = download_text(path.name, published_bytes(path.name, path.parent))
    if not agreed(f"{named} is not at hand. Fetch it into {path.parent}?"):
        raise UserError(f"{path.name}: not at hand, and not to be fetched; {ways_out(path.parent)}")


def agreed(question: str) -> bool:
    """Ask on the terminal, yes being what is meant by nothing; raises UserError where nobody is there."""
    print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("", "y", "yes")
    except EOFError as error:
        raise UserError("there is nobody to ask") from error


def folder(name: str | Path, option: str, maker: str | None = None) -> Path:
    """A folder that must exist; the empty name is the current one. maker: the script that makes such folders."""
    path = Path(name)
    if not path.is_dir():
        advice = f" ({command_name(maker)} makes it)" if maker else ""
        raise UserError(f"{option} {name}: no such folder{advice}")
    return path


def file(name: str | Path, option: str) -> Path:
    """A file, or what can be read as one, that must exist where the name says."""
    path = Path(name)
    if not path.exists() or path.is_dir():
        raise UserError(f"{option} {name}: no such file")
    return path


def progress(args: argparse.Namespace) -> bool:
    """Whether to show progress bars."""
    return not args.quiet


def _device_name(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text) is None:
        raise argparse.ArgumentTypeError(f"{text}: must be {_DEVICES}")
    return text


def _log_to_console(console: logging.Handler, args: argparse.Namespace) -> None:
    logger.setLevel(logging.DEBUG)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    console.setLevel(logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)


class _WaitingFile(logging.FileHandler):
    """A log file in a folder that the work makes: until it is there, records wait.

    So a command that refuses what it was given leaves no folder behind.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.folder = path.parent
        self.waiting: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting.append(record)
        self._write()

    def close(self) -> None:
        """Write what waits, where the folder has been made after the last record."""
        self._write()
        super().close()

    def _write(self) -> None:
        if self.waiting and self.folder.is_dir():
            waiting, self.waiting = self.waiting, []
            try:
                for earlier in waiting:
                    super().emit(earlier)
            except OSError as error:
                raise UserError(f"{self.baseFilename}: cannot be written ({error.strerror})") from error


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append everything that is logged, with times, to a file for as long as the context lasts.

    The file's folder is for the work within to make; what is logged before that is written then. Raises UserError
    where the file is a symbolic link: what it leads to would be added to.
    """
    if path.is_symlink():
        raise UserError(f"{path}: is a symbolic link, and would be written through it (remove it)")
    handler = _WaitingFile(path)
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
