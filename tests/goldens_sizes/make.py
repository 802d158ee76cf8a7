"""Makes this set with the real DeepSpeed: `pip install torch deepspeed safetensors`, then `python make.py [SEED [DIR]]`.

Sizes, capacities, weights and tokens are drawn from the seed, 2 for the set beside this file; DIR is where the set goes.
Run the test `goldens` on others with MOEBIUS_GOLDENS=DIR.
"""

import json
import logging
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from safetensors.torch import load_file, save_file

SEED = int(sys.argv[1]) if len(sys.argv) > 1 else 2
OUT = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
AUX = 0.7


def plan():
    """Experts, widths and the shape of the tokens of all layers."""
    r = random.Random(SEED)
    experts = r.choice([4, 6, 8, 12])
    width, ffn = r.choice([8, 12, 16, 20, 33, 64]), r.choice([7, 16, 24, 40, 65])
    shape = [r.choice([1, 2, 3]), r.choice([5, 12, 17, 32]), width]
    return experts, width, ffn, shape


EXPERTS, WIDTH, FFN, SHAPE = plan()


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, FFN), torch.nn.Linear(FFN, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def weights():
    g = torch.Generator().manual_seed(SEED * 7 + 1)
    n = lambda *s, by=0.3: torch.randn(*s, generator=g) * by
    w = {"common/wg": n(EXPERTS, WIDTH, by=1.5 / WIDTH**0.5)}
    for j in range(EXPERTS):
        w |= {
            f"common/experts.{j}.fc1.weight": n(FFN, WIDTH),
            f"common/experts.{j}.fc1.bias": n(FFN),
            f"common/experts.{j}.fc2.weight": n(WIDTH, FFN),
            f"common/experts.{j}.fc2.bias": n(WIDTH),
        }
    w |= {
        "common/mlp.fc1.weight": n(FFN, WIDTH),
        "common/mlp.fc1.bias": n(FFN),
        "common/mlp.fc2.weight": n(WIDTH, FFN),
        "common/mlp.fc2.bias": n(WIDTH),
        "common/coefficient.weight": n(2, WIDTH),
        "common/coefficient.bias": n(2),
    }
    return w


WEIGHTS = weights()


def layer_cases():
    r, out = random.Random(SEED * 3 + 5), []
    for k in (1, 2, 3):
        for residual in (False, True):
            for dtype in ("f32", "bf16"):
                for mode in ("drop", "nodrop", "eval"):
                    c = dict(
                        k=k,
                        cf=r.choice([0.25, 0.5, 0.75, 1.0, 1.1, 1.25, 2.0]),
                        eval_cf=r.choice([0.3, 0.5, 1.0, 1.7]),
                        min_cap=r.choice([0, 0, 1, 2, 4]),
                        drop=mode != "nodrop",
                        residual=residual,
                        rts=None,
                        train=mode != "eval",
                        dtype=dtype,
                        sampling=k == 2 and r.random() < 0.4,
                        jitter=r.random() < 0.3,
                    )
                    if k == 1 and c["drop"]:
                        c["rts"] = r.choice(["fcfs", "rand"])
                    c["name"] = f"{dtype}_{'residual' if residual else 'standard'}_top{k}_{mode}"
                    out.append(c)
    return out


def ep_cases():
    r, out = random.Random(SEED * 3 + 6), []
    worlds = [w for w in (2, 3, 4) if EXPERTS % w == 0]
    for k in (1, 2, 3):
        for drop in (True, False):
            w = r.choice(worlds)
            c = dict(
                k=k,
                cf=r.choice([0.5, 1.0, 1.25]),
                eval_cf=1.0,
                min_cap=r.choice([0, 2]),
                drop=drop,
                residual=r.random() < 0.5,
                rts="rand" if k == 1 and drop else None,
                train=True,
                dtype=r.choice(["f32", "f32", "bf16"]),
                sampling=False,
                jitter=False,
                world=w,
            )
            c["name"] = (
                f"ep{w}_{'residual' if c['residual'] else 'standard'}_top{k}_{'drop' if drop else 'nodrop'}_{c['dtype']}"
            )
            out.append(c)
    return out


def inputs(c, rank=0):
    """Tokens, weights of the loss, and the random numbers that the case has."""
    draw = torch.Generator().manual_seed(SEED * 1000 + sum(map(ord, c["name"])) * 16 + rank)
    tokens = SHAPE[0] * SHAPE[1]
    t = {"x": torch.randn(SHAPE, generator=draw), "R": torch.randn(SHAPE, generator=draw)}
    if c.get("world"):
        # Ranks lean towards other experts by a few units of a logit: more would saturate the softmax, and which
        # of equal probabilities DeepSpeed keeps is not defined.
        row = WEIGHTS["common/wg"][rank]
        t["x"] += 1.5 * rank * row / row.square().sum()
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
    moe = MoE(
        WIDTH,
        Mlp(),
        num_experts=EXPERTS,
        ep_size=world,
        k=c["k"],
        capacity_factor=c["cf"],
        eval_capacity_factor=c["eval_cf"],
        min_capacity=c["min_cap"],
        use_residual=c["residual"],
        noisy_gate_policy="Jitter" if c["jitter"] else None,
        drop_tokens=c["drop"],
        use_rts=c["rts"] is not None,
        top2_2nd_expert_sampling=c["sampling"],
    )
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
    moe.deepspeed_moe.gate.register_forward_hook(lambda _m, _i, result: gated.append(result))
    x = t["x"].to(dtype).requires_grad_(True)
    out, l_aux, counts = moe(x)
    loss = (out.float() * t["R"]).sum() + AUX * l_aux
    loss.backward()
    t |= {"out": out, "l_aux": l_aux.reshape(1), "grad_x": x.grad, "capacity": torch.tensor([int(gated[0][1])])}
    t |= {f"grad.{n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    t = {n: v.detach().float().contiguous() if v.is_floating_point() else v.int() for n, v in t.items()}
    t["exp_counts"] = counts.int()
    return t, dict(l_aux=l_aux.item(), loss=loss.item(), capacity=int(gated[0][1]))


def gating():
    """Gates by themselves, of all three functions."""
    r, tensors, index = random.Random(SEED * 3 + 7), {}, []
    for n in range(40):
        fn = r.choice(["top1", "top2", "topk"])
        E = r.choice([2, 3, 4, 5, 6, 7, 8, 16, 33])
        S = r.choice([1, 2, 3, 7, 16, 24, 31, 64, 100])
        drop = r.random() < 0.8
        c = dict(
            name=f"{fn}_{n}",
            fn=fn,
            S=S,
            E=E,
            cf=r.choice([0.1, 0.25, 0.5, 0.75, 1.0, 1.1, 1.25, 1.3, 1.9, 3.0]),
            min_cap=r.choice([0, 0, 0, 1, 4]),
            drop=drop,
        )
        c["min_cap"] = min(c["min_cap"], S)
        c["skew"] = r.choice([0.0, 0.5, 1.0, 3.0])
        g = torch.Generator().manual_seed(SEED * 10000 + n)
        logits = torch.randn(S, E, generator=g) * r.choice([0.1, 1.0, 3.0]) + c["skew"] * torch.linspace(1, -1, E)
        t = {"logits": logits.clone()}
        cpu = torch.device("cpu")
        k = {"top1": 1, "top2": 2}.get(fn) or r.randint(1, E)
        t["R"] = torch.randn(k, S, generator=g)
        kwargs = dict(drop_tokens=drop, sparse_routes=True)
        leaf = logits.clone().requires_grad_(True)
        if fn == "top1":
            rts = r.choice(["fcfs", "rand"]) if drop else None
            c["rts"] = rts
            if rts == "fcfs":
                t["rts_uniform"] = ((S - torch.arange(S)) / (S + 1.0))[:, None].repeat(1, E).contiguous()
            elif rts:
                t["rts_uniform"] = torch.rand(S, E, generator=g)
            if r.random() < 0.3:
                t["used_token"] = (torch.rand(S, generator=g) < 0.7).long()
                c["used"] = True
            noisy = None
            if r.random() < 0.3:
                noisy = "RSample"
                c["gum"] = True
                t["gumbel"] = -torch.log(-torch.log(torch.rand(S, E, generator=g)))
            sharded_moe.exp_selection_uniform_map[cpu] = lambda _: t["rts_uniform"]
            sharded_moe.gumbel_map[cpu] = lambda _: t["gumbel"]
            go = lambda: sharded_moe.top1gating(
                leaf.clone(),
                c["cf"],
                c["min_cap"],
                used_token=t.get("used_token"),
                noisy_gate_policy=noisy,
                use_rts=rts is not None,
                **kwargs,
            )
        elif fn == "top2":
            s = r.random() < 0.4
            if s:
                c["gum"] = True
                t["gumbel"] = -torch.log(-torch.log(torch.rand(S, E, generator=g)))
            sharded_moe.gumbel_map[cpu] = lambda _: t["gumbel"]
            # DeepSpeed adds the noise to the logits in place, so it gets a copy.
            go = lambda: sharded_moe.top2gating(leaf.clone(), c["cf"], c["min_cap"], top2_2nd_expert_sampling=s, **kwargs)
        else:
            c["k"] = k
            c["policy"] = r.choice(["probs", "position"])
            go = lambda: sharded_moe.topkgating(leaf.clone(), k, c["cf"], c["min_cap"], drop_policy=c["policy"], **kwargs)
        l_aux, cap, _, ind, loc, gates, counts = go()
        (g_aux,) = torch.autograd.grad(l_aux, leaf, retain_graph=True)
        loss = (gates * t["R"]).sum() + AUX * l_aux
        (g_all,) = torch.autograd.grad(loss, leaf)
        loc = torch.where(ind >= 0, loc, torch.zeros_like(loc))
        t |= dict(
            gates=gates,
            indices=ind,
            locations=loc,
            l_aux=l_aux.reshape(1),
            grad_logits=g_all,
            grad_logits_aux=g_aux,
            exp_counts=counts,
        )
        kept = int((ind >= 0).sum())
        c |= dict(capacity=int(cap), l_aux=l_aux.item(), routes=k, dropped=int(counts.sum()) - kept, tie_dependent=False)
        tensors |= {
            f"{c['name']}/{m}": v.detach().float().contiguous() if v.is_floating_point() else v.int().contiguous()
            for m, v in t.items()
        }
        index.append(c)
    return tensors, index


def kd():
    """The distillation term as Megatron-DeepSpeed's calculate_mos_loss computes it."""
    r, tensors, index = random.Random(SEED * 3 + 8), {}, dict(kd=[], pyramid=[], lr=[])
    for n in range(4):
        b, s, v = r.choice([1, 2, 3]), r.choice([4, 6, 9]), r.choice([5, 11, 33, 128])
        T, beta = r.choice([0.5, 1.0, 2.0, 4.0, 7.0]), r.choice([0.25, 0.5, 1.0, 2.0])
        g = torch.Generator().manual_seed(SEED * 77 + n)
        st = (torch.randn(b, s, v, generator=g) * 2).requires_grad_(True)
        te = torch.randn(b, s, v, generator=g) * 2
        loss = (
            beta
            * T
            * T
            * torch.nn.KLDivLoss(reduction="batchmean")(F.log_softmax(st / T, dim=2), F.softmax(te / T, dim=2))
            / s
        )
        loss.backward()
        m = f"kd_{n}"
        tensors |= {
            f"{m}/student": st.detach(),
            f"{m}/teacher": te,
            f"{m}/loss": loss.detach().reshape(1),
            f"{m}/grad_student": st.grad,
        }
        index["kd"].append(dict(name=m, b=b, s=s, v=v, temp=T, beta=beta, loss=loss.item()))
    return tensors, index


def start(rank, world, port):
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ |= dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    # Its own kernels for sums over processes of one machine would have to be compiled.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, rank=rank, world_size=world)


def of_rank(rank, c, port, results):
    start(rank, c["world"], port)
    tensors, facts = run(c, rank, c["world"])
    save_file(tensors, f"{results}/{rank}.safetensors", {"facts": json.dumps(facts)})


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    start(0, 1, 29500 + SEED % 100)
    index = dict(
        torch=torch.__version__,
        deepspeed=deepspeed.__version__,
        aux_weight_in_losses=AUX,
        note=f"seed {SEED}",
        gating=[],
        layer=[],
        ep=[],
    )
    t, index["gating"] = gating()
    save_file(t, OUT / "gating.safetensors")
    t, k = kd()
    save_file(t, OUT / "kd.safetensors")
    (OUT / "index_kd.json").write_text(json.dumps(k, indent=1))
    tensors = dict(WEIGHTS)
    for c in layer_cases():
        of_case, facts = run(c)
        tensors |= {f"{c['name']}/{n}": t for n, t in of_case.items()}
        index["layer"].append(c | facts | dict(shape=SHAPE, ffn=FFN, experts=EXPERTS))
    save_file(tensors, OUT / "layer.safetensors")
    tensors = {}
    for i, c in enumerate(ep_cases()):
        with tempfile.TemporaryDirectory() as results:
            mp.spawn(of_rank, (c, 29601 + SEED % 100 * 10 + i, results), nprocs=c["world"])
            for rank in range(c["world"]):
                made = load_file(f"{results}/{rank}.safetensors")
                tensors |= {f"{c['name']}/rank{rank}/{n}": t for n, t in made.items()}
        index["ep"].append(c | dict(local_experts=EXPERTS // c["world"], tokens_per_rank=SHAPE[0] * SHAPE[1]))
    save_file(tensors, OUT / "ep.safetensors")
    (OUT / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    print(
        SEED,
        "experts",
        EXPERTS,
        "width",
        WIDTH,
        "ffn",
        FFN,
        "shape",
        SHAPE,
        {k: len(index[k]) for k in ("gating", "layer", "ep")},
    )


if __name__ == "__main__":
    main()
