"""functional_trainer.watchdog: what a process that hangs says, in one of its own, which exchanges with itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HANGS = """
import os, sys, time, torch
from functional_trainer import backend
from functional_trainer.watchdog import watched

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ["TORCH_FR_BUFFER_SIZE"] = "20"
torch.distributed.init_process_group("gloo")
torch.distributed.all_reduce(torch.ones(3))

def stuck():
    time.sleep(1)

with watched(0.3, sys.argv[1], 0) as alive:
    alive()
    stuck()
"""


@pytest.mark.parametrize("writable", [True, False])
def test_a_hang_says_where_also_if_the_folder_cannot_be_written(tmp_path, writable):
    folder = tmp_path if writable else tmp_path / "nope"
    command = [sys.executable, "-c", HANGS, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    said, file = done.stderr, folder / "flight-recorder-0.json"
    assert done.returncode == 0 and said.count("has not got on for 0.3 s") == 1, said
    assert "in stuck" in said and "Traceback" not in said, said
    if writable:
        assert f"rank 0 has written its last exchanges with other ranks to {file}" in said
        assert json.loads(file.read_text())["entries"]
    else:
        assert f"cannot write its last exchanges with other ranks to {file}: No such file or directory" in said
