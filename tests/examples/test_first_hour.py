"""The notebook runs, and runs again in the folder that it left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_hour.ipynb"
SMALLEST = "ITERATIONS, PROMPTS, CLIPS, TRAIN_STEPS, SIGMAS, TEST_CLIPS, STEPS, PROMPT_COUNT = 2, 1, 2, 1, 1, 2, 1, 1"


def shown(notebook: Any) -> list[dict[str, Any]]:
    """What the cells displayed, by kind of content."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return [output.get("data", {"text/plain": output.get("text", "")}) for output in outputs]


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_it_runs_twice_in_one_folder(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    # What is replaced must be all of it: a setting of its own would stay large.
    assert {line.split(" ")[0] for line in parameters.source.splitlines() if not line.startswith("#")} == {
        name.strip(",") for name in SMALLEST.partition(" =")[0].split()
    }
    parameters.source = SMALLEST
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel(env=os.environ | {"OMP_NUM_THREADS": "1"}):
        for run in ("omninft", "omninft-2"):
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
            pages = [data["text/html"] for data in shown(notebook) if "text/html" in data]
            assert [page.count("src='data:video/mp4;base64,") for page in pages] == [1, 0, 2]
            assert "iteration 2 of 2" in pages[1]
            said = "".join(str(data.get("text/markdown", data["text/plain"])) for data in shown(notebook))
            for part in ("| sync (", f"runs/{run}/export", "base {'video_quality'"):
                assert part in said
            assert (tmp_path / "runs" / run / "report.html").is_file()
