"""Where the PEFT directories of the trained example adapters lie, by name; no more than that."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def shipped_adapters() -> dict[str, Path]:
    """Name → PEFT directory of every adapter that ships with the code, in alphabetical order."""
    configs = sorted(_HERE.glob("*/adapter_config.json"))
    return {config.parent.name: config.parent for config in configs}
