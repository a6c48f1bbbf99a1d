"""What projector and Vision Remember cost, found by running them on shapes without numbers.

    t  tiles of all pictures      N = g*g  features of a tile      C  width of the ViT, L levels
    T  tokens of a row            n  vision tokens, t*p*p          d  width of the LLM

On PyTorch's meta device a tensor has a shape and no storage: a 7B's parts run in milliseconds.
tools/systems.py counts so what it has no formula for, tools/cost.py what autograd keeps.
"""
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from model import INTERACTIONS, PROJECTORS
from sela import Memory


class Shapes:
    """Projector and Vision Remember of a LLaVAVRConfig, and what they read, on the meta device.

    The batch is one sample: a token of text, all tiles without newlines, two tokens of a question.
    """

    def __init__(self, config, trains=(), tiles=1):
        sizes, d = config.sizes, config.text.hidden_size
        N, n = sizes.feature_side**2, tiles * sizes.side**2
        insertions = INTERACTIONS[config.interaction]
        with torch.device("meta"):
            self.projector = PROJECTORS[config.projector](sizes)
            self.remember = insertions(config.remember, sizes, config.window, config.join)
            self.remember.check(self.projector)
            hidden = torch.empty(sizes.levels, tiles, 1 + N, sizes.level_width)
            self.features = list(hidden[:, :, 1:])                       # without CLS
            self.x = torch.empty(n, d, requires_grad=bool(trains))
            saliency, cells = torch.empty(tiles, N), torch.empty(n, 3, dtype=torch.long)
        self.projector.requires_grad_("mm_projector" in trains)
        self.remember.requires_grad_("vision_remember" in trains)
        self.memory = Memory(self.features, saliency, cells, torch.arange(1, n + 1), self.projector)
        # these have numbers: which tokens are the question depends on them
        ids = torch.tensor([[0] + n * [data.IMAGE] + [0, 0]])            # (1, T)
        labels, lengths = torch.full_like(ids, data.IGNORE), torch.tensor([n + 3])
        self.batch = data.Batch(ids, labels, lengths, tiles=None, plans=[], record_ids=[])
        self.embedded = torch.zeros(1, n + 3, d)                         # (1, T, d)

    def project(self):
        """The projector -> (t, p*p, d)."""
        return self.projector(self.features)

    def prepare(self):
        """What all insertions do together -> what each of them reads, without numbers."""
        memory = self.remember.prepare(self.memory, self.batch, self.embedded)
        tensors = {name: value.to("meta") for name, value in memory._asdict().items()
                   if torch.is_tensor(value)}
        return memory._replace(**tensors)

    def insert(self, layer, memory):
        """The insertion before a decoder layer -> (n, d)."""
        return self.remember[str(layer)](self.x, memory)


def counted(function, *inputs):
    """-> (function(*inputs), its FLOPs as PyTorch counts them). ValueError where it needs numbers.

    Attention is counted as two matrix products, as without fused kernels.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        try:
            result = function(*inputs)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"cannot be counted on shapes alone ({reason}): write a formula in "
                             "tools/systems.py") from None
    return result, counter.get_total_flops()


def added_parameters(config):
    """How many parameters projector and Vision Remember have."""
    shapes = Shapes(config)
    added = [*shapes.projector.parameters(), *shapes.remember.parameters()]
    return sum(parameter.numel() for parameter in added)


def kept_by_a_tile(config, trains):
    """Bytes of one tile that autograd keeps of the "projector", of one "insertion" and of what all
    insertions do "together".

    In float32, and attention keeps its scores here, which fused kernels do not: it is more than
    what is kept under autocast. Not counted are weights and the tapped levels.
    """
    shapes = Shapes(config, trains, tiles=2)                     # features of one lie without gaps
    given = [*shapes.projector.parameters(), *shapes.remember.parameters(), *shapes.features]
    given = {id(tensor.untyped_storage()) for tensor in given}

    def kept(function, *inputs):
        held = []
        with saved_tensors_hooks(lambda t: held.append(t.untyped_storage()) or t, lambda t: t):
            function(*inputs)
        storages = {id(storage): storage for storage in held}            # each once
        return sum(storages[name].nbytes() for name in storages.keys() - given) // 2

    found = {"projector": kept(shapes.project)}
    if config.remember:
        found["together"] = kept(shapes.prepare)
        found["insertion"] = kept(shapes.insert, config.remember[0], shapes.prepare())
    return found
