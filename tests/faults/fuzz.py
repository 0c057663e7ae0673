"""Coverage-guided fuzzing of the readers with atheris (`pip install atheris`; harmconvert does not depend on it).

    python -m tests.faults.fuzz 600                 # total seconds, divided among the targets of readers.py
    python -m tests.faults.fuzz 120 plan header     # only these targets

Half of the inputs are bytes that libFuzzer makes from valid files; the other half are valid documents changed by
mutating.py. Fuzzing continues after a finding. One input for each kind of complaint is kept in the folder that is
printed at the end; put it in corpus/ after the bug is fixed. The exit code is 1 if there are findings.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def fuzz(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one target in this process; the process ends afterwards."""
    import atheris

    with atheris.instrument_imports(include=["harmconvert"], enable_loader_override=False):
        from . import mutating, readers

    target = readers.TARGETS[name]
    seeds = target.seeds()
    seen: set[str] = set()

    def once(data: bytes) -> None:
        file = data[1:]
        if data[:1] < b"\x80":
            provider = atheris.FuzzedDataProvider(file)
            file = mutating.made(lambda below: provider.ConsumeIntInRange(0, below - 1), target.kind, seeds)
        if (found := readers.complaint(target, file)) is None:
            return
        kind = re.sub(r"[^\w.]+", "-", found.split(": ")[0])[:80]
        if kind not in seen:
            seen.add(kind)
            (findings / f"{name.replace(' ', '-')}--{kind}").write_bytes(file)
            print(f"FOUND {name}: {found}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(seeds):
            whole = mutating.made(None, target.kind, [seed])
            Path(folder, f"seed{index}").write_bytes(b"\xff" + whole)
            Path(folder, f"draws{index}").write_bytes(bytes(range(64)))
        for kept in readers.corpus(name):
            Path(folder, kept.name).write_bytes(b"\xff" + kept.read_bytes())
        options = ["-max_len=65536", "-timeout=60", "-rss_limit_mb=8192", "-print_final_stats=1", "-verbosity=1"]
        atheris.Setup([sys.argv[0], folder, f"-max_total_time={seconds}", *options], once)
        atheris.Fuzz()


def main(seconds: int, names: list[str]) -> int:
    """Fuzz each target in its own process, one after the other; print the numbers of inputs and the findings."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: pip install atheris")
        return 2
    from .readers import TARGETS

    names = names or list(TARGETS)
    findings = Path(tempfile.mkdtemp(prefix="findings-"))
    executed = 0
    for name in names:
        command = [sys.executable, "-m", "tests.faults.fuzz", "--one", name, str(max(seconds // len(names), 1))]
        done = subprocess.run([*command, str(findings)], capture_output=True, text=True)
        count: Any = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        executed += int(count[1]) if count else 0
        print(f"{name}: {int(count[1]) if count else 0:,} inputs, exit code {done.returncode}", flush=True)
        print("".join(line + "\n" for line in done.stdout.splitlines() if line.startswith("FOUND")), end="", flush=True)
        if done.returncode or not count:
            (findings / f"{name}--stderr").write_text(done.stderr[-20000:])
    found = sorted(path.name for path in findings.iterdir())
    print(f"{executed:,} inputs in all; {len(found)} findings in {findings}: {', '.join(found)}")
    return int(bool(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 600, sys.argv[2:]))
