import errno
import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from omninft.checkpoint import store as store_module
from omninft.checkpoint.store import CheckpointStore, ensure_writable, flatten_optimizer, restore_optimizer
from omninft.types import OmniNFTError

CONFIG = {"lr": 3e-5, "rank": 32, "model": "tiny"}


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {"current": {"a": torch.full((3, 4), value)}, "old": {"a": torch.full((2,), value)}}


def save_steps(folder: Path, *steps: int, keep_last: int = 10) -> CheckpointStore:
    store = CheckpointStore(folder, keep_last)
    for step in steps:
        store.save(step, tensors(step), {"step": step}, CONFIG)
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(OmniNFTError) as caught:
        action()
    return str(caught.value)


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    payload = torch.tensor([0x7FC00123, -0x3FEDCC], dtype=torch.int32).view(torch.float32)
    base = torch.randn(6, 4, generator=generator)
    group = {
        "float32": torch.cat([special, payload]),
        "float64": torch.randn(3, dtype=torch.float64, generator=generator) * 1e-300,
        "bfloat16": torch.randint(-(2**15), 2**15, (500,), dtype=torch.int16, generator=generator).view(torch.bfloat16),
        "float16": torch.tensor([6e-8, 65504.0, math.nan], dtype=torch.float16),
        "int64": torch.tensor([2**62 + 1, -(2**63)]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "row": base[2],
        "same.memory": base,
        "parameter": nn.Parameter(base * 2),
    }
    store = CheckpointStore(tmp_path, 1)
    path = store.save(40, {"lora.current": group, "nothing": {}}, {}, CONFIG)
    assert path == tmp_path / "checkpoints" / "step-000040"
    back = store.load(path, CONFIG)
    assert back.step == 40
    assert {k: set(v) for k, v in back.tensors.items()} == {"lora.current": set(group), "nothing": set()}
    for name, tensor in group.items():
        assert bits(back.tensors["lora.current"][name]) == bits(tensor.detach()), name


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nan]
    odd_nan = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    state = {
        "floats": [*floats, odd_nan, *(random.Random(0).uniform(-1e9, 1e9) for _ in range(100))],
        "nested": {"": [{"a": None, "b": [True, False, 0, -(2**200)]}, [], {}]},
        "text": 'caf\u00e9 \u2028 "quoted" \ud83d',
    }
    store = CheckpointStore(tmp_path, 1)
    back = store.load(store.save(0, {}, state, {}), {}).state
    assert [struct.pack(">d", f) for f in back["floats"]] == [struct.pack(">d", f) for f in state["floats"]]
    assert {k: v for k, v in back.items() if k != "floats"} == {k: v for k, v in state.items() if k != "floats"}
    assert type(back["nested"][""][0]["b"][0]) is bool
    assert type(back["nested"][""][0]["b"][2]) is int
    # Standard JSON: other tools can read it.
    text = (tmp_path / "checkpoints" / "step-000000" / "state.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [0, (1, 2)]}}, "state.a.b[1] is a tuple, which JSON would not give back"),
        ({"a": {1: 2}}, "state.a: key 1 would not come back as it is; expected another str"),
        ({"a": {"__float__": "x"}}, "state.a: key '__float__' would not come back as it is"),
        ({"a": torch.zeros(1)}, "state.a is a Tensor, which JSON would not give back"),
        ({"a": {3}}, "state.a is a set"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    store = save_steps(tmp_path, 1)
    assert refused(lambda: store.save(2, {}, state, CONFIG)).startswith(message)
    assert names(tmp_path) == ["step-000001"]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    assert refused(lambda: CheckpointStore(tmp_path, 0)) == "keep_last is 0, expected at least 1"
    assert refused(lambda: store.save(-1, {}, {}, {})) == "step is -1, expected 0 or more"
    assert refused(lambda: store.save(1, {"../a": {}}, {}, {})).startswith("tensor group '../a' cannot name a file")


def test_newest_are_kept_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 9, 10, 999_999, 1_000_000, 1_000_001, keep_last=3)
    assert names(tmp_path) == ["step-1000000", "step-1000001", "step-999999"]
    assert [path.name for path in store.list_checkpoints()] == ["step-999999", "step-1000000", "step-1000001"]
    assert store.latest() == tmp_path / "checkpoints" / "step-1000001"
    assert store.warnings == []


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new", 1)
    assert store.latest() is None
    assert store.list_checkpoints() == []
    assert not (tmp_path / "new").exists()


def test_broken_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1, 2, 3, keep_last=2)
    (tmp_path / "checkpoints" / "step-000003" / "old.safetensors").unlink()
    store.save(4, tensors(4), {}, CONFIG)
    # Steps 4 and 2 are the newest two that can be loaded; 3 goes when step 2 does.
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    store.save(5, tensors(5), {}, CONFIG)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_saving_before_later_checkpoints_deletes_none_of_them(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 10, 20, 30, keep_last=3)
    store.keep_last = 1
    store.save(15, tensors(15), {}, CONFIG)
    assert names(tmp_path) == ["step-000015", "step-000020", "step-000030"]
    (warning,) = store.warnings
    assert warning.endswith("later checkpoints than step-000015, which resume prefers: step-000020, step-000030")


def test_same_step_is_replaced(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 5)
    path = store.save(5, tensors(77), {"again": True}, CONFIG)
    assert names(tmp_path) == ["step-000005"]
    back = store.load(path, CONFIG)
    assert back.state == {"again": True}
    assert torch.equal(back.tensors["old"]["a"], torch.full((2,), 77.0))


def test_killed_replacement_is_undone(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 5)
    folder = tmp_path / "checkpoints"
    (folder / "step-000005").rename(folder / ".replaced-step-000005")
    assert store.latest() == folder / "step-000005"
    assert store.load(folder / "step-000005", CONFIG).state == {"step": 5}
    shutil.copytree(folder / "step-000005", folder / ".replaced-step-000005")
    store.save(6, tensors(6), {}, CONFIG)
    assert names(tmp_path) == ["step-000005", "step-000006"]


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGES = [
    (damage("current.safetensors", lambda c: c[:-3]), "current.safetensors: truncated: found 165 bytes, expected 168"),
    (damage("current.safetensors", lambda c: b""), "current.safetensors: truncated: found 0 bytes"),
    (damage("current.safetensors", lambda c: c + b"x"), "current.safetensors: changed: found 169 bytes, expected 168"),
    (damage("current.safetensors", flipped), "current.safetensors: changed since it was written: its checksum differs"),
    (damage("state.json", lambda c: c.replace(b"2", b"3")), "state.json: changed since it was written"),
    (lambda folder: (folder / "state.json").unlink(), "state.json: cannot be read"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: cannot be read"),
    (damage("manifest.json", lambda c: c[: len(c) // 2]), "manifest.json: truncated or changed: not JSON"),
    (damage("manifest.json", lambda c: b"\xff\xfe"), "manifest.json: truncated or changed: not JSON"),
    (damage("manifest.json", lambda c: b"[]"), "manifest.json: changed since it was written"),
    (damage("manifest.json", lambda c: c.replace(b"3e-05", b"4e-05")), "manifest.json: changed since it was written"),
    (damage("manifest.json", lambda c: c.replace(b'"format": 1', b'"format": 3')), "manifest.json: changed since"),
]


@pytest.mark.parametrize(("apply", "message"), DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, apply: Callable[[Path], None], message: str
) -> None:
    store = save_steps(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "step-000002"
    apply(newest)
    assert f"{newest}/{message}" in refused(lambda: store.load(newest, CONFIG))
    assert store.latest() == tmp_path / "checkpoints" / "step-000001"
    (warning,) = store.warnings
    assert warning.startswith("skipped a checkpoint that is not whole: ")
    assert f"{newest}/{message}" in warning
    assert store.load(tmp_path / "checkpoints" / "step-000001", CONFIG).step == 1
    shutil.rmtree(newest)
    assert store.latest() is not None
    assert store.warnings == []


def test_file_with_the_name_of_a_checkpoint_is_skipped(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000002").write_text("x")
    assert store.latest() == tmp_path / "checkpoints" / "step-000001"
    assert "step-000002: no such checkpoint folder" in store.warnings[0]
    assert refused(lambda: store.load(tmp_path / "nothing", None)) == f"{tmp_path}/nothing: no such checkpoint folder"


def test_other_config_is_refused_by_field(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-000001"
    now = {"lr": 1e-4, "rank": 32, "seed": 7}
    assert refused(lambda: store.load(path, now)) == (
        f"{path}: made with another config; different fields: lr (checkpoint: 3e-05, now: 0.0001); "
        "model (checkpoint: tiny, now: absent); seed (checkpoint: absent, now: 7)"
    )
    assert store.load(path, None).state == {"step": 1}
    assert store.load(str(path), {key: str(value) for key, value in CONFIG.items()}).step == 1


def test_other_format_version_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = save_steps(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "FORMAT_VERSION", 2)
        path = store.save(2, tensors(2), {}, CONFIG)
    assert store.latest() == path
    message = refused(lambda: store.load(path, CONFIG))
    assert message.startswith(f"{path}/manifest.json: found format version 2 (written by omninft ")
    assert message.endswith("expected 1: use the version that wrote it")


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    store = save_steps(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-000001", folder / ".tmp-step-000002-0a1b2c3d")
    (folder / ".tmp-probe-00000000").write_text("x")
    (folder / "notes.txt").write_text("mine")
    assert store.latest() == folder / "step-000001"
    store.save(2, tensors(2), {}, CONFIG)
    assert names(tmp_path) == ["notes.txt", "step-000001", "step-000002"]


def failing(number: int, text: str) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, text)

    return fail


def fail_on_new(original: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """os.replace on a disk that fills up when the new checkpoint gets its name."""

    def replace(source: Path, target: Path) -> None:
        if source.name.startswith(".tmp-step"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    return replace


@pytest.mark.parametrize("step", [2, 3])  # 2 replaces a checkpoint
@pytest.mark.parametrize("broken", ["write_text", "fsync", "replace", "save_file"])
def test_full_disk_is_named_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, step: int
) -> None:
    store = save_steps(tmp_path, 1, 2)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    full = failing(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        if broken == "write_text":
            patch.setattr(Path, "write_text", full)
        elif broken == "save_file":
            patch.setattr(store_module, "save_file", full)
        else:
            patch.setattr(os, broken, fail_on_new(os.replace) if broken == "replace" else full)
        message = refused(lambda: store.save(step, tensors(9), {}, CONFIG))
    final = tmp_path / "checkpoints" / f"step-{step:06d}"
    assert message.startswith(f"{final}: the disk is full ([Errno 28] No space left on device): 1.0 MiB (10486")
    assert " needed, " in message
    assert message.endswith(" free; earlier checkpoints are intact")
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert store.latest() == tmp_path / "checkpoints" / "step-000002"
    assert store.warnings == []
    store.save(step, tensors(9), {}, CONFIG)
    assert store.load(final, CONFIG).tensors["old"]["a"].tolist() == [9, 9]


def test_write_that_the_system_cuts_off_is_named(tmp_path: Path) -> None:
    # No patch: the kernel refuses to let files grow, in whatever library writes them.
    store = save_steps(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        message = refused(lambda: store.save(2, {"current": {"a": torch.zeros(10_000)}}, {}, CONFIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"{tmp_path}/checkpoints/step-000002: cannot be written (")
    assert "File too large" in message
    assert names(tmp_path) == ["step-000001"]


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = save_steps(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 2**20))
    monkeypatch.setattr(store_module, "save_file", lambda *_: pytest.fail("wrote all the same"))
    needed = refused(lambda: store.save(2, {"current": {"a": torch.zeros(2**18)}}, {}, CONFIG))
    assert needed == f"{tmp_path}/checkpoints: 2.0 MiB (2097155 bytes) needed, 1.0 MiB (1048576 bytes) free"
    assert names(tmp_path) == ["step-000001"]


def test_ensure_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_writable(tmp_path / "a" / "b", 10)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert refused(lambda: ensure_writable(tmp_path / "a", 2**80)).startswith(f"{tmp_path}/a: {2**60:.1f} MiB")
    (tmp_path / "file").write_text("x")
    message = refused(lambda: ensure_writable(tmp_path / "file" / "run", 10))
    assert message.startswith(f"{tmp_path}/file/run: cannot be written to (")
    assert refused(lambda: ensure_writable(tmp_path / "file", 10)).startswith(f"{tmp_path}/file: cannot be written to")
    monkeypatch.setattr(Path, "write_bytes", failing(errno.EROFS, "Read-only file system"))
    assert refused(lambda: ensure_writable(tmp_path / "a", 10)) == (
        f"{tmp_path}/a: cannot be written to ([Errno 30] Read-only file system)"
    )


def test_file_in_place_of_the_run_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    store = CheckpointStore(tmp_path / "run", 1)
    assert store.latest() is None
    message = refused(lambda: store.save(1, {}, {}, {}))
    assert message.startswith(f"{tmp_path}/run/checkpoints: cannot be written to (")


def test_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = save_steps(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(errno.EBUSY, "Device or resource busy"))
        path = store.save(2, tensors(2), {}, CONFIG)
    (warning,) = store.warnings
    assert warning == f"{tmp_path}/checkpoints/step-000001: could not be deleted ([Errno 16] Device or resource busy)"
    assert store.load(path, CONFIG).step == 2
    # It lost its final name first, so it is never taken for whole; the next save removes it.
    assert store.list_checkpoints() == [path]
    store.save(3, tensors(3), {}, CONFIG)
    assert names(tmp_path) == ["step-000003"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        path = save_steps(tmp_path, 1).list_checkpoints()[0]
    finally:
        os.umask(mask)
    assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == dict.fromkeys(
        ("current.safetensors", "old.safetensors", "state.json", "manifest.json"), 0o640
    )


# One interpreter, so that torch is imported once: it forks savers, kills each in the middle of its work, and prints
# per kill what was acknowledged, what latest() found, and whether a half-written folder was left.
KILL_LOOP = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from omninft.checkpoint.store import CheckpointStore

run, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))

def save_for_ever(begin, acknowledge):
    store, step = CheckpointStore(run, keep_last=2), begin
    while True:
        tensors = {g: {"a": torch.full((64, 64), float(step)), "b": torch.tensor(step)} for g in ("current", "old")}
        # Twice: the second save replaces the first.
        for again in (False, True):
            store.save(step, tensors, {"step": step, "again": again}, {"seed": 1})
            os.write(acknowledge, step.to_bytes(8, "big"))
        step += 1

step = 0
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(step, writer)
    os.close(writer)
    acknowledged = int.from_bytes(os.read(reader, 8), "big")
    time.sleep(rng.uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 8):
        acknowledged = int.from_bytes(more, "big")
    os.close(reader)
    left = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    store = CheckpointStore(run, keep_last=2)
    path = store.latest()
    checkpoint = store.load(path, {"seed": 1})
    values = {float(v) for named in checkpoint.tensors.values() for t in named.values() for v in t.flatten()}
    print(json.dumps({"acknowledged": acknowledged, "step": checkpoint.step, "state": checkpoint.state["step"],
                      "values": sorted(values), "left": left, "warnings": store.warnings}))
    step = checkpoint.step + 1
"""


def test_killed_savers_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    kills = 8
    command = [sys.executable, "-c", KILL_LOOP, str(tmp_path), str(kills), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(store_module.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == kills
    for report in reports:
        assert report["values"] == [report["step"]]
        assert report["state"] == report["step"]
        # What save() returned for is never lost; at most the save under way is there too.
        assert report["acknowledged"] <= report["step"] <= report["acknowledged"] + 1
        assert report["warnings"] == []
    # The kills did hit saves under way, or this test shows nothing.
    assert sum(bool(report["left"]) for report in reports) >= 3
    store = CheckpointStore(tmp_path, 2)
    store.save(10**6, {}, {}, {})
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def model_and_optimizer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(dtype)
    groups = [
        {"params": list(model[0].parameters()), "lr": 1e-2, "betas": (0.8, 0.99)},
        {"params": list(model[1].parameters()), "weight_decay": 1e-4},
    ]
    return model, torch.optim.AdamW(groups, lr=3e-5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    straight, optimizer = model_and_optimizer(dtype)
    train(straight, optimizer, range(8))

    first, optimizer_a = model_and_optimizer(dtype)
    train(first, optimizer_a, range(4))
    optimizer_a.param_groups[0]["lr"] = 1e-2  # as a scheduler leaves it
    state, values = flatten_optimizer(optimizer_a)
    store = CheckpointStore(tmp_path, 1)
    path = store.save(4, {"model": first.state_dict(), "optimizer": state}, {"optimizer": values}, CONFIG)

    back = store.load(path, CONFIG)
    second, optimizer_b = model_and_optimizer(dtype)
    optimizer_b.param_groups[0]["lr"] = 99.0
    second.load_state_dict(back.tensors["model"])
    saved = {name: tensor.clone() for name, tensor in back.tensors["optimizer"].items()}
    restore_optimizer(optimizer_b, back.tensors["optimizer"], back.state["optimizer"])
    again, values_again = flatten_optimizer(optimizer_b)
    assert {name: bits(t) for name, t in again.items()} == {name: bits(t) for name, t in state.items()}
    assert values_again == values
    assert optimizer_b.param_groups[0]["betas"] == (0.8, 0.99)
    assert again["state.0.step"].dtype == torch.float32
    assert again["state.0.step"] == 4

    train(second, optimizer_b, range(4, 8))
    for one, two in zip(straight.parameters(), second.parameters(), strict=True):
        assert bits(one.detach()) == bits(two.detach())
    # The optimiser works on copies: what was loaded is as it was.
    assert all(bits(saved[name]) == bits(t) for name, t in back.tensors["optimizer"].items())


def test_state_finer_than_its_parameter_is_not_rounded() -> None:
    model, optimizer = model_and_optimizer(torch.bfloat16)
    train(model, optimizer, range(1))
    parameter = model[0].weight  # type: ignore[index]
    fine = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    optimizer.state[parameter]["exp_avg"] = fine.clone()
    state, values = flatten_optimizer(optimizer)
    _, other = model_and_optimizer(torch.bfloat16)
    restore_optimizer(other, state, values)
    assert bits(flatten_optimizer(other)[0]["state.0.exp_avg"]) == bits(fine)


def test_fresh_optimizer_has_no_state_and_restores() -> None:
    _, optimizer = model_and_optimizer()
    state, values = flatten_optimizer(optimizer)
    assert state == {}
    _, other = model_and_optimizer()
    other.param_groups[1]["lr"] = 1.0
    restore_optimizer(other, state, values)
    assert other.param_groups[1]["lr"] == 3e-5
    assert len(other.state) == 0


def test_optimizer_of_another_kind_or_shape_is_refused() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    state, values = flatten_optimizer(optimizer)

    def onto(other: torch.optim.Optimizer) -> str:
        return refused(lambda: restore_optimizer(other, state, values))

    one, two = nn.Linear(4, 8), nn.Linear(8, 2)
    assert onto(torch.optim.SGD(one.parameters(), lr=1)) == "the state is of AdamW, the optimiser is SGD"
    assert onto(torch.optim.AdamW(one.parameters())) == "the state has 2 parameter groups, the optimiser 1"
    groups: list[dict[str, Any]] = [{"params": list(one.parameters())}, {"params": [two.weight]}]
    assert onto(torch.optim.AdamW(groups)) == "parameter group 1: the state has 2 parameters, the optimiser 1"
    groups = [{"params": list(nn.Linear(5, 8).parameters())}, {"params": list(two.parameters())}]
    assert onto(torch.optim.AdamW(groups)) == "parameter 0: exp_avg has shape [8, 4], the parameter [8, 5]"


def test_optimizer_with_other_parameter_names_is_refused() -> None:
    layer = nn.Linear(3, 3, bias=False)
    state, values = flatten_optimizer(torch.optim.AdamW([("q.weight", layer.weight)]))
    other = torch.optim.AdamW([("k.weight", layer.weight)])
    message = refused(lambda: restore_optimizer(other, state, values))
    assert message == "parameter group 0: the state has q.weight, the optimiser k.weight"
    restore_optimizer(torch.optim.AdamW([layer.weight]), state, values)
