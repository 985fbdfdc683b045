"""The package's public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import threading, types
import omninft

def use():
    assert isinstance(omninft.train, types.FunctionType), omninft.train
    config = omninft.load_config("omninft", ["run.iterations=1"])
    assert omninft.train.__module__ == "omninft.train", omninft.train
    return config

use()
import omninft.train                      # the module of the same name
from omninft.train import TrainResult
use()
thread = threading.Thread(target=use)
thread.start(); thread.join()
import sys
assert isinstance(sys.modules["omninft.train"], types.ModuleType)
assert omninft.train is sys.modules["omninft.train"].train
print("fine")
"""


def test_train_stays_the_function_however_often_and_wherever_it_is_used() -> None:
    made = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert made.stdout.strip() == "fine", made.stderr


def test_every_public_name_is_there() -> None:
    import omninft

    for name in omninft.__all__:
        assert getattr(omninft, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        omninft.trian  # noqa: B018
