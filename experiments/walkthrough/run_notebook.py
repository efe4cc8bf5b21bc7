"""Run walkthrough.ipynb without Jupyter.

python experiments/walkthrough/run_notebook.py [OUT.ipynb] [name=value ...]

It prints what the cells print and writes the notebook with their output and pictures to OUT, by
default runs/walkthrough/walkthrough.ipynb. The kept copy is made by
`python experiments/walkthrough/run_notebook.py experiments/walkthrough/walkthrough.ipynb`.
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
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "experiments/walkthrough/walkthrough.ipynb"


class NoParameter(ValueError):
    """A name that the cell tagged "parameters" does not assign."""


class Tee(io.StringIO):
    """Keep what is written and pass it on."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        """Write to both."""
        self.stream.write(text)
        self.stream.flush()
        return super().write(text)


def run_notebook(notebook: dict, parameters: dict) -> dict:
    """Return the notebook with the outputs of its code cells.

    They run in order in one namespace, as in Jupyter. What a cell raises is raised, with the cell's
    number. Raises NoParameter.
    """
    namespace = {"__name__": "__main__"}
    cells = []
    num_code_cells = 0
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            num_code_cells += 1
            outputs = run_cell(cell, number, namespace)
            cell = cell | dict(outputs=outputs, execution_count=num_code_cells)
            if "parameters" in cell["metadata"].get("tags", []):
                set_parameters(namespace, parameters)
        cells.append(cell)
    return notebook | dict(cells=cells)


def run_cell(cell: dict, number: int, namespace: dict) -> list[dict]:
    """Run a code cell and return its outputs: what it printed, and its pictures."""
    out = Tee(sys.stdout)
    try:
        code = compile("".join(cell["source"]), f"<cell {number}>", "exec")
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
    except BaseException as e:
        e.add_note(f"in cell {number} of the notebook")
        raise
    outputs = []
    printed = out.getvalue()
    if printed:
        lines = printed.splitlines(keepends=True)
        outputs.append(dict(output_type="stream", name="stdout", text=lines))
    return outputs + take_pictures()


def set_parameters(namespace: dict, parameters: dict) -> None:
    """Replace the variables of the cell tagged "parameters". Raises NoParameter."""
    known_names = [name for name in namespace if not name.startswith("__")]
    unknown_names = parameters.keys() - set(known_names)
    if unknown_names:
        unknown = ", ".join(sorted(unknown_names))
        known = ", ".join(known_names)
        raise NoParameter(f"the notebook has no parameter {unknown}; it has {known}")
    namespace.update(parameters)


def take_pictures() -> list[dict]:
    """Return the open figures as a notebook keeps them, and close them.

    They have 192 colors, which takes a third of the bytes.
    """
    import matplotlib.pyplot as plt
    from PIL import Image

    outputs = []
    for number in plt.get_fignums():
        drawn = io.BytesIO()
        figure = plt.figure(number)
        figure.savefig(drawn, format="png")
        image = Image.open(drawn).convert("RGB")
        image = image.quantize(192)
        png = io.BytesIO()
        image.save(png, format="png", optimize=True)
        encoded = base64.b64encode(png.getvalue())
        data = {"image/png": encoded.decode(), "text/plain": ["<Figure>"]}
        outputs.append(dict(output_type="display_data", metadata={}, data=data))
    plt.close("all")
    return outputs


def main(argv: list[str]) -> str | None:
    """Run the notebook. Return None, or what is wrong with the arguments."""
    if argv and argv[0].startswith("-"):
        return __doc__.rstrip()
    out = ROOT / "runs/walkthrough/walkthrough.ipynb"
    if argv and "=" not in argv[0]:
        out = Path(argv[0]).resolve()
        argv = argv[1:]
    parameters = {}
    try:
        for item in argv:
            name, _, value = item.partition("=")
            parameters[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        arguments = " ".join(argv)
        return (
            f"walkthrough: {arguments}: each must be name=value, the value as Python writes "
            "it: steps=20 \"folder='elsewhere'\""
        )
    if find_spec("matplotlib") is None:
        return "walkthrough: it needs matplotlib: pip install -e '.[docs]'"
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["MPLBACKEND"] = "Agg"
    os.chdir(ROOT)
    start = time.perf_counter()
    source = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    try:
        notebook = run_notebook(source, parameters)
    except NoParameter as e:
        return f"walkthrough: {e}"
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; with its pictures: {out}")


if __name__ == "__main__":
    message = main(sys.argv[1:])
    if message:
        print(message, file=sys.stderr)
        sys.exit(2)
