"""What only a GPU can settle, run from its list: which commands, their logs, and what is left."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import pending

TABLE = """# What only a GPU can settle

| claim | state without a GPU | command |
|---|---|---|
| one holds | not run | `PYTHONPATH=. echo first`, then `PYTHONPATH=. echo second` |
| so does another | not run | `PYTHONPATH=. echo first` (and fp16) |
| a third does not | argued | `PYTHONPATH=. sh -c "echo broken; exit 3"` |
| of data | not run | `PYTHONPATH=. ls DATA` |
| somebody looks | argued | time `kernels.conv_fwd` by hand |
| it ends | not run | `PYTHONPATH=. sh -c "sleep 60 & sleep 60"` |

## Cases not yet measured

| infer | at | `--cases 'infer '` |
"""


@pytest.fixture
def listed(tmp_path, monkeypatch):
    (tmp_path / "PENDING.md").write_text(TABLE)
    monkeypatch.setattr(pending, "PENDING", tmp_path / "PENDING.md")
    before = signal.getsignal(signal.SIGTERM)  # which the program takes for itself
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def test_each_command_runs_once_and_what_it_prints_is_kept(listed, capsys):
    assert pending.main(["--out", str(listed / "logs"), "--each", "4"]) == 1
    logs = [path.read_text() for path in sorted((listed / "logs").iterdir())]
    assert logs[0].startswith("claim: one holds\nclaim: so does another\n$ PYTHONPATH=. echo first\n\nfirst\n")
    assert "second\n" in logs[1] and "broken\n\nexit code 3" in logs[2] and "stopped, out of 4 s" in logs[3]
    out = capsys.readouterr().out.splitlines()
    assert [line[:20] for line in out[:3]] == ["01.txt: exit code 0:", "02.txt: exit code 0:", "03.txt: exit code 3:"]
    assert out[-2:] == ["by itself: somebody looks", "without --data: PYTHONPATH=. ls DATA"]


def test_who_stops_it_stops_what_it_runs(listed):
    """A command is given time to say what it has; of a process that does not listen nothing is left either."""
    said = 'trap "echo so far; exit" INT; echo begun; while true; do sleep 0.1; done'
    (listed / "PENDING.md").write_text(TABLE.partition("| one")[0] + f"| it runs | - | `PYTHONPATH=. ; {said}` |\n")
    program = f"""
import sys
from pathlib import Path
from benchmarks import pending
pending.PENDING = Path({str(listed / "PENDING.md")!r})
sys.exit(pending.main(["--out", {str(listed / "logs")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=pending.ROOT)
    log = listed / "logs" / "01.txt"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.exists() and log.read_text().endswith("\nbegun\n")):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 1
    assert log.read_text().endswith("so far\n")


def test_data_and_a_choice(listed, capsys):
    (listed / "image.png").touch()
    assert pending.main(["--out", str(listed / "logs"), "--only", "of data", "--data", str(listed)]) == 0
    (log,) = (listed / "logs").iterdir()
    assert "image.png" in log.read_text()
    assert pending.main(["--out", str(listed / "logs"), "--only", "one", "--budget", "0"]) == 1
    assert capsys.readouterr().out.count("out of time: PYTHONPATH=. echo") == 2


def test_the_list_itself():
    """Three cells a row, and commands that a shell can read."""
    found = list(pending.claims(pending.PENDING.read_text(encoding="utf-8")))
    assert any(commands for _, commands in found)
    for claim, commands in found:
        for command in commands:
            assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, (claim, command)
            programs = re.findall(r'python3 -c "(.*?)"(?=;| &&|$)', command)
            assert len(programs) == command.count("python3 -c")
            for program in programs:
                compile(program, claim, "exec")
