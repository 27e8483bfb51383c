"""Pages of the documentation that are played: their commands run as printed, and print what the page says.

A page is played if it has a line `<!-- play -->`, or `<!-- play, with PROGRAM -->` if nothing goes without a program.
From there on, each block of `console` is run in order on one host, in namespaces of its own (tests/pages/stage.py).
`# `, `$ ` and `NAME# ` are root's prompts there, `NAME$ ` and `me@NAME$ ` those of another machine; what is typed at
one prompt is typed in one shell. A comment `<!-- play: COMMANDS -->` runs commands that no reader sees,
`<!-- write: FILE -->` writes the next block into a file, and `<!-- not played: WHY -->` leaves out the next block.
`<!-- needs: PROGRAM -->` before either leaves it out where there is no such program. A line `…` in an output stands for
any lines. What differs from run to run (times, process IDs) is not compared.

    python -m tests.pages [PAGE ...]            write the outputs anew
    python -m tests.pages --check [PAGE ...]    show the commands that print something else
"""
