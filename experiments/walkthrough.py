"""Runs walkthrough.ipynb without Jupyter: python experiments/walkthrough.py [OUT.ipynb] [name=value ...]

Prints what its cells print and writes the notebook with their output and pictures to OUT, by default runs/walkthrough/walkthrough.ipynb.
`name=value` replaces a variable of the cell that is tagged "parameters" (papermill's convention).
"""
import ast
import base64
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "experiments/walkthrough.ipynb"


class Tee(io.StringIO):
    """Keeps what is written and passes it on."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        self.stream.flush()
        return super().write(text)


def execute(notebook: dict, parameters: dict) -> dict:
    """The notebook with the outputs of its code cells, run in order in one namespace, as Jupyter would. What a cell raises is raised, with its number.

    Raises ValueError for a parameter that the notebook does not have.
    """
    import matplotlib.pyplot as plt
    space, cells = {"__name__": "__main__"}, []
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            out, source = Tee(sys.stdout), "".join(cell["source"])
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(source, f"<cell {number}>", "exec"), space)
            except BaseException as e:
                e.add_note(f"in cell {number} of the notebook")
                raise
            if "parameters" in cell["metadata"].get("tags", []):
                if unknown := parameters.keys() - space.keys():
                    raise ValueError(f"the notebook has no parameter {', '.join(sorted(unknown))}")
                space |= parameters
            outputs = [dict(output_type="stream", name="stdout", text=out.getvalue().splitlines(keepends=True))] if out.getvalue() else []
            cell = cell | dict(outputs=outputs + pictures(plt), execution_count=1 + sum(c["cell_type"] == "code" for c in cells))
        cells.append(cell)
    return notebook | dict(cells=cells)


def pictures(plt) -> list[dict]:
    """The open figures as a notebook keeps them; they are closed."""
    found = []
    for number in plt.get_fignums():
        png = io.BytesIO()
        plt.figure(number).savefig(png, format="png", metadata={"Software": None})
        found.append(dict(output_type="display_data", metadata={}, data={"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}))
    plt.close("all")
    return found


def main(argv: list[str]) -> None:
    out = Path(argv.pop(0)).resolve() if argv and "=" not in argv[0] else ROOT / "runs/walkthrough/walkthrough.ipynb"
    parameters = {name: ast.literal_eval(value) for name, _, value in (item.partition("=") for item in argv)}
    os.environ["MPLBACKEND"] = "Agg"
    os.chdir(ROOT)
    start = time.perf_counter()
    done = execute(json.loads(NOTEBOOK.read_text(encoding="utf-8")), parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - start:.0f} s; with its pictures: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
