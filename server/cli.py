"""The command `manylora`: `manylora serve`, with a flag for every setting, and `manylora plan`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pydantic import ValidationError
from pydantic_settings import SettingsError

from server.config import Settings

USAGE = """usage: manylora serve [--help] [flags]
       manylora plan --gpu NAME --model NAME_OR_DIR [--help] [flags]
       manylora --version

serve   serve one base model and many LoRA adapters over an OpenAI-compatible HTTP API
plan    what a GPU could do at best: bytes, operations, time, memory, by arithmetic alone
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 2 at wrong arguments, 1 at a fault, 0 otherwise."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    match words:
        case ["serve", *flags]:
            _serve(parse_settings(flags))
        case ["plan", *flags]:
            _plan(flags)
        case ["--version"]:
            sys.stdout.write(f"manylora {version('manylora')}\n")
        case ["--help" | "-h"]:
            sys.stdout.write(USAGE)
        case _:
            sys.stderr.write(USAGE)
            sys.exit(2)


def parse_settings(flags: Sequence[str]) -> Settings:
    """The settings from flags, then from MANYLORA_… variables; exits with 2 where they are wrong.

    A flag wins over its variable.
    """
    try:
        return Settings(  # type: ignore[call-arg]  # these arguments are pydantic-settings' own
            _cli_parse_args=list(flags),
            _cli_prog_name="manylora serve",
            _cli_kebab_case=True,
            _cli_implicit_flags=True,
            _cli_hide_none_type=True,
            _cli_avoid_json=True,
        )
    except ValidationError as error:
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            flag = name.replace("_", "-")
            sys.stderr.write(
                f"manylora serve: --{flag} (or MANYLORA_{name.upper()}): "
                f"{fault['msg']}, got {fault['input']!r}\n"
            )
        sys.exit(2)
    except SettingsError as error:
        sys.stderr.write(f"manylora serve: {_unreadable(str(error))}\n")
        sys.exit(2)


def _unreadable(error: str) -> str:
    """What is wrong with the flag or variable of a field that is a list or a table."""
    if "tenant_weights" in error:
        variable, form = "MANYLORA_TENANT_WEIGHTS", """a JSON object: write {"NAME": WEIGHT}"""
        flag = "--tenant-weights NAME=WEIGHT"
    else:
        variable, form = "MANYLORA_ADAPTER", """a JSON list: write ["NAME=DIR", "NAME=DIR"]"""
        flag = "--adapter NAME=DIR"
    if variable not in os.environ:
        return f"a flag cannot be read: write {flag}"
    return f"{variable} is {os.environ[variable]!r}, not {form}, or use {flag}"


def _serve(settings: Settings) -> None:
    # Before torch and numba are imported, here and in the engine process: see docs/operations.md.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from server.serve import serve

    sys.exit(serve(settings))


def _plan(flags: Sequence[str]) -> None:
    from server.roofline.command import plan

    sys.exit(plan(flags))


if __name__ == "__main__":
    main()
