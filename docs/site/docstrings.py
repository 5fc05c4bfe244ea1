"""A hook of MkDocs: the roles and literal blocks of docstrings, which are not Markdown."""

import re


def on_page_content(html: str, **_) -> str:
    html = re.sub(r':(?:func|class|meth|mod):(?=<code)', '', html)
    return re.sub(r' ?::</p>', '</p>', html)
