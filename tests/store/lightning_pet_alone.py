"""Make ``lightning_pet`` a bare package, whose import does not import Lightning with all callbacks.

The store needs torch only; a child process that shows this starts in a third of the time.
"""

import importlib.machinery
import importlib.util
import sys

_found = importlib.machinery.PathFinder.find_spec("lightning_pet")
assert _found is not None
_found.loader = None
sys.modules["lightning_pet"] = importlib.util.module_from_spec(_found)
