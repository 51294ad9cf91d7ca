"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which Linux has")

HEAD = """
import ctypes
from pathlib import Path
from xtuner_lite.models import freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if not hasattr(libc, "malloc_trim"):
    raise SystemExit(77)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

def touched(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block
"""


def mib_printed_by(code):
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=60
    )
    if done.returncode == 77:
        pytest.skip("this C library has no malloc_trim")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_holes_in_the_heap_are_given_back():
    """Every second of 20,000 blocks of 16 KiB is freed: 156 MiB of holes that a trim returns."""
    returned = mib_printed_by("""
blocks = [touched(16384) for _ in range(20_000)]
for block in blocks[::2]:
    libc.free(block)
before = resident()
freed_memory.give_back_freed_memory()
print(before - resident())
""")
    assert returned > 80


@pytest.mark.parametrize(("call", "least", "most"), [(True, 80, 200), (False, -1, 20)])
def test_large_blocks_go_back_as_they_are_freed(call, least, most):
    """100 blocks of 1 MiB between small ones that stay, after a large one raised the threshold."""
    returned = mib_printed_by(f"""
libc.free(touched(16 * 2**20))
if {call}:
    freed_memory.give_back_large_blocks_at_once()
pairs = [(touched(2**20), touched(4096)) for _ in range(100)]
before = resident()
for large, _ in pairs:
    libc.free(large)
print(before - resident())
""")
    assert least < returned < most


def test_weight_files_are_let_go_of(tmp_path):
    """64 MiB in a file, of which one tensor of 4 bytes would keep every page that was read."""
    returned = mib_printed_by(f"""
import torch
from safetensors.torch import load_file, save_file

path = {str(tmp_path / "w.safetensors")!r}
save_file({{"large": torch.ones(16 * 2**20), "small": torch.ones(1)}}, path)

def of_files():
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith("RssFile")).split()[1]) / 1024

weights = load_file(path)
model = torch.nn.Module()
model.small = torch.nn.Parameter(weights.pop("small"))
weights.pop("large").sum()
before = of_files()
freed_memory.let_go_of_weight_files(model)
assert model.small.item() == 1
print(before - of_files())
""")
    assert returned > 50
