"""Where weights and training data lie by default, and the commands that fetch them."""

# Training data, by the phases of train.py.
DATA = {"1": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "2": "data/LLaVA-NeXT-Data/data",
        "si": "data/onevision-si.mix"}
DRAWN_DATA = {"1": "data/tiny/pretrain/captions.json", "2": "data/tiny/finetune"}

FETCH, FETCH_DATA, DRAW = "hf download", "hf download --repo-type dataset", "python -m tiny.draw"
HOW_TO_GET = {
    "tiny/clip": "git checkout tiny",
    "tiny/qwen2": "git checkout tiny",
    DRAWN_DATA["1"]: f"{DRAW} --out data/tiny",
    DRAWN_DATA["2"]: f"{DRAW} --out data/tiny",
    "weights/clip-vit-large-patch14-336":
        f"{FETCH} openai/clip-vit-large-patch14-336 --exclude tf_model.h5 "
        "--local-dir weights/clip-vit-large-patch14-336",
    "weights/Qwen2-0.5B-Instruct":
        f"{FETCH} Qwen/Qwen2-0.5B-Instruct --local-dir weights/Qwen2-0.5B-Instruct",
    "weights/Qwen2-1.5B-Instruct":
        f"{FETCH} Qwen/Qwen2-1.5B-Instruct --local-dir weights/Qwen2-1.5B-Instruct",
    "weights/Qwen2-7B-Instruct":
        f"{FETCH} Qwen/Qwen2-7B-Instruct --local-dir weights/Qwen2-7B-Instruct",
    DATA["1"]:
        f"{FETCH_DATA} liuhaotian/LLaVA-Pretrain --local-dir data/LLaVA-Pretrain",
    DATA["2"]:
        f'{FETCH_DATA} lmms-lab/LLaVA-NeXT-Data --include "data/*" '
        "--local-dir data/LLaVA-NeXT-Data",
    DATA["si"]:
        f"{FETCH_DATA} lmms-lab/LLaVA-OneVision-Data --local-dir data/LLaVA-OneVision-Data "
        "and list its folders in the .mix file (docs/data.md)",
}


def default_data(phase, drawn):
    """Where the data of a phase lie by default: those of phase 2 for a phase not listed."""
    places = DRAWN_DATA if drawn else DATA
    return places.get(phase, places["2"])
