"""Write the outputs of the pages that are played anew, or see whether they are right (`--check`)."""

from __future__ import annotations

import sys

from tests.pages.script import ROOT, agrees, played, rewritten
from tests.pages.stage import played_apart

only_check = "--check" in sys.argv
wrong = 0
for name in [word for word in sys.argv[1:] if word != "--check"] or played():
    page = ROOT / name
    results = played_apart(name)
    for step, printed in results:
        if not step.is_hidden and not agrees(step.said, printed):
            print(f"{name}: {step.command}\n{printed}")
            wrong += 1
    if not only_check:
        page.write_text(rewritten(page.read_text(encoding="utf-8"), results), encoding="utf-8")
sys.exit(1 if only_check and wrong else 0)
