"""Formulas as MathML, which browsers draw by themselves: no script, no font from elsewhere, and a reader aloud can read them."""

import html
import re

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

_ALIGNED = re.compile(r"\\(begin|end)\{(?:aligned|align|gather|gathered|equation)\*?\}")


def mathml(tex: str, display: str = "inline") -> str:
    """``tex`` as MathML; as it stands, in a code element, where the converter doesn't know it."""
    known = _ALIGNED.sub(r"\\\1{align*}", tex)  # the starred environments are those that the converter knows
    try:
        converted = latex2mathml.converter.convert(known, display=display)
    except Exception:  # it raises a dozen kinds
        converted = ""
    if not converted or "<mi>\\" in converted or "<mi>&</mi>" in converted:
        return f'<code class="tex">{html.escape(tex)}</code>'
    return converted


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
