"""What the package adds to timm before anything is done."""

import subprocess
import sys
from functools import partial

from timm_memwrap.experiments.benchmark.options import Options
from timm_memwrap.experiments.timing import Call, Row, Seconds, compare_calls

__all__ = ["measure_importing", "run"]

# What a new process writes: how long the second line took.
_TIMED = """import time
{before}
start, started = time.perf_counter(), time.process_time()
{timed}
print(time.perf_counter() - start, time.process_time() - started)
"""


def measure_importing(options: Options) -> list[Row]:
    """Times the import beside timm's, and the command's help beside the same, in new processes that time themselves."""
    shown = "import contextlib, io, timm_memwrap.cli\nwith contextlib.redirect_stdout(io.StringIO()): {}"
    calls: dict[str, Call] = {
        "import timm": partial(run, timed="import timm"),
        "import timm_memwrap after it": partial(run, before="import timm", timed="import timm_memwrap"),
        "timm-memwrap --help": partial(run, timed=shown.format("timm_memwrap.cli.main(['--help'])")),
    }
    budgets = {"timm-memwrap --help": 1.3}
    return compare_calls(calls, "import", options.rounds, budgets=budgets, clock=lambda call, device: call())


def run(timed: str, before: str = "") -> Seconds:
    """Times a line of code in a new process, after one that does not count."""
    code = _TIMED.format(before=before, timed=timed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall, process = map(float, done.stdout.split())
    return Seconds(wall, process)
