"""One LoRA step of a text MoE beside transformers + PEFT, on the same sizes, in fp32, interleaved.

    pip install torch==2.13.0 transformers==5.23.0 peft && python benchmarks/train_step.py
    python benchmarks/train_step.py --profile     # CPU-seconds of our step by function; no torch needed

Hidden 512, 8 layers, 16 experts (top 4, width 256), 2 shared experts, vocabulary 16,384; two documents of
1,024 tokens, the second half of each labelled; rank 8 on attention, dense, shared, routed experts. Each side
runs in its own process, three times in turn; the best is printed, in CPU-seconds because the machine may be
shared.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

SIZES = {
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "moe_num_experts": 16,
    "moe_k": 4,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 256,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
    "moe_layer_end_index": 7,
}
LENGTH, ROWS, RANK, STEPS = 1024, 2, 8, 3


def tokens() -> np.ndarray:
    """Random ids [rows, length]."""
    return np.random.default_rng(0).integers(16, SIZES["vocab_size"], (ROWS, LENGTH))


def measure(step: Callable[[], float]) -> None:
    """Two steps to warm up, then the best of three; prints one JSON line."""
    losses = [step(), step()]
    best_cpu = best_wall = float("inf")
    for _ in range(STEPS):
        cpu, wall = time.process_time(), time.perf_counter()
        losses.append(step())
        best_cpu = min(best_cpu, time.process_time() - cpu)
        best_wall = min(best_wall, time.perf_counter() - wall)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"cpu": best_cpu, "wall": best_wall, "mib": peak, "losses": losses}))


def profile(step: Callable[[], float]) -> None:
    """Two steps to warm up, then one by function, in CPU-seconds of all threads."""
    for _ in range(2):
        step()
    watch = cProfile.Profile(time.process_time)
    watch.runcall(step)
    pstats.Stats(watch).strip_dirs().sort_stats("tottime").print_stats(25)


def ours(then: Callable[[Callable[[], float]], None] = measure) -> None:
    """ernietune: packed documents, low-rank products apart, labelled rows only in the head."""
    from ernietune import environment

    environment.require_paddle()
    import paddle

    from ernietune.config import TrainSection
    from ernietune.data.collate import Batch
    from ernietune.lora import LoraSpec, inject
    from ernietune.models.config import ModelConfig
    from ernietune.models.decoder import CausalLM
    from ernietune.train.loop import accumulate
    from ernietune.train.optim import Optimizer
    from ernietune.train.sft import sft

    raw = {**SIZES, "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"]}
    model = CausalLM(ModelConfig.from_dict(raw, "benchmark"))
    random = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        ones = name.endswith("norm.weight")
        values = np.ones(tensor.shape) if ones else 0.02 * random.standard_normal(tensor.shape)
        tensor.set_value(paddle.to_tensor(values.astype(np.float32)))
    inject(model, LoraSpec(RANK, targets=("attention", "mlp", "shared_experts", "experts")))
    optimizer = Optimizer(model, TrainSection(output="", learning_rate=1e-4))
    ids = tokens()
    labels = np.concatenate([ids[:, 1:], np.full((ROWS, 1), -100)], axis=1)
    labels[:, : LENGTH // 2 - 1] = -100
    position = np.tile(np.arange(LENGTH), ROWS)
    batch = Batch(
        ids=ids.reshape(-1),
        labels=labels.reshape(-1),
        is_vision=np.zeros(ids.size, np.bool_),
        positions=np.repeat(position[:, None], 3, axis=1),
        visible_until=np.repeat(np.arange(1, ROWS + 1) * LENGTH, LENGTH),
        patches=np.zeros((0, 588), np.uint8),
        grids=np.zeros((0, 3), np.int64),
        samples=ROWS,
    )

    def step() -> float:
        loss, _ = accumulate(model, sft, [batch])
        optimizer.step(1e-4)
        return loss

    then(step)


def peer() -> None:
    """transformers + PEFT as their documentation has it: target_parameters for the fused experts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SIZES, use_cache=False))
    experts = [
        f"model.layers.{i}.mlp.experts.{n}" for i in range(1, 8) for n in ("gate_up_proj", "down_proj")
    ]
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linear, target_parameters=experts)
    tuned = get_peft_model(model, adapters)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor(tokens())
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100

    def step() -> float:
        loss = tuned(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    measure(step)


def main() -> None:
    """Run both sides in turn and print a table."""
    if len(sys.argv) == 2:
        {"ours": ours, "peer": peer, "--profile": lambda: ours(profile)}[sys.argv[1]]()
        return
    results: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(3):
        for side, found in results.items():
            command = [sys.executable, __file__, side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    for side, found in results.items():
        best = min(found, key=lambda r: r["cpu"])
        speed = LENGTH * ROWS / min(r["wall"] for r in found)
        print(f"{side:6} {best['cpu']:6.2f} CPU-s a step  {speed:7.0f} tok/s  peak {best['mib']:6.0f} MiB")
    ratio = min(r["cpu"] for r in results["peer"]) / min(r["cpu"] for r in results["ours"])
    print(f"peer / ours in CPU-seconds: {ratio:.2f}")


if __name__ == "__main__":
    main()
