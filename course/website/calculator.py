"""The memory calculator: a page on which ``reference.memory``, translated to JavaScript, answers while one turns its knobs."""

from pathlib import Path

from course.website.javascript import translate

MODULES = ("arguments", "model_shapes", "memory.activations", "memory.recipes", "memory.breakdown", "memory.budget", "memory")

_PAGE = """\
# Memory calculator

What fills a GPU during a training step, after the formulas of [reference.memory](reference/memory.md), which run in this page: nothing is
sent anywhere. How they come about is [unit 00](lessons/00_memory_budget.md); there they are compared with measured peaks. 1 GB is 10⁹ bytes.
Not counted are the CUDA context, libraries' workspaces and what the allocator cannot use.

``````{raw} html
<form class="knobs" id="knobs" aria-label="Settings">
<label>model <select name="shape"></select></label>
<label>recipe <select name="recipe"></select></label>
<label><span>rank <b></b></span><input type="range" name="rank" min="0" max="8" value="4" data-power></label>
<label>adapted layers <select name="targets"><option value="all-linear">all linear layers</option>
<option value="q_proj,v_proj">q and v</option><option value="q_proj,k_proj,v_proj,o_proj">attention</option></select></label>
<label><span>rows in a batch <b></b></span><input type="range" name="batch" min="0" max="7" value="0" data-power></label>
<label><span>tokens in a row <b></b></span><input type="range" name="sequence" min="7" max="17" value="11" data-power></label>
<label>attention <select name="attention"><option value="fused">fused (flash)</option><option value="math">stores its scores</option></select></label>
<label>GPU <select name="card"><option value="0">none</option><option value="16">16 GB</option><option value="24">24 GB</option>
<option value="48">48 GB</option><option value="80" selected>80 GB</option><option value="141">141 GB</option></select></label>
<label class="check"><input type="checkbox" name="checkpointing"> checkpointing</label>
<label class="check"><input type="checkbox" name="padding"> rows are padded</label>
</form>
<p id="error" role="alert"></p>
<p role="status"><span id="peak"></span><br><span id="verdict"></span></p>
<div id="bars"></div>
<div class="scroll"><table id="lines"><thead><tr><th>kind of tensor</th><th>GB</th><th>how many bytes</th></tr></thead><tbody></tbody></table></div>
<noscript>This page calculates with JavaScript, which is switched off. In Python: <code>reference.memory.training_memory</code>.</noscript>
<script src="_static/python.js"></script>
<script src="memory.js"></script>
<script src="_static/calculator.js"></script>
``````
"""


def files(root: Path) -> dict[str, str]:
    """Name -> content: the page, and the formulas it loads."""
    reference = root / "reference"
    sources = {}
    for name in MODULES:
        path = reference / f"{name.replace('.', '/')}.py"
        sources[f"reference.{name}"] = path if path.exists() else reference / name.replace(".", "/") / "__init__.py"
    return {"calculator.md": _PAGE, "_extra/memory.js": translate(sources, "modules")}
