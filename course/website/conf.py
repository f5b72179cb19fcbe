"""Sphinx's settings. What differs between two builds (folders, title, repository) is given by :mod:`course.website.building`."""

extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "course.website.formulas",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_static"]
language = "en"
suppress_warnings = ["myst.header"]  # a text may skip a level of headings
smartquotes = False  # texts are written with the marks that they mean

# Markdown as GitHub and Jupyter read it: no comments, targets and roles of another dialect
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_disable_syntax = ["myst_line_comment", "myst_block_break", "myst_role"]
myst_heading_anchors = 6
myst_update_mathjax = False
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

html_theme = "sphinx_book_theme"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["course.css"]
html_js_files = ["course.js"]
html_context = {"default_mode": "auto"}
html_use_index = False
html_copy_source = True
html_sourcelink_suffix = ""
html_show_sphinx = False
html_permalinks_icon = "#"
copybutton_exclude = ".linenos, .gp"
pygments_style = "friendly"
