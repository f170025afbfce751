"""Code in a process of its own whose memory is limited: what takes more is refused by the system."""
import os
import subprocess
import sys
import textwrap

_PRELUDE = """
import resource
import sys

def limit(megabytes):
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
"""


def run_limited(code, *args):
    """Lines that the code prints; `limit(megabytes)`, after its imports, is what it may take from then on."""
    result = subprocess.run(
        [sys.executable, '-c', _PRELUDE + textwrap.dedent(code), *map(str, args)], text=True, capture_output=True,
        timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
