"""Sets rivals up under .rivals/: `python -m bench.rivals.setup NAME ...`, or `all`.

Every step prints what it does and is passed over where it was done before. Where pip's own index
has no CPU build of torch, name PyTorch's in PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from bench.rivals.environments import LLAMACPP, PEFT, TRANSFORMERS, VLLM, RivalError
from bench.rivals.expected import write_expected
from bench.rivals.llamacpp_build import build_llamacpp
from bench.rivals.model_files import write_model_files
from bench.rivals.preload import unpack_tcmalloc

STEPS: dict[str, tuple[Callable[[], None], ...]] = {
    "models": (),
    "llamacpp": (LLAMACPP.install, build_llamacpp),
    "vllm": (VLLM.install, unpack_tcmalloc),
    "peft": (PEFT.install,),
    "transformers": (TRANSFORMERS.install,),
}


def main() -> None:
    """Set up what is named; the models are made in any case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*STEPS, "all"], metavar="NAME",
                        help=f"one of {', '.join(STEPS)}, or all")  # fmt: skip
    names = parser.parse_args().names
    steps = [write_model_files, write_expected]
    for name in STEPS if "all" in names else dict.fromkeys(names):
        steps += STEPS[name]
    try:
        for step in steps:
            step()
    except RivalError as error:
        sys.exit(f"bench.rivals.setup: {error}")


if __name__ == "__main__":
    main()
