"""Another projector, or Vision Remember, on a model that was trained without.

    LLaVAVR.from_pretrained("runs/0.5b-mlp/phase2", projector="aap", side=12, remember=(1, 4))
    LLaVAVR.from_pretrained("runs/0.5b/phase2", remember=())        # taken out again

What the new architecture shares with the folder keeps its weights: those of the uncompressed MLP
fit adaptive average pooling. A part that differs in any name or shape starts fresh as a whole.
"""
from storage.weights import read_tensors

JOINTS = ("mm_projector", "vision_remember")    # parts that join the ViT and the decoder


def graft(model, folder):
    """How a folder of weights fits a model of another architecture -> (fresh, rename).

    fresh: names of the model's joining parts ("mm_projector", "vision_remember.4") that the folder
        does not hold in this form. rename: for storage.weights.load_weights; None for their keys,
        for parts that the model lacks, and for blocks of the ViT above the deepest level.
    """
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    stored = {key: tensor.shape for _, key, tensor in read_tensors(folder)}
    differ = [name for name in own | stored if own.get(name) != stored.get(name)]
    differ = {part_of(name) for name in differ if name.startswith(JOINTS)}
    fresh = sorted(differ & {part_of(name) for name in own})

    def rename(key):
        tower = "vision_tower."
        if key.startswith(tower) and model.vision_tower.rename(key.removeprefix(tower)) is None:
            return None
        return None if part_of(key) in differ else key

    return fresh, rename


def part_of(name):
    """vision_remember.4.down.weight -> vision_remember.4, mm_projector.0.bias -> mm_projector."""
    part, *others = name.split(".")
    return f"{part}.{others[0]}" if part == "vision_remember" else part
