"""The site that `make docs` builds: README.md, docs/, results/ and notebooks/, where they lie, and the docstrings."""

import os
import re
from pathlib import Path

from nbformat import reads, v4, writes

import famba

EXECUTED = Path(__file__).parents[1] / "build" / "executed"
WIDGET = "application/vnd.jupyter.widget-view+json"
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")  # owner/name: set where the site is published
CHAPTERS = {
    "Documentation": "docs/how-to docs/full-size docs/performance docs/design docs/differences docs/api",
    "Results": "docs/results results/claims results/similarity",
    "Notebooks": "notebooks/index notebooks/method notebooks/data notebooks/train notebooks/cost notebooks/*",
    "Project": "CONTRIBUTING CHANGELOG SECURITY",
}

project = "famba"
version = release = famba.__version__
html_title = f"famba {version}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [f"{page}.*" for page in ["README", *" ".join(CHAPTERS.values()).split()]]
exclude_patterns = [".*", "build", "famba", "tests"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # from the network
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
default_role = "code"
html_math_renderer = "mathml"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
if REPOSITORY:
    html_theme_options = {"source_repository": f"https://github.com/{REPOSITORY}", "source_branch": "main"}


def complete(app, docname, source):
    """README.md gets the table of contents, a table without a title its name, a notebook its outputs."""
    name = Path(docname).name
    if REPOSITORY:
        source[0] = source[0].replace("<this repository>", f"https://github.com/{REPOSITORY}")
    if docname == "README":
        for chapter, pages in CHAPTERS.items():
            lines = ["", "```{toctree}", ":hidden:", ":glob:", f":caption: {chapter}", *pages.split(), "```", ""]
            source[0] += "\n".join(lines)
    elif docname.startswith("results/") and not source[0].startswith("# "):
        source[0] = f"# {name.capitalize()}\n\n{source[0]}"
    elif docname.startswith("notebooks/"):
        source[0] = writes(shown(name, reads(source[0], as_version=4)))


def shown(name, notebook):
    """A notebook as executed on this machine, where that copy is of the same text, with a line that says so."""
    committed = texts(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    given = re.search(r'= "(\w+)"', cells[0].source) if cells else None  # the copy with its own first parameter
    copies = [f"{name}.ipynb", *([f"{name}-{given[1]}*.ipynb"] if given else [])]
    for path in [path for copy in copies for path in sorted(EXECUTED.glob(copy))][:1]:
        executed = reads(path.read_text(), as_version=4)
        if texts(executed) == committed:
            notebook = executed
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    state = "with its outputs" if any(cell.outputs for cell in cells) else "without outputs: it was not executed here"
    line = f"{{download}}`{name}.ipynb`, {state}."
    if REPOSITORY:
        line += f" Try it in [Colab](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb),"
        line += " after [a first cell](../docs/how-to.md#notebooks), or"
        line += f" [Binder](https://mybinder.org/v2/gh/{REPOSITORY}/main?labpath=notebooks/{name}.ipynb)."
    for output in (output for cell in cells for output in cell.outputs):
        if WIDGET in output.get("data", {}):
            output.data = {"text/markdown": "*Sliders and buttons, which work in JupyterLab.*"}
    notebook.cells.insert(1, v4.new_markdown_cell(line))
    return notebook


def texts(notebook):
    """Its source; papermill adds a cell with the parameters that it was given."""
    return [cell.source for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def setup(app):
    """Formulas become MathML, which browsers draw without a script or a font from the network."""
    from docutils.nodes import SkipNode
    from math_core import LatexToMathML

    def formula(display):
        def visit(translator, node):
            translator.body.append(LatexToMathML().convert_with_local_state(node.astext(), displaystyle=display))
            raise SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", formula(False), formula(True))
    app.connect("source-read", complete)
