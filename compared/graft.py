"""Another projector, or Vision Remember, on a model that was trained without.

    LLaVAVR.from_pretrained("runs/0.5b-mlp/phase2", projector="aap", side=12, remember=(1, 4))
    LLaVAVR.from_pretrained("runs/0.5b/phase2", remember=())        # taken out again

What the new architecture shares with the folder keeps its weights: those of the uncompressed MLP
fit adaptive average pooling. A part that differs in any name or shape starts fresh as a whole.
"""
from storage.weights import read_tensors

BETWEEN = ("mm_projector", "vision_remember")   # parts between the ViT and the decoder


def graft(model, folder):
    """How a folder of weights fits a model of another architecture -> (fresh, rename).

    fresh: the projector and insertions ("mm_projector", "vision_remember.4") that the folder lacks
        or holds in another shape.
    rename(key): the key itself, or None for what is not loaded: fresh parts, parts that this model
        lacks, and blocks of the ViT above the deepest level.
    """
    blocks = "vision_tower.encoder.layers"
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    stored = {key: tensor.shape for _, key, tensor in read_tensors(folder)}
    differ = {piece_of(name) for name in own | stored
              if name.startswith(BETWEEN) and own.get(name) != stored.get(name)}
    fresh = sorted(differ & {piece_of(name) for name in own})
    too_deep = [name for name in own if name.startswith(blocks) and name not in stored]
    if too_deep and any(name.startswith(blocks) for name in stored):
        raise ValueError(f"{folder} has a ViT without {too_deep[0]}: give levels that are not "
                         "deeper than those it was saved with")

    def rename(key):
        tower = "vision_tower."
        if key.startswith(tower) and model.vision_tower.rename(key.removeprefix(tower)) is None:
            return None
        return None if piece_of(key) in differ else key

    return fresh, rename


def piece_of(name):
    """vision_remember.4.down.weight -> vision_remember.4, mm_projector.0.bias -> mm_projector."""
    part, *others = name.split(".")
    return f"{part}.{others[0]}" if part == "vision_remember" else part
