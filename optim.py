"""From gradients to new weights: clip, set the learning rate, update by AdamW or Muon.

    AdamW   p <- p - lr·(m / (√v + ε) + decay·p)        m, v: running means of g and g², bias-corrected
    Muon    p <- p - lr·(0.2·√max(rows, columns)·U Vᵀ + decay·p)    where momentum of g = U S Vᵀ

Muon keeps one moment instead of two and makes all singular values of a matrix's update about 1: directions
that the gradient hardly shows move as far as the loud ones. Newton-Schulz finds U Vᵀ by products alone. It is
for the matrices of the blocks; embedding, head, norms and biases stay with AdamW. The factor 0.2·√max gives
its update the size (root mean square) of AdamW's, so one learning rate and one decay serve both.

    python train.py --preset demo --data out/shards --out out/run --optimizer muon
    torchrun --nproc_per_node 8 train.py --data out/shards --out out/run --optimizer muon --schedule wsd
    python train.py --data out/shards --out out/run --lr 5e-4 --final_lr 0.002 --warmup 50   # XuanYuan's

A sharded matrix must be whole to be orthogonalised. The ranks deal the matrices out: each collects one,
works on it, and sends the rows back, so W ranks do 1/W of the work each, and equal gradients give the same
bits on every number of ranks. (AdamW's too, on a CPU if each rank has a multiple of 16 elements of a tensor:
torch's kernel rounds the last few otherwise.)

Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"; Liu et al. 2025, "Muon is Scalable for LLM Training" (Moonlight: decay, scale, sharding); Hu et al.
2024, MiniCPM (warmup-stable-decay); XuanYuan 2023 (settings).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adamw import adamw

# --- 1. settings and schedule -------------------------------------------------------------------------------

Schedule = Literal["cosine", "wsd", "linear"]
Kind = Literal["adamw", "muon"]


@dataclass(kw_only=True)
class OptimConfig:
    """What every stage that updates weights can set."""

    lr: float = 5e-4  # highest learning rate
    final_lr: float = 0.1  # where the schedule ends, as a share of lr
    schedule: Schedule = "cosine"  # wsd: constant, then linear over the last --decay; linear: falls at once
    warmup: int = 100  # steps of linear increase from 0; at most a tenth of all steps
    decay: float = 0.2  # wsd: share of the steps that decays
    weight_decay: float = 0.1  # of matrices; norms and biases have none
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    clip: float = 1.0  # clip the gradient to this norm; 0: never
    optimizer: Kind = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    muon_momentum: float = 0.95  # of Muon

    def __post_init__(self):
        for name in ("lr", "final_lr", "warmup", "decay", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in [0, 1)")
        for name, known in (("schedule", get_args(Schedule)), ("optimizer", get_args(Kind))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {', '.join(known)}")


def learning_rate(step: int, steps: int, cfg: OptimConfig) -> float:
    """Give the learning rate of step 0 … steps − 1: linear warmup, then as --schedule says."""
    warmup = min(cfg.warmup, steps // 10)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "wsd":
        decay = max(1, round(cfg.decay * steps))
        fallen = max(0, step + 1 - (steps - decay)) / decay
    else:
        fallen = (step - warmup) / max(1, steps - 1 - warmup)
        if cfg.schedule == "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
    return cfg.lr * (1 - (1 - cfg.final_lr) * fallen)


# --- 2. gradients ------------------------------------------------------------------------------------------


def clip_and_scale(params: Iterable[nn.Parameter], count: float, clip: float) -> float:
    """Turn gradients that are sums over `count` tokens of all ranks into clipped means; return their norm.

    The norm is that of the mean gradient before clipping. If it is not finite, nothing has been changed: the
    caller decides. Gradients may be plain tensors and DTensors of several meshes, on a GPU or offloaded. All
    ranks call this and get the same number. clip 0: never clip.

    Squares are summed by rows in fp32, which no rank cuts, and these in fp64: however rows are dealt out
    over ranks, the factor has the same bits in fp32.
    """
    grads = [p.grad for p in params if p.grad is not None]
    meshes: dict = {}
    for grad in grads:
        meshes.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(_local(grad))
    squares = 0.0
    for mesh, parts in meshes.items():
        norms = (torch.linalg.vector_norm(x, dim=1) if x.dim() == 2 else x for x in parts)
        found = torch.stack([n.double().square().sum() for n in norms]).sum()
        if mesh is not None:  # a copy's rows are cut over the last dimension
            found = found.to(mesh.device_type)
            dist.all_reduce(found, group=mesh.get_group(mesh.ndim - 1))
        squares += float(found)
    norm = math.sqrt(squares) / count
    if grads and math.isfinite(norm):
        shrink = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        torch._foreach_mul_([_local(grad) for grad in grads], shrink / count)
    return norm


def _local(x: torch.Tensor) -> torch.Tensor:
    """Give what this rank holds of a tensor; writing to it changes the tensor."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


# --- 3. optimizers -----------------------------------------------------------------------------------------


def make_optimizer(
    model: nn.Module, cfg: OptimConfig, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """AdamW, fused, or Muon for the blocks; matrices and embeddings decay, norms and biases do not.

    Frozen parameters are left out. Muon's parameters are the matrices below `layers`, so neither embedding
    nor head, tied or not, and no adapters (lora.py): of those only the product changes the model. group:
    ranks that all hold the whole model (DDP) and may share Muon's work; sharded parameters know theirs.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = [(name, p) for name, p in named if "layers" in name.split(".") and ".lora_" not in name]
    inside = {p for _, p in blocks if p.dim() == 2}
    matrices = [p for _, p in named if p in inside] if cfg.optimizer == "muon" else []
    rest = [p for _, p in named if cfg.optimizer == "adamw" or p not in inside]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=1e-8, fused=True)
    return Muon(matrices, groups, cfg.lr, cfg.weight_decay, cfg.muon_momentum, betas, group)


class Muon(torch.optim.Optimizer):
    """Muon for `matrices` (rows, columns), AdamW for the groups in `rest`: one optimizer, one lr.

    On plain tensors of one process the same bits as torch.optim.Muon(adjust_lr_fn="match_rms_adamw") and
    torch.optim.AdamW(fused=True). State of a matrix: momentum_buffer, sharded as it is; of the rest: exp_avg,
    exp_avg_sq, step. A loader may put these in place before the first step.

    Matrices may be plain or FSDP2's: rows cut over the last dimension of the mesh, copies over the one before
    it. W ranks deal out W matrices at a time; each has one whole, in bf16, plus its rows of the others: two
    times the largest matrix, and Newton-Schulz's temporaries. What dealing saves: 5 iterations on n x m
    (n ≤ m) take 5·(4n²m + 2n³) FLOPs, for all of LLaMA-2-13B 1.7e15, 4 s of an H100 at 400 TFLOP/s. Dealt,
    8 ranks take 0.5 s each, and 280 or more do one matrix each, 0.02 s; undealt, each of 1,024 ranks would
    take the whole 4 s. All ranks must have a gradient for the same matrices.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[dict],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        group: dist.ProcessGroup | None = None,
    ):
        self.group = group
        for p in matrices:
            _holders(p, group)  # refuses what it cannot handle now rather than at the first step
        groups = [{"params": matrices, "muon": True}, *({**g, "muon": False} for g in rest)]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": 1e-8}
        defaults["fused"] = True  # AdamW counts its steps where the parameter is; a loader must know that
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(group, params)
            elif params:
                self._adamw(group, params)

    def _adamw(self, group: dict, params: list[nn.Parameter]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        # each element for itself: what this rank holds is all it needs
        keys = ("exp_avg", "exp_avg_sq", "step")
        means, squares, steps = ([_local(self.state[p][key]) for p in params] for key in keys)
        beta1, beta2 = group["betas"]
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
        settings |= {"beta1": beta1, "beta2": beta2, "fused": group["fused"]}
        weights, grads = [_local(p) for p in params], [_local(p.grad) for p in params]
        adamw(weights, grads, means, squares, [], steps, amsgrad=False, maximize=False, **settings)

    def _muon(self, group: dict, params: list[nn.Parameter]) -> None:
        by_team: dict = {}
        for p in sorted(params, key=torch.numel, reverse=True):  # a round's matrices are of about one size
            by_team.setdefault((_holders(p, self.group), isinstance(p, DTensor)), []).append(p)
        for (team, _), members in by_team.items():
            size = team.size() if team else 1
            for i in range(0, len(members), size):
                self._round(group, members[i : i + size], team)

    def _round(self, group: dict, params: list[nn.Parameter], team: dist.ProcessGroup | None) -> None:
        """Update as many matrices as there are ranks in the team, or fewer."""
        beta, lr, decay = group["momentum"], group["lr"], group["weight_decay"]
        updates = []
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            grad, momentum = _local(p.grad), _local(self.state[p]["momentum_buffer"])
            momentum.lerp_(grad, 1 - beta)
            update = grad.lerp(momentum, beta).bfloat16()  # Nesterov's
            # offloaded rows travel to the device that computes; Newton-Schulz begins in bf16 anyway
            updates.append(update.to(p.device_mesh.device_type) if isinstance(p, DTensor) else update)
        if team is None or team.size() == 1:
            updates = [newton_schulz(u) for u in updates]
        elif isinstance(params[0], DTensor):
            updates = _dealt_rows(updates, [p.shape for p in params], team)
        else:
            updates = _dealt_whole(updates, team)
        for p, update in zip(params, updates, strict=True):
            mine = _local(p)
            mine.mul_(1 - lr * decay)
            mine.add_(update.to(mine.device), alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a bf16 matrix (rows, columns) near 1: U S Vᵀ -> U S' Vᵀ, about U Vᵀ.

    5 steps of s <- a·s + b·s³ + c·s⁵, which acts on S alone. The coefficients (Jordan et al. 2024) raise
    small values as fast as possible and settle nowhere: S' lies in 0.65 … 1.25 for S over 1/500 of the norm,
    lower for smaller ones.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.T if len(x) > x.shape[1] else x  # the smaller Gram matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        gram = wide @ wide.T
        poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b·XXᵀ + c·(XXᵀ)²
        wide = torch.addmm(wide, poly, wide, beta=a)
    return wide.T if len(x) > x.shape[1] else wide


def _holders(p: torch.Tensor, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Give the ranks that share the work on p: those that hold its rows, or `group` where each holds all."""
    if not isinstance(p, DTensor):
        return group
    *copies, rows = p.placements
    if rows != Shard(0) or any(c != Replicate() for c in copies):
        raise ValueError(f"Muon needs matrices cut by rows, as fully_shard does; this one is {p.placements}")
    return p.device_mesh.get_group(p.device_mesh.ndim - 1)


def _dealt_rows(
    updates: list[torch.Tensor], shapes: list[torch.Size], team: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Orthogonalise up to W matrices of which each of W ranks has rows: rank i the i-th; return own rows."""
    size, rank = team.size(), team.rank()
    rows, columns = shapes[rank] if rank < len(shapes) else (0, 0)
    chunk = -(-rows // size)  # rank r holds rows [r·chunk, (r+1)·chunk), as torch.chunk cuts
    parts = [columns * max(0, min(chunk, rows - r * chunk)) for r in range(size)]
    sent = [u.numel() for u in updates] + [0] * (size - len(updates))
    flat = torch.cat([u.flatten() for u in updates])  # my rows of each matrix, to each matrix's rank
    whole = flat.new_empty(rows * columns)  # all rows of my matrix: they arrive in the order of the ranks
    dist.all_to_all_single(whole, flat, parts, sent, group=team)
    if rows:
        whole = newton_schulz(whole.view(rows, columns)).flatten()
    dist.all_to_all_single(flat, whole, sent, parts, group=team)  # and back
    return [new.view_as(u) for new, u in zip(flat.split(sent), updates, strict=False)]


def _dealt_whole(updates: list[torch.Tensor], team: dist.ProcessGroup) -> list[torch.Tensor]:
    """Orthogonalise up to W matrices that each of W ranks has whole: rank i the i-th, for all."""
    for i, u in enumerate(updates):
        if i == team.rank():
            u.copy_(newton_schulz(u))
    for i, u in enumerate(updates):
        dist.broadcast(u, group_src=i, group=team)
    return updates
