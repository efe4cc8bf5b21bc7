"""Runs walkthrough.ipynb without Jupyter: python experiments/walkthrough.py [OUT.ipynb] [name=value
...]

Prints what its cells print and writes the notebook with their output and pictures to OUT, by
default runs/walkthrough/walkthrough.ipynb. The kept copy is made by `python
experiments/walkthrough.py experiments/walkthrough.ipynb`. `name=value` replaces a variable of the
cell that is tagged "parameters" (papermill's convention).
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "experiments/walkthrough.ipynb"


class NoParameter(ValueError):
    """A name that the cell tagged "parameters" does not assign."""


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
    """The notebook with the outputs of its code cells, run in order in one namespace, as Jupyter
    would. What a cell raises is raised, with its number.

    Raises NoParameter.
    """
    import matplotlib.pyplot as plt

    space = {"__name__": "__main__"}
    cells = []
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            out = Tee(sys.stdout)
            source = "".join(cell["source"])
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(source, f"<cell {number}>", "exec"), space)
            except BaseException as e:
                e.add_note(f"in cell {number} of the notebook")
                raise
            if "parameters" in cell["metadata"].get("tags", []):
                known = [name for name in space if not name.startswith("__")]
                if unknown := parameters.keys() - set(known):
                    raise NoParameter(
                        f"the notebook has no parameter {', '.join(sorted(unknown))}; "
                        f"it has {', '.join(known)}"
                    )
                space |= parameters
            outputs = (
                [
                    dict(
                        output_type="stream",
                        name="stdout",
                        text=out.getvalue().splitlines(keepends=True),
                    )
                ]
                if out.getvalue()
                else []
            )
            cell = cell | dict(
                outputs=outputs + pictures(plt),
                execution_count=1 + sum(c["cell_type"] == "code" for c in cells),
            )
        cells.append(cell)
    return notebook | dict(cells=cells)


def pictures(plt) -> list[dict]:
    """The open figures as a notebook keeps them, in 192 colours, which takes a third of the bytes.
    They are closed.
    """
    from PIL import Image

    found = []
    for number in plt.get_fignums():
        drawn = io.BytesIO()
        png = io.BytesIO()
        plt.figure(number).savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(192).save(png, format="png", optimize=True)
        found.append(
            dict(
                output_type="display_data",
                metadata={},
                data={
                    "image/png": base64.b64encode(png.getvalue()).decode(),
                    "text/plain": ["<Figure>"],
                },
            )
        )
    plt.close("all")
    return found


def main(argv: list[str]) -> str | None:
    """None, or what is wrong with the arguments."""
    if argv and argv[0].startswith("-"):
        return __doc__.rstrip()
    out = (
        Path(argv.pop(0)).resolve()
        if argv and "=" not in argv[0]
        else ROOT / "runs/walkthrough/walkthrough.ipynb"
    )
    try:
        parameters = {
            name: ast.literal_eval(value)
            for name, _, value in (item.partition("=") for item in argv)
        }
    except (SyntaxError, ValueError):
        return (
            f"walkthrough: {' '.join(argv)}: each must be name=value, "
            "the value as Python writes it: steps=20 \"folder='elsewhere'\""
        )
    if find_spec("matplotlib") is None:
        return "walkthrough: it needs matplotlib: pip install -e '.[docs]'"
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["MPLBACKEND"] = "Agg"
    os.chdir(ROOT)
    start = time.perf_counter()
    try:
        done = execute(json.loads(NOTEBOOK.read_text(encoding="utf-8")), parameters)
    except NoParameter as e:
        return f"walkthrough: {e}"
    out.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - start:.0f} s; with its pictures: {out}")


if __name__ == "__main__":
    if said := main(sys.argv[1:]):
        print(said, file=sys.stderr)
        sys.exit(2)
