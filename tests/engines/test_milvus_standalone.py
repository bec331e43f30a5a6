"""A real server of Milvus, which listens on all interfaces: it and its client run where there is no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_standalone_server_is_read_as_the_bank_is(tmp_path: Path) -> None:
    pytest.importorskip("milvus", reason="needs the package milvus, which has a standalone server for Linux")
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    alone = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs a network namespace, which this system does not give")
    script = str(Path(__file__).with_name("standalone.py"))
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    command = [*alone, sys.executable, script, str(tmp_path)]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
