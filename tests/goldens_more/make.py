"""Makes this set with the real DeepSpeed: `pip install torch deepspeed safetensors`, then `python make.py`.

Beside ../goldens it holds layers whose weights and tokens are bf16, and expert-parallel layers that drop nothing, whose ranks
agree on one capacity. Weights are those of ../goldens. Random numbers are drawn here and given to DeepSpeed in place of its own.
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.multiprocessing as mp
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
WEIGHTS = {k: v for k, v in load_file(HERE / "../goldens/layer.safetensors").items() if k.startswith("common/")}
AUX, EXPERTS, WIDTH, FFN, SHAPE = 0.7, 4, 16, 24, (2, 12, 16)


def case(name, k, dtype="f32", **changes):
    base = dict(name=name, k=k, cf=1.0, eval_cf=1.0, min_cap=0, drop=True, residual=name.find("residual") >= 0, rts=None,
                train=True, dtype=dtype, sampling=False, jitter=False)
    return base | changes


LAYER = [
    case("bf16_residual_top1_fcfs", 1, "bf16", rts="fcfs", min_cap=4),
    case("bf16_standard_top1_rts_cf0.5", 1, "bf16", rts="rand", cf=0.5),
    case("bf16_residual_top1_jitter_eval", 1, "bf16", rts="fcfs", jitter=True, train=False, eval_cf=0.75),
    case("bf16_residual_top1_jitter", 1, "bf16", rts="fcfs", jitter=True),
    case("bf16_standard_top2_cf0.5", 2, "bf16", cf=0.5),
    case("bf16_residual_top2_sampled", 2, "bf16", sampling=True),
    case("bf16_residual_top2_nodrop", 2, "bf16", drop=False),
    case("bf16_standard_top3_cf0.5", 3, "bf16", cf=0.5),
    case("bf16_residual_top3_nodrop", 3, "bf16", drop=False),
    case("standard_top2_sampled_cf0.5", 2, cf=0.5, sampling=True),
    case("residual_top3_eval_cf0.25", 3, train=False, eval_cf=0.25),
    # Inputs follow from the name. With these so little is left of a sum that DeepSpeed's own result is off f64 by more than such
    # a result should be: the router's gradient where almost all tokens keep one choice, and that of the coefficients' bias.
    case("residual_top3_eval_cf0.25_lone17", 3, train=False, eval_cf=0.25),
    case("residual_top3_eval_cf0.25_lone5", 3, train=False, eval_cf=0.25),
    case("bf16_residual_top2_cancels8", 2, "bf16", drop=False),
]
EP = [
    case("ep2_residual_top1_nodrop", 1, drop=False, world=2),
    case("ep4_standard_top2_nodrop", 2, drop=False, world=4),
    case("ep2_standard_top3_nodrop", 3, drop=False, world=2),
    case("ep2_residual_top3_cf0.5", 3, cf=0.5, world=2),
]


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, FFN), torch.nn.Linear(FFN, WIDTH)

    def forward(self, x):
        return self.fc2(torch.nn.functional.gelu(self.fc1(x), approximate="tanh"))


def inputs(c, rank=0):
    """Tokens, weights of the loss, and the random numbers that the case has."""
    draw = torch.Generator().manual_seed(sum(map(ord, c["name"])) * 16 + rank)
    tokens = SHAPE[0] * SHAPE[1]
    t = {"x": torch.randn(SHAPE, generator=draw), "R": torch.randn(SHAPE, generator=draw)}
    if c.get("world"):
        # Ranks whose tokens lean towards other experts, so that their fullest experts differ.
        t["x"] += 2.0 * rank * WEIGHTS["common/wg"][rank]
    if c["rts"] == "fcfs":
        t["rts_uniform"] = ((tokens - torch.arange(tokens)) / (tokens + 1.0))[:, None].repeat(1, EXPERTS).contiguous()
    elif c["rts"]:
        t["rts_uniform"] = torch.rand(tokens, EXPERTS, generator=draw)
    if c["sampling"]:
        t["gumbel"] = -torch.log(-torch.log(torch.rand(tokens, EXPERTS, generator=draw)))
    if c["jitter"] and c["train"]:
        t["jitter"] = 0.99 + 0.02 * torch.rand(tokens, WIDTH, generator=draw)
    if c["dtype"] == "bf16":
        t["x"] = t["x"].bfloat16().float()
    return t


def run(c, rank=0, world=1):
    """What DeepSpeed makes of a rank's tokens: all tensors, and what the index says."""
    t = inputs(c, rank)
    cpu = torch.device("cpu")
    sharded_moe.exp_selection_uniform_map[cpu] = lambda _: t["rts_uniform"]
    sharded_moe.gumbel_map[cpu] = lambda _: t["gumbel"]
    sharded_moe.uniform_map[cpu] = lambda _: t["jitter"]
    moe = MoE(WIDTH, Mlp(), num_experts=EXPERTS, ep_size=world, k=c["k"], capacity_factor=c["cf"],
              eval_capacity_factor=c["eval_cf"], min_capacity=c["min_cap"], use_residual=c["residual"],
              noisy_gate_policy="Jitter" if c["jitter"] else None, drop_tokens=c["drop"], use_rts=c["rts"] is not None,
              top2_2nd_expert_sampling=c["sampling"])
    moe.set_deepspeed_parallelism()
    local = EXPERTS // world
    named = {"wg": moe.deepspeed_moe.gate.wg.weight}
    for j, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
        named |= {f"experts.{rank * local + j}.{n}": p for n, p in expert.named_parameters()}
    if c["residual"]:
        named |= {f"mlp.{n}": p for n, p in moe.mlp.named_parameters()}
        named |= {f"coefficient.{n}": p for n, p in moe.coefficient.named_parameters()}
    dtype = torch.bfloat16 if c["dtype"] == "bf16" else torch.float32
    for name, p in named.items():
        p.data.copy_(WEIGHTS[f"common/{name}"])
    moe.to(dtype).train(c["train"])
    gated = []
    moe.deepspeed_moe.gate.register_forward_hook(lambda _module, _inputs, result: gated.append(result))
    x = t["x"].to(dtype).requires_grad_(True)
    out, l_aux, counts = moe(x)
    loss = (out.float() * t["R"]).sum() + AUX * l_aux
    loss.backward()
    t |= {"out": out, "l_aux": l_aux.reshape(1), "grad_x": x.grad, "capacity": torch.tensor([int(gated[0][1])])}
    t |= {f"grad.{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    t = {n: v.detach().float().contiguous() if v.is_floating_point() else v.int() for n, v in t.items()}
    t["exp_counts"] = counts.int()
    return t, dict(l_aux=l_aux.item(), loss=loss.item(), capacity=int(gated[0][1]))


def start(rank, world, port):
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
                       LOCAL_RANK=str(rank))
    # Its own kernels for sums over processes of one machine would have to be compiled.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, rank=rank, world_size=world)


def of_rank(rank, c, port, results):
    start(rank, c["world"], port)
    tensors, facts = run(c, rank, c["world"])
    save_file(tensors, f"{results}/{rank}.safetensors", {"facts": json.dumps(facts)})


def main():
    start(0, 1, 29700)
    index = dict(torch=torch.__version__, deepspeed=deepspeed.__version__, aux_weight_in_losses=AUX,
                 note="made by make.py beside this file", layer=[], ep=[])
    tensors = dict(WEIGHTS)
    for c in LAYER:
        of_case, facts = run(c)
        tensors |= {f"{c['name']}/{n}": t for n, t in of_case.items()}
        index["layer"].append(c | facts | dict(shape=SHAPE, ffn=FFN, experts=EXPERTS))
    save_file(tensors, HERE / "layer.safetensors")
    tensors = {}
    for i, c in enumerate(EP):
        with tempfile.TemporaryDirectory() as results:
            mp.spawn(of_rank, (c, 29701 + i, results), nprocs=c["world"])
            for rank in range(c["world"]):
                made = load_file(f"{results}/{rank}.safetensors")
                tensors |= {f"{c['name']}/rank{rank}/{n}": t for n, t in made.items()}
        index["ep"].append(c | dict(local_experts=EXPERTS // c["world"], tokens_per_rank=SHAPE[0] * SHAPE[1]))
    save_file(tensors, HERE / "ep.safetensors")
    (HERE / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
