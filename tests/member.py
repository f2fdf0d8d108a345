"""One member of a process group: runs ``SCRIPT ARGUMENTS``, ``-m MODULE ARGUMENTS`` or ``-c CODE``, then ends in order.

An interpreter that ends while its process group is open is aborted now and then by the group's threads
("terminate called without an active exception"), and DeepSpeed leaves threads behind whose end takes long.
"""

import os
import runpy
import sys

first, *rest = sys.argv[1:]
sys.path[0] = os.getcwd()
if first == "-c":
    code, *sys.argv[1:] = rest
    exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})
elif first == "-m":
    sys.argv[1:] = rest[1:]
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = [first, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(first))
    runpy.run_path(first, run_name="__main__")

torch = sys.modules.get("torch")
if torch is not None and torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
