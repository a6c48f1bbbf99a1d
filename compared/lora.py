"""LoRA: the decoder learns by small matrices beside its frozen ones, so that one GPU is enough.

    python train.py --from runs/7b/phase2 --name mine --data my.json --lora 64
    python -m tools.cost --preset 7b --world 1 --lora 64        # its memory beside the full one's

Hu et al. 2021 (arXiv:2106.09685): y = W x + alpha / rank * B A x, with W (out, in) frozen,
A (rank, in), and B (out, rank), which is zero at first.
As in LLaVA's finetune_lora.sh alpha is twice the rank (256 and 128), every linear of a decoder
layer has its A and B, and they learn ten times as fast as the rest. Not as there: no dropout.
Trained whole are the projector, as there, and Vision Remember. Saving adds B A to W: the folder is
an ordinary one.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

SCALE = 2                               # alpha / rank
LR_FACTOR = 10                          # 2e-4 beside 2e-5 in finetune_lora.sh
A, B = ".lora_a.weight", ".lora_b.weight"


class LoRALinear(nn.Module):
    """A frozen linear of the same name, with A and B beside it: (..., in) -> (..., out)."""

    def __init__(self, linear, rank):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias              # (out, in), (out,)
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)    # starts as any linear
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + SCALE * self.lora_b(self.lora_a(x))


def add(model, rank):
    """Freeze the decoder of a LLaVAVR, and put A and B of a rank beside all linears of its layers.
    ValueError for a rank above what the smallest of them can have."""
    model.language_model.requires_grad_(False)
    for layer in model.language_model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                most = min(linear.weight.shape)
                if rank > most:
                    raise ValueError(f"--lora {rank}: {name} of the decoder has a rank of at most "
                                     f"{most}: give that or less")
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, LoRALinear(linear, rank))


def lr_factor(name):
    """By what the learning rate of its part is multiplied for the parameter of this name."""
    return LR_FACTOR if name.endswith((A, B)) else 1


@torch.no_grad()
def merge(state):
    """{name: tensor} of a LLaVAVR -> the same without A and B, whose product is added to W. In
    place, or a decoder of 7B would lie in memory twice. Without LoRA nothing changes."""
    for name in [name for name in state if name.endswith(A)]:
        linear = name.removesuffix(A)
        weight = state[f"{linear}.weight"]
        a, b = state.pop(name), state.pop(f"{linear}{B}")
        weight += SCALE * (b.float() @ a.float()).to(weight.device)      # (out, in)
    return state


def trained_parameters(config, rank):
    """How many numbers A and B of all layers have. config: Qwen2Config."""
    d, ff = config.hidden_size, config.intermediate_size
    shared = config.num_key_value_heads * config.head_dim
    sides = [d + d] * 2 + [d + shared] * 2 + [d + ff] * 3                # q o, k v, gate up down
    return config.num_hidden_layers * rank * sum(sides)
