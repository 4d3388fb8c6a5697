# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys


def test_switching_loads_neither_peft_nor_transformers():
    """Nor does it when it works; measured as the claim is made, by the import log."""
    code = (
        "import torch, shira.switch; from shira import Adapter, SparseDelta, Support;"
        "m = torch.nn.Linear(4, 4); s = shira.switch.Switch(m);"
        "d = SparseDelta(Support((4, 4), torch.tensor([1, 5])), torch.ones(2));"
        "s.load('a', Adapter({'weight': d})); s.activate('a'); s.deactivate()"
    )
    log = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    ).stderr
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines()}
    assert {"torch", "shira"} <= loaded
    assert not loaded & {"peft", "transformers", "accelerate", "typer", "rich"}
