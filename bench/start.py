"""How long from `manylora serve` to ready, the first time and after that, and where memory peaks?

Starts a real server several times on one data directory; the first start may compile kernels and
convert files that the later ones find on disk. Each server has to answer a request before it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from bench.http_client import HttpClient
from bench.record import add_model_flag, arguments, changed, engine_settings, finish, spread
from bench.server_process import server_process
from bench.workloads import RandomPrompts
from server.engine.spec import engine_spec

MAX_SECONDS = 12.0  # of a start after the first


def main() -> None:
    """Run the bench and print its results."""
    parser = arguments(__doc__)
    add_model_flag(parser)
    parser.add_argument("--starts", type=int, default=5, help="after the first one")
    run(parser.parse_args())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start, ask, stop, again and again; returns the record."""
    if options.quick:
        options.starts = 1
    seconds, cpu_seconds, peaks = [], [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings = engine_settings(options, directory)
        spec = engine_spec(settings)
        (prompt,) = RandomPrompts(spec.config.vocab_size).draw([8])
        for _ in range(1 + options.starts):
            with server_process(settings, directory / "server.log") as server:
                cpu_seconds.append(server.cpu_seconds())
                num_tokens, _ = asyncio.run(HttpClient(server.url).complete(prompt, None, 4))
                if num_tokens != 4:
                    raise RuntimeError(f"a server answered {num_tokens} tokens, not 4")
                peaks.append(server.peak_bytes())
                seconds.append(server.start_seconds)
    later = spread(seconds[1:])
    print(
        f"ready after {seconds[0]:.1f} s the first time, {later['median']:.1f} s later "
        f"(p10 {later['p10']:.1f}, p90 {later['p90']:.1f}; bar: at most {MAX_SECONDS:.0f})"
    )
    results = {
        "model": spec.config.name,
        "dtype": spec.dtype,
        "settings": changed(settings),
        "first_start_seconds": seconds[0],
        "later_start_seconds": later,
        "later_cpu_seconds": spread(cpu_seconds[1:]),
        "peak_bytes": peaks[-1],
        "bar": {"at_most": MAX_SECONDS, "holds": later["median"] <= MAX_SECONDS},
    }
    return finish("start", spec.device, options, results)


if __name__ == "__main__":
    main()
