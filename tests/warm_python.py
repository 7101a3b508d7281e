"""Programs as forks of one process that has imported torch, Lightning and the command line.

Importing them takes longer than most programs that the tests run. `run` stands for `subprocess.run` of a new
interpreter: a program has its own arguments, environment and directory, ends as an interpreter does, and is
without the run-time checks of the tests. The process that forks starts with the first call and ends with the
tests; it is this file, called as a program.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
IMPORTED = ("lightning_modules.cli", "torch.distributed.fsdp", "torch.utils.tensorboard")


def run(
    script: Path | None, arguments: list[str], *, cwd: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python SCRIPT ARGUMENTS`, of the command line for None; one that takes longer is killed."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        request = {
            "script": script and str(script),
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": dict(environment),
            "timeout": timeout,
            "said": [str(path) for path in said],
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in said))


@functools.cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # which closes its standard input
    return server


def serve() -> dict[str, Any]:
    """Fork for every request and answer with the status; only forks return, with their request."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            return request
        end = time.monotonic() + request["timeout"]
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Be the program of a request, in a group of its own."""
    os.setsid()
    for number, path in enumerate([os.devnull, *request["said"]]):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    script = request["script"]
    # Lightning's launcher starts further processes by what stands here
    sys.argv = [script or str(ROOT / "lightning_modules" / "cli.py"), *request["arguments"]]
    if script is None:
        importlib.import_module("lightning_modules.cli").main()
    else:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # what forks would each touch
    become(serve())
