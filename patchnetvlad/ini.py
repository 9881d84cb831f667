"""INI text becomes a configuration, or one error that says what was expected; and a configuration becomes INI text.

Keys are those of the published files, in any case; a key that is absent takes its default. A picture size given in one
section holds in every section that gives none.
"""

import configparser
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

from patchnetvlad.config import (
    PICTURE_SIZE,
    SECTIONS,
    Config,
    FeatureExtractConfig,
    FeatureMatchConfig,
    GlobalParams,
    TrainConfig,
)
from patchnetvlad.config_values import Rule, value_text
from patchnetvlad.errors import UserError
from patchnetvlad.files import read_text, write_text
from patchnetvlad.paths import download_folder, find_file, shipped_folder

logger = logging.getLogger(__name__)

_RECORD = "settings.ini"  # in a folder of features
_SPELLED_OUT = {"imageresizewidth": "imageresizew", "imageresizeheight": "imageresizeh"}  # how they may be guessed


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read an INI file; an override, ``section.key=value``, replaces a key of the file, the last one wins.

    Raises UserError naming file (or override), section, key, value and what was expected.
    """
    values: dict[str, dict[str, object]] = {section: {} for section in SECTIONS}
    for place, section, key, text in (*_file_entries(path), *map(_override_entry, overrides)):
        values[section][key] = _parse(place, section, key, text)
    for key in PICTURE_SIZE:
        sized = [section for section in SECTIONS if section != "global_params"]
        given = [values[section][key] for section in sized if key in values[section]]
        for section in sized:
            if given:
                values[section].setdefault(key, given[0])
    # Each value has passed the rule of its key, which has the type of the field.
    return Config(
        FeatureExtractConfig(**values["feature_extract"]),  # type: ignore[arg-type]
        FeatureMatchConfig(**values["feature_match"]),  # type: ignore[arg-type]
        GlobalParams(**values["global_params"]),  # type: ignore[arg-type]
        TrainConfig(**values["train"]),  # type: ignore[arg-type]
        path,
        tuple(overrides),
    )


def config_text(config: Config) -> str:
    """The configuration as INI text with every key, which ``load_config`` reads back to an equal one.

    Raises UserError for a text that an INI file cannot hold, such as a path with " #" in it.
    """
    lines = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for item in fields(SECTIONS[section]):
            text = value_text(getattr(getattr(config, section), item.name))
            if text != " ".join(text.split()) or any(mark in f" {text}" for mark in (" #", " ;")):
                raise UserError(
                    f"[{section}] {item.name} = {text!r}: an INI file cannot hold blanks at an end "
                    "or in a row, line ends, or # or ; after a blank (choose another name)"
                )
            lines.append(f"{item.name} = {text}")
        lines.append("")
    return "\n".join(lines)


def record_config(config: Config, folder: Path) -> None:
    """Keep the configuration that a folder of features is made with, for ``recorded_config``.

    A file that it names beside its own is named by its whole path. A configuration that no INI file can hold is not
    kept, and a warning says so.
    """
    checkpoint, shipped = config.find_checkpoint(), (shipped_folder("pretrained_models"), download_folder())
    params, matching = config.global_params, config.feature_match
    if checkpoint is not None and checkpoint.parent not in shipped:
        params = replace(params, resumepath=str(checkpoint))
    if matching.pred_input_path is not None:
        given = find_file(matching.pred_input_path, "dataset_gt_files", config.path)
        matching = replace(matching, pred_input_path=str(given or matching.pred_input_path))
    path = folder / _RECORD
    try:
        text = config_text(replace(config, global_params=params, feature_match=matching))
    except UserError as error:
        logger.warning("%s: not written, matching must be told the configuration again (%s)", path, error)
        return
    write_text(path, text)


def recorded_config(folder: Path) -> Path | None:
    """The INI file that was kept with a folder of features, if there is one."""
    path = folder / _RECORD
    return path if path.is_file() else None


def _file_entries(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(place for errors, section, key, text) of each key of the file."""
    # A default section that no file can name: [DEFAULT] is refused like any other unknown section.
    parser = configparser.ConfigParser(
        interpolation=None,
        inline_comment_prefixes=("#", ";"),
        default_section="\n",
        empty_lines_in_values=False,
    )
    try:
        parser.read_string(read_text(path, "an INI file"))
    except configparser.DuplicateSectionError as error:
        raise UserError(f"{path}: line {error.lineno}: [{error.section}] appears a second time") from error
    except configparser.DuplicateOptionError as error:
        place = f"{path}: line {error.lineno}: [{error.section}] {error.option}"
        raise UserError(f"{place} appears a second time") from error
    except configparser.MissingSectionHeaderError as error:
        raise UserError(f"{path}: line {error.lineno}: expected a section such as [global_params]") from error
    except configparser.ParsingError as error:
        raise UserError(f"{path}: line {error.errors[0][0]}: expected key = value") from error
    for section in parser.sections():
        if section not in SECTIONS:
            raise UserError(f"{path}: [{section}]: unknown section{_closest(section, list(SECTIONS))}")
        for key, text in parser[section].items():
            yield f"{path}: [{section}] {key} = {' '.join(text.split())}", section, key, text


def _override_entry(override: str) -> tuple[str, str, str, str]:
    place = f"--set {override}"
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise UserError(f"{place}: expected section.key=value, such as global_params.threads=8")
    if section not in SECTIONS:
        raise UserError(f"{place}: unknown section {section}{_closest(section, list(SECTIONS))}")
    return place, section, key.strip().lower(), text.strip()


def _parse(place: str, section: str, key: str, text: str) -> object:
    keys = {item.name: item for item in fields(SECTIONS[section])}
    if key not in keys:
        homes = [other for other in SECTIONS if any(item.name == key for item in fields(SECTIONS[other]))]
        hint = f" (it belongs in [{homes[0]}])" if homes else _closest(key, list(keys))
        raise UserError(f"{place}: unknown key of [{section}]{hint}")
    rule: Rule[object] = keys[key].metadata["rule"]
    try:
        return rule.parse(text)
    except ValueError as error:
        hint = " (an indented line continues the line above it)" if "\n" in text else ""
        raise UserError(f"{place}: expected {rule.told}{hint}") from error


def _closest(word: str, known: list[str]) -> str:
    spelled = {name: name for name in known}
    spelled |= {full: short for full, short in _SPELLED_OUT.items() if short in known}
    close = [spelled[name] for name in get_close_matches(word.lower(), list(spelled), n=1)]
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"
