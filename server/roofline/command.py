"""`manylora plan`: its flags, and how it ends."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from server.config import Settings
from server.roofline.hardware import GPUS, find_hardware
from server.roofline.plan import Workload, make_plan
from server.roofline.report import to_json, to_text
from server.roofline.shapes import SHAPES, find_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.roofline.plan import Plan

DESCRIPTION = """Bytes, operations and least time of each kernel of a step, what fits into memory,
and the retention (speed with adapters ÷ speed of the base model alone) to expect: by arithmetic
from shapes and peak rates, without a model or a GPU. Formulae: docs/planning.md."""


def plan(flags: Sequence[str]) -> int:
    """Print the plan; 0, or 1 where the batch does not fit. Exits with 2 at wrong flags."""
    parser = _parser()
    given = parser.parse_args(flags)
    try:
        planned = _planned(given)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{to_json(planned)}\n" if given.json else to_text(planned))
    return 0 if planned.capacity.fits else 1


def _planned(given: argparse.Namespace) -> Plan:
    workload = Workload(
        batch=given.batch,
        context=given.context,
        num_adapters=given.batch if given.adapters is None else given.adapters,
        ranks=given.ranks,
        prefill_tokens=given.prefill,
    )
    hardware = find_hardware(
        given.gpu,
        memory_gb=given.memory,
        bandwidth_gb=given.bandwidth,
        tflops=given.tflops,
        cache_mib=given.cache,
    )
    return make_plan(find_shape(given.model), hardware, workload)


def _parser() -> argparse.ArgumentParser:
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    parser = argparse.ArgumentParser(
        prog="manylora plan",
        description=DESCRIPTION,
        epilog="Exits with 1 where the batch does not fit, with 2 at wrong flags.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", required=True, help=f"{', '.join(GPUS)}; or any name, with the rates below")
    add("--memory", type=float, metavar="GB", help="memory instead of the GPU's, 10^9 bytes")
    add("--bandwidth", type=float, metavar="GB/s", help="memory bandwidth instead of the GPU's")
    add("--tflops", type=float, metavar="N", help="10^12 dense 16-bit operations a second")
    add("--cache", type=float, metavar="MiB", help="last-level cache instead of the GPU's")
    names = ", ".join(shape.name for shape in SHAPES.values())
    add("--model", required=True, help=f"{names}; or a directory with a config.json")
    add("--batch", type=int, default=defaults["max_num_seqs"], help="sequences (%(default)s)")
    add("--context", type=int, default=1024, help="tokens of each sequence (%(default)s)")
    add("--adapters", type=int, help="distinct adapters in the batch (one for each sequence)")
    add("--ranks", type=_ranks, default=(16,), help="of the adapters in turn, as in 8,16,64 (16)")
    add(
        "--prefill",
        type=int,
        default=defaults["max_batched_tokens"],
        help="tokens of a prefill step, in prompts of --context tokens (%(default)s)",
    )
    add("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of ranks: write integers and commas, as in 8,16,64"
        ) from None
