"""Peak memory of `convert merge` on a generated model: against the largest shard and the adapter.

    python benchmarks/merge_memory.py                      # 6 GiB of weights in shards of 1 GB
    python benchmarks/merge_memory.py --gib 2 --shard-size 500MB --verify none

The model is a random Llama in bf16, written shard by shard; the adapter is LoRA on every linear
layer. The merge runs in a process of its own and reads its files without mapping them, so ru_maxrss
counts all of its memory. A second process that only imports the same modules and opens the
same tokenizer is the baseline that is taken off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HIDDEN, HEADS, KV_HEADS, MLP, VOCAB = 2560, 20, 4, 6912, 32000
PEAK = "\nimport resource; print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
BASELINE = """
import peft, torch, transformers
import xtuner_lite.export.merge
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=100,
                                     intermediate_size=64, num_attention_heads=4)).eval()
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
model(input_ids=torch.ones(4, 8, dtype=torch.int64))
"""
MERGE = """
import json
from xtuner_lite.export.merge import merge_adapter
receipt = merge_adapter({base!r}, {adapter!r}, {out!r}, max_shard_size={size!r}, verify={verify!r})
found = dict(receipt.verification)
for key in ("prompts", "tokens"):
    found.pop(key, None)
print("FOUND", json.dumps(found))
"""


def main() -> int:
    """Generates, measures, prints; returns 1 where the peak is above 1.3 x (shard + adapter)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=6.0, help="weights of the model, in GiB")
    parser.add_argument("--shard-size", default="1GB", help="of its files")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter")
    parser.add_argument("--verify", choices=("streamed", "none"), default="streamed")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        return measure(args, folder)
    finally:
        shutil.rmtree(folder)


def measure(args: argparse.Namespace, folder: Path) -> int:
    """One run in ``folder``."""
    base, adapter = folder / "base", folder / "adapter"
    layers = generate(base, adapter, int(args.gib * 2**30), args.shard_size, args.rank)
    shard = max(file.stat().st_size for file in base.glob("*.safetensors"))
    adapter_size = (adapter / "adapter_model.safetensors").stat().st_size
    baseline, _ = run(BASELINE)
    begin = time.perf_counter()
    code = MERGE.format(
        base=str(base), adapter=str(adapter), out=str(folder / "out"), size=args.shard_size,
        verify=args.verify,
    )  # fmt: skip
    peak, found = run(code)
    seconds = time.perf_counter() - begin
    over = peak - baseline
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    ratio = over / (shard + adapter_size)
    print(f"model {total / 2**30:.2f} GiB, {layers} layers, largest shard {shard / 2**20:.0f} MiB")
    print(f"adapter {adapter_size / 2**20:.0f} MiB, rank {args.rank}")
    print(f"baseline {baseline / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    print(f"above the baseline {over / 2**20:.0f} MiB = {ratio:.2f} x (largest shard + adapter)")
    print(f"{seconds:.0f} s; {found}")
    return int(ratio > 1.3)


def generate(base: Path, adapter: Path, size: int, shard_size: str, rank: int) -> int:
    """Writes the model and its adapter; returns the number of layers."""
    import torch
    from transformers import LlamaConfig

    from xtuner_lite.export.tensor_files import TensorInfo, parse_size, write_tensors
    from xtuner_lite.export.write_model import write_weights

    base.mkdir()
    adapter.mkdir()
    kv = HIDDEN // HEADS * KV_HEADS
    linears = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {
        f"{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
    }
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, round((size - 4 * VOCAB * HIDDEN) / per_layer))
    wanted = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    wanted |= {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in shapes.items()}
    wanted |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(base)  # fmt: skip
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def random(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return (noise.repeat(count // len(noise) + 1)[:count] * scale).reshape(shape)

    infos = {name: TensorInfo(name, torch.bfloat16, shape) for name, shape in wanted.items()}

    def read(name: str) -> torch.Tensor:
        shape = wanted[name]
        scale = torch.ones(shape) if len(shape) == 1 else random(shape, shape[-1] ** -0.5)
        return scale.bfloat16()

    write_weights(base, infos.values(), read, parse_size(shard_size))
    pieces = {}
    for index in range(layers):
        for name, (rows, columns) in linears.items():
            key = f"base_model.model.model.layers.{index}.{name}.lora"
            pieces[f"{key}_A.weight"] = (rank, columns)
            pieces[f"{key}_B.weight"] = (rows, rank)
    adapter_infos = [TensorInfo(n, torch.float32, s) for n, s in pieces.items()]
    file = adapter / "adapter_model.safetensors"
    write_tensors(file, adapter_infos, (random(s, 0.005) for s in pieces.values()))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rsplit(".")[-1] for name in linears}),
        "base_model_name_or_path": "generated",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return layers


def run(code: str) -> tuple[int, str]:
    """(peak resident bytes, what it found) of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code + PEAK], capture_output=True, text=True, check=False,
        cwd=HERE.parent,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return int(lines["PEAK"]) * 1024, lines.get("FOUND", "")


if __name__ == "__main__":
    sys.exit(main())
