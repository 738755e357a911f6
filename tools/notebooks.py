"""Runs the notebooks in place and writes a page of the docs from each: what `make notebooks` does.

python tools/notebooks.py            run all (minutes), then write docs/notebooks/
python tools/notebooks.py --pages    write the pages alone, from the outputs that are there
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = ROOT / "docs" / "notebooks"


def run(path: Path) -> None:
    """Executes a notebook in an empty folder and keeps its outputs, without what depends on the machine."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ |= {
        "COLUMNS": "110",
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TERM": "dumb",
    }
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata = {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [nbformat.from_dict(output) for output in _cleaned(cell.outputs)]
    nbformat.write(notebook, path)


# What packages say of themselves as they are loaded, on some machines: lines, and progress without an end of line.
NOISE = re.compile(
    r"torchao|opaque value type|install kernels|kernels-community|get_accelerator|able to detect it|autonotebook|Warning:|warnings\.warn"
)
PROGRESS = re.compile(r"(Loading|Writing) [^\n]*?\|[^\n]*?it/s\]")


def _screen(text: str) -> str:
    """What is left on a terminal once ``text`` has been written to it: a kernel has programs draw as if there were one."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\n\r]|[^\x1b\n\r]+", text):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part[0] == "\x1b":
            row = max(0, row - int(part[2:-1] or 1))
        elif part.endswith("K") and part[0] == "\x1b":
            lines[row] = ""
        elif part[0] != "\x1b":  # other escapes are colors
            before = lines[row].ljust(column)
            lines[row] = before[:column] + part + before[column + len(part) :]
            column += len(part)
    return "".join(f"{line.rstrip()}\n" for line in lines if line.strip())


def _cleaned(outputs: list[Any]) -> list[Any]:
    """Neighboring pieces of text as one, since a kernel cuts them where time falls, as they look in the end, without noise."""
    found: list[Any] = []
    for output in outputs:
        if output["output_type"] == "stream" and found and found[-1]["output_type"] == "stream":
            found[-1]["text"] += output["text"]
        else:
            found.append(dict(output, name="stdout") if output["output_type"] == "stream" else output)
    for output in found:
        if output["output_type"] == "stream":
            text = PROGRESS.sub("", output["text"])
            output["text"] = "".join(line for line in _screen(text).splitlines(True) if not NOISE.search(line))
    return [output for output in found if output["output_type"] != "stream" or output["text"]]


def page(path: Path) -> tuple[str, dict[str, str]]:
    """The Markdown of a notebook as it stands, and its images by name."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts, images = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
            continue
        shell = source.startswith(("!", "%%bash"))
        code = re.sub(r"(?m)^!", "", source.removeprefix("%%bash\n")) if shell else source
        parts.append(f"```{'bash' if shell else 'python'}\n{code}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/svg+xml" in data:
                name = f"{path.stem}-{len(images)}.svg"
                images[name] = "".join(data["image/svg+xml"])
                parts.append(f"![{cell['source'][0].lstrip('# ').strip()}]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(
        [parts[0], f"This page is `notebooks/{path.name}`, run by `make notebooks`.", *parts[1:]]
    ) + "\n", images


def main() -> None:
    for path in NOTEBOOKS:
        if "--pages" not in sys.argv:
            print(path.name, flush=True)
            run(path)
        text, images = page(path)
        PAGES.mkdir(exist_ok=True)
        for name, content in {f"{path.stem}.md": text, **images}.items():
            (PAGES / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
