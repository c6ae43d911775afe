# SPDX-License-Identifier: MIT-0
"""The book as a static site: `make book` writes it, `make test-book` tests it.

Chapters, tools, tables, tests and notebooks are found by their names; none is listed here.

    sources       a script, taken apart into headings, prose, code and regions
    prose         the text of a comment, as Markdown
    places        which page of the site shows which file, and links between them
    proofs        the tests and planted bugs of each public function
    script_pages  scripts and tests as pages
    other_pages   Markdown files, notebooks, glossary, lists of bugs and of functions
    build         the command
    conf          the settings of Sphinx
"""
