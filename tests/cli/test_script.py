import subprocess
import sys
from pathlib import Path

import pytest


def _run(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "timm_memwrap.cli", "run", *map(str, args)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that, like timm's own, knows timm only, and imports a file that lies beside it."""
    (tmp_path / "helper.py").write_text("suffix = 'resnet'\n")
    path = tmp_path / "script.py"
    path.write_text(
        "import sys\n"
        "import timm\n"
        "from helper import suffix\n"
        "if __name__ == '__main__':\n"
        "    print(timm.create_model(sys.argv[1] + suffix, num_classes=3).num_classes, sys.argv[0], sys.argv[2:])\n"
        "    sys.exit(7)\n"
    )
    return path


def test_a_script_that_knows_no_plugin_creates_our_models(script: Path) -> None:
    done = _run(script, "memwrap_test_", "--flag", "x")
    assert done.stdout.strip() == f"3 {script} ['--flag', 'x']"
    assert done.returncode == 7


@pytest.mark.parametrize("args", [[], ["absent.py"]])
def test_a_missing_script_is_said(args: list[str]) -> None:
    done = _run(*args)
    assert done.returncode == 1
    assert "SCRIPT" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_script_keeps_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('of the script')\n")
    done = _run(script)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: of the script" in done.stderr
