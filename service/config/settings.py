"""Reads settings from flags, the environment, a file, and defaults, in this order of priority.

Owns the command line's parser, the names of settings in each source, and the error for an invalid
value, which names the flag and the source. Knows nothing of what settings do.
"""

import difflib
import json
import os
import tomllib
from argparse import ArgumentParser, HelpFormatter, _ArgumentGroup
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict

from a2sf import __version__
from a2sf.errors import InvalidArgument, did_you_mean
from service.config.groups import GROUPS
from service.config.options import ServerOptions

PROGRAM = "a2sf-serve"
ENV_PREFIX = "A2SF_"
CONFIG_ENV = "A2SF_CONFIG"

EPILOG = (
    f"Every option can also be set in the environment (--max-batch as {ENV_PREFIX}MAX_BATCH) and "
    "in a TOML file (max_batch = 8). A flag overrides the environment, and the environment "
    "overrides the file; `none` as a flag or in the environment restores the default. "
    f"`{PROGRAM} plan` computes a server's memory and speed before it starts."
)


class _Sources(ServerOptions, BaseSettings):
    """The settings in the form that pydantic-settings' sources need; never instantiated.

    `ServerOptions` itself is a plain model, so code that makes one reads no other source.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_prefix_target="all",
        env_ignore_empty=True,
        env_parse_none_str="none",
        # One name per setting: `grace_s` is `--grace` and nothing else.
        validate_by_name=False,
        validate_by_alias=True,
        cli_prog_name=PROGRAM,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )


def names_of(group: type[ServerOptions] | Any) -> dict[str, str]:
    """Map the fields of `group` to their names in files, in order."""
    return {
        field: str(info.validation_alias or field) for field, info in group.model_fields.items()
    }


NAMES = names_of(ServerOptions)


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{ENV_PREFIX}{name.upper()}"


@dataclass(frozen=True)
class LoadedSettings:
    """The result of reading the command line."""

    options: ServerOptions
    sources: Mapping[str, str]
    """Source of each value that is not a default, by the setting's name."""
    print_config: bool
    misspelt: tuple[str, ...]
    """Environment variables that nearly match the name of a setting, with that name."""

    def as_toml(self) -> str:
        """Return all settings as TOML that can be read as a file again."""
        lines = [f"# {PROGRAM} {__version__}: the effective configuration"]
        for group in GROUPS:
            lines += ["", f"# {group.__doc__}"]
            for field, name in names_of(group).items():
                value = getattr(self.options, field)
                if value is None:
                    lines.append(f"# {name} is not set")
                    continue
                shown = str(value) if isinstance(value, Path) else value
                # Strings, numbers and booleans of JSON are valid TOML.
                written = json.dumps(shown, ensure_ascii=False)
                lines.append(f"{name} = {written}  # {self.sources.get(name, 'default')}")
        return "\n".join(lines) + "\n"


def load(arguments: Sequence[str]) -> LoadedSettings:
    """Read the flags, the process's environment, and the file that either one names.

    Raises InvalidArgument for invalid values, and SystemExit after printing help or the version.
    """
    parser = _Parser()
    source: CliSettingsSource[Any] = CliSettingsSource(
        _Sources, root_parser=parser, add_argument_method=_Parser.add_setting
    )
    parsed = parser.parse_args(arguments)
    flags = source(parsed_args=parsed)()
    environment = EnvSettingsSource(_Sources)()
    path = parsed.config or os.environ.get(CONFIG_ENV) or None
    file = _read(Path(path)) if path else {}
    sources = {
        **{name: str(path) for name in file},
        **{name: variable(name) for name in environment},
        **{name: flag(name) for name in flags},
    }
    try:
        given = {**file, **environment, **flags}
        # `none` restores the default, also of a setting that cannot be unset.
        options = ServerOptions.model_validate(
            {name: value for name, value in given.items() if value is not None},
            strict=False,
            by_alias=True,
            by_name=False,
        )
    except ValidationError as error:
        raise _invalid_setting(error, sources) from None
    return LoadedSettings(options, sources, parsed.print_config, tuple(_misspelt(os.environ)))


class _Parser(ArgumentParser):
    """A parser with one help section per group of settings; errors raise instead of printing."""

    def __init__(self) -> None:
        super().__init__(
            prog=PROGRAM,
            usage=f"{PROGRAM} [serve] [--config FILE] [OPTION ...]",
            description="Serve completions over gRPC with a KV cache of constant size, until "
            "SIGTERM or Ctrl-C.",
            epilog=EPILOG,
            formatter_class=partial(HelpFormatter, max_help_position=30),
            allow_abbrev=False,
            add_help=False,
        )
        general = self.add_argument_group("General")
        general.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        general.add_argument(
            "--version", action="version", version=__version__, help="Show the version and exit."
        )
        general.add_argument(
            "--config",
            metavar="FILE",
            help=f"TOML file with settings; also read from {CONFIG_ENV}.",
        )
        general.add_argument(
            "--print-config",
            action="store_true",
            help="Print every setting and its source, as a TOML file, and exit.",
        )
        self._sections: dict[str, _ArgumentGroup] = {}
        for group in GROUPS:
            section = self.add_argument_group(group.__doc__)
            self._sections.update(dict.fromkeys(names_of(group).values(), section))

    def add_setting(self, *flags: str, dest: str, help: str, **kwargs: Any) -> None:
        """Add the argument of a field to its section, with plainer metavars and defaults."""
        metavars = {"int": "N", "float": "SECONDS", "Path": "PATH", "str": "TEXT"}
        if "metavar" in kwargs:
            kwargs["metavar"] = metavars.get(kwargs["metavar"], kwargs["metavar"])
        for said, meant in (
            (" (default: none)", ""),
            ("(default: False)", "(default: off)"),
            ("(default: True)", "(default: on)"),
        ):
            help = help.replace(said, meant)
        self._sections[dest].add_argument(*flags, dest=dest, help=help, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise InvalidArgument instead of printing usage and exiting."""
        kind, _, unknown = message.partition(": ")
        hint = ""
        if kind == "unrecognized arguments":
            given = unknown.split()[0].partition("=")[0]
            hint = did_you_mean(given, self._option_string_actions)
        raise InvalidArgument("command line", f"{message}{hint}; see --help")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument("--config", f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument("--config", f"{path} is not TOML: {error}") from error
    for key in values:
        if key not in NAMES.values():
            near = difflib.get_close_matches(key, NAMES.values(), 1)
            hint = f"did you mean {near[0]}?" if near else "--print-config lists all settings"
            raise InvalidArgument("--config", f"{path}: unknown setting {key!r}; {hint}")
    return values


def _invalid_setting(error: ValidationError, sources: Mapping[str, str]) -> InvalidArgument:
    problem = error.errors(include_url=False)[0]
    if not problem["loc"]:
        # A rule about several settings; its error names them.
        refusal: InvalidArgument = problem["ctx"]["error"]
        return refusal
    name = str(problem["loc"][0])
    source = "" if sources[name] == flag(name) else f" (from {sources[name]})"
    return InvalidArgument(flag(name), f"{problem['input']!r}{source}; accepted: {_accepted(name)}")


def _accepted(name: str) -> str:
    """Describe in words what a setting accepts, by its JSON Schema."""
    schema = ServerOptions.model_json_schema()["properties"][name]
    schema = schema.get("anyOf", [schema])[0]
    match schema:
        case {"enum": [*words]}:
            return ", ".join(words)
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "integer" | "number" as kind}:
            number = "a whole number" if kind == "integer" else "a finite number"
            match schema:
                case {"minimum": least, "maximum": most}:
                    return f"{number} from {least} to {most}"
                case {"minimum": least}:
                    return f"{number}, {least:g} or more"
                case {"exclusiveMinimum": least}:
                    return f"{number} above {least:g}"
                case _:
                    return number
        case _:
            return "text"


def _misspelt(environment: Iterable[str]) -> Iterable[str]:
    # Other variables have this prefix too (the tuner's A2SF_DATA_DIR, and what Kubernetes sets for
    # a service of that name), so only near matches cause a warning.
    known = [variable(name) for name in NAMES.values()]
    for name in environment:
        if name.startswith(ENV_PREFIX) and name not in (*known, CONFIG_ENV):
            short = [each.removeprefix(ENV_PREFIX) for each in known]
            near = difflib.get_close_matches(name.removeprefix(ENV_PREFIX), short, 1, 0.8)
            if near:
                yield f"{name} (did you mean {ENV_PREFIX}{near[0]}?)"
