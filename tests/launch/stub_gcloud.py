"""Stands in for gcloud: two directories in $STUB are the VMs of a TPU slice, ssh is a shell there.

What is asked for is appended to $STUB/asked. $STUB/python is what each VM has for its environment's
interpreter, and $STUB/ends, if it is there, has a line for each run: "lost", for a VM that is taken
away ("lost 4": while the run on the others ends with 4), or a code for the interpreter to end with,
which it finds in $STUB/code.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

STUB = pathlib.Path(os.environ["STUB"])
ROOT = pathlib.Path(__file__).parents[2]
WORKERS = 2
STATE = STUB / "state"


def create() -> int:
    STATE.write_text("READY\n")
    for worker in range(WORKERS):
        home = STUB / f"worker{worker}"
        shutil.rmtree(home, ignore_errors=True)
        (home / "gkdjax-venv" / "bin").mkdir(parents=True)
        shutil.copy(STUB / "python", home / "gkdjax-venv" / "bin" / "python")
        # As worker_setup.sh leaves it, so that nothing is installed here.
        parts = [f"tpu {home}/gkdjax\n"]
        parts += [(ROOT / name).read_text() for name in ("setup.py", "launch/pins.txt")]
        (home / "gkdjax-venv" / "installed.txt").write_text("".join(parts))
    return 0


def describe() -> int:
    if not STATE.exists():
        print("ERROR: NOT_FOUND", file=sys.stderr)
        return 1
    print(STATE.read_text(), end="")
    return 0


def scp(source: str, destination: str) -> int:
    for worker in range(WORKERS):
        shutil.copy(source, STUB / f"worker{worker}" / destination.partition(":")[2])
    return 0


def ssh(flags: dict[str, str]) -> int:
    ends = STUB / "ends"
    if "worker_run.sh run" in flags["command"] and ends.exists():
        end, *rest = ends.read_text().splitlines()
        ends.write_text("\n".join(rest))
        if end.startswith("lost"):
            STATE.write_text("PREEMPTED\n")
            return int(end.removeprefix("lost") or 255)
        (STUB / "code").write_text(end)
    workers = range(WORKERS) if flags["worker"] == "all" else [int(flags["worker"])]
    own = json.loads((STUB / "environment.json").read_text())
    running = []
    for worker in workers:
        home = STUB / f"worker{worker}"
        environment = os.environ | own | {"HOME": str(home), "TPU_WORKER_ID": str(worker)}
        command = ["bash", "-c", flags["command"]]
        running.append(subprocess.Popen(command, cwd=home, env=environment))
    return next((code for code in [process.wait() for process in running] if code), 0)


def main(group: list[str], verb: str, *arguments: str) -> int:
    assert group == ["compute", "tpus", "tpu-vm"]
    with (STUB / "asked").open("a") as asked:
        print(verb, file=asked)
    flags = dict(a.removeprefix("--").partition("=")[::2] for a in arguments if a.startswith("--"))
    named = [a for a in arguments if not a.startswith("--")]
    if verb == "delete":
        STATE.unlink()
        return 0
    calls = {"create": create, "describe": describe, "scp": lambda: scp(*named)}
    return calls[verb]() if verb in calls else ssh(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:4], *sys.argv[4:]))
