"""The tree is four storeys: no import goes up, and none sideways between stages."""

from __future__ import annotations

import ast
from pathlib import Path

import omninft

ROOT = Path(omninft.__file__).parent

GROUND = ("types", "noise", "naming", "config", "recipes", "hub", "files", "distributed", "clips", "worlds")
PROTOCOLS = ("models.protocol", "credit.protocol", "objectives.protocol")
# Formulas that two stages must compute alike: how a step is drawn, and how likely it was.
SHARED = ("rollout.solvers",)
STAGES = (
    "prompts",
    "models",
    "rollout",
    "scorers",
    "rewards",
    "credit",
    "objectives",
    "learning",
    "checkpoint",
    "export",
)
STAGES_OVER = {"rewards": ("scorers",), "export": ("models",)}
JOINERS = ("service", "pretrain", "evaluation", "gallery", "runs", "diagnose", "studies")  # over those named before
FACES = ("train", "api", "commands", "cli")

# (importing module, imported module): arrows that stand for now, each with its reason. The list only shrinks.
EXCEPTIONS: set[tuple[str, str]] = set()


def place(module: str) -> tuple[str, str]:
    """Storey and room of a module below omninft, e.g. ("stages", "credit")."""
    first = module.split(".")[0]
    if module in PROTOCOLS or module in SHARED or first in GROUND or module == "":
        return "ground", first
    for storey, rooms in (("stages", STAGES), ("joiners", JOINERS), ("faces", FACES)):
        if first in rooms:
            return storey, first
    raise AssertionError(f"omninft.{module} has no storey: name it in this test, or move it")


def allowed(importer: str, imported: str) -> bool:
    (storey, room), (other_storey, other_room) = place(importer), place(imported)
    if other_storey == "ground" or storey == "faces" or room == other_room:
        return storey != "ground" or other_storey == "ground"
    if storey == "stages":
        return other_room in STAGES_OVER.get(room, ())
    if storey == "joiners":
        return other_storey == "stages" or (
            other_storey == "joiners" and JOINERS.index(other_room) < JOINERS.index(room)
        )
    return False


def modules() -> dict[str, Path]:
    """Dotted names below omninft."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):  # the package itself hands names on, lazily
            found[name] = path
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules below omninft that a file imports anywhere, also inside functions and for types alone."""
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                targets.add(whole if whole.removeprefix("omninft.") in known else node.module)
    below = {t.removeprefix("omninft.") for t in targets if t.startswith("omninft.")}
    return below


def arrows() -> set[tuple[str, str]]:
    known = modules()
    return {(name, target) for name, path in known.items() for target in imports_of(path, set(known))}


def test_no_import_goes_up_or_sideways() -> None:
    wrong = {arrow for arrow in arrows() if not allowed(*arrow)}
    new = "\n".join(f"{a} imports {b}" for a, b in sorted(wrong - EXCEPTIONS))
    assert not new, f"arrows that go up or sideways:\n{new}"
    gone = "\n".join(map(str, sorted(EXCEPTIONS - wrong)))
    assert not gone, f"exceptions that are no longer needed, take them out:\n{gone}"


def test_the_rules_refuse_what_they_should() -> None:
    assert allowed("credit.surgery", "credit.protocol")
    assert allowed("runs.build", "models.ltx2")
    assert allowed("runs.session", "evaluation.held_out")
    assert not allowed("credit.surgery", "models.ltx2")
    assert not allowed("types", "credit.surgery")
    assert not allowed("objectives.protocol", "credit.combine")
    assert not allowed("evaluation.held_out", "runs.metrics")
    assert not allowed("learning.update", "commands.clips")


def test_the_test_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from omninft.models import ltx2\n    import omninft.train\n")
    assert imports_of(file, {"models.ltx2", "train"}) == {"models.ltx2", "train"}
