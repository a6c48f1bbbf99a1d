"""What training, answering and reading cost here, each beside the plain way of doing the same.

    python -m tools.bench packing            # a training step without padding, and with
    python -m tools.bench transformers       # the same network and batch trained by transformers
    python -m tools.bench answers            # sixteen questions answered together, and one by one
    python -m tools.bench decoding           # the same without pictures: mostly the answers' tokens
    python -m tools.bench data               # pictures to tiles, ours and transformers'
    python -m tools.bench decode --preset 0.5b    # ms a token beside the memory floor
    python -m tools.bench products --preset 0.5b  # products by reordered weights, on a CPU
    python -m tools.bench ttft --preset 1.5b --systems mlp,aap,aap+vr --tiles 5 --layers 4
                                             # time to first token of what the paper compares
    python -m tools.bench ttft --model runs/0.5b/phase2 --task realworldqa    # real prompts
    python -m tools.bench answer --preset 0.5b --tokens 32     # whole, and by transformers
    python -m tools.bench step --preset 0.5b --count 4 --compile    # train.py's, with its MFU
    python -m tools.bench gpu                # all of this on one GPU, to results/gpu.md
    python -m tools.bench answers --preset 0.5b --layers 6    # a large model's shape on a laptop
    python -m tools.bench packing --preset 0.5b --count 8     # one GPU, bf16

Random weights, pictures and text, but with --model: nothing is downloaded. `transformers` has to be
installed for the way of that name; `answer` and `data` do without. The ways are timed in turn,
round by round, so that a machine that slows down slows all of them. Printed are the median, the
fastest and the slowest time of each, and the ratio of the medians.

What floor, parts and MFU are, tools/bench_decode.py, bench_ttft.py and bench_train.py tell. These,
and answer, end in a line of JSON.
"""
import argparse
import math
import sys

import numpy as np
import torch

import data
from compared.precision import DTYPES, add_precision, announce, reorder, to_int8
from model import PRESETS, LLaVAVRConfig
from tiny import world
from tools.bench_decode import decode, products
from tools.bench_gpu import gpu
from tools.bench_train import packing, step
from tools.bench_transformers import answer, image_processor, transformers
from tools.bench_ttft import SYSTEMS, ttft
from tools.timing import PICTURE_SIZES, build, compare, random_picture


def answers(args, pictures=True):
    """Questions about drawn pictures, answered together and one at a time."""
    model = build(args).to(DTYPES[args.precision]).eval()
    if args.int8:
        to_int8(model)
    reorder(model)
    model.read_tokenizer(args.tokenizer)
    scale = model.config.vision.image_size / 112         # drawn for tiles of 112 pixels
    images, questions = [], []
    drawings = math.ceil(args.count / args.each)
    for number in range(drawings):
        drawing = world.make_drawing(args.seed + number, "test", side=224, scale=scale)
        for qa in drawing.qa[:args.each]:                # one may have fewer questions
            images.append(drawing.image if pictures else None)
            questions.append(world.prompt(qa))
    images, questions = images[:args.count], questions[:args.count]
    count = len(questions)

    def together():
        model.generate(images, questions, args.tokens)

    def one_by_one():
        for image, question in zip(images, questions):
            model.generate([image], [question], args.tokens)
    about = "about" if pictures else "without their"
    print(f"{count} questions {about} {drawings} pictures, at most {args.tokens} tokens each")
    compare(args, {f"{count} together": together, "one by one": one_by_one}, count, "answers")


def decoding(args):
    """The same questions without their pictures: most of the time goes into decoding answers."""
    answers(args, pictures=False)


def reading(args):
    """Pictures to normalised tiles in one process, by us and by transformers if installed."""
    tile = 336
    args.device = torch.device("cpu")
    random = np.random.default_rng(args.seed)
    pictures = [random_picture(random, width, height) for width, height in PICTURE_SIZES * 2]

    def ours():
        for picture in pictures:
            plan = data.plan_image(picture.size, "a4", 12, tile)
            data.normalise(data.cut_tiles(picture, plan))

    def theirs():
        for picture in pictures:
            processor(picture, return_tensors="pt")
    ways = {"here": ours}
    try:
        processor = image_processor("a4", tile)
        ways[f"transformers' {type(processor).__name__}"] = theirs
    except ImportError:
        pass                                             # ours alone
    torch.set_num_threads(1)
    print(f"{len(pictures)} pictures, photographs to scans of 1700 x 2200, one core")
    compare(args, ways, len(pictures), "pictures")


WAYS = {"decode": decode, "products": products, "ttft": ttft, "packing": packing, "step": step,
        "transformers": transformers, "answer": answer, "answers": answers, "decoding": decoding,
        "data": reading}


def main(argv=None):
    """Read the command line, print the conditions and compare."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WAYS, "gpu"])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int,
                        help="of the decoder: fewer, to measure a large model's shape")
    parser.add_argument("--count", type=int, default=16, help="samples in a batch")
    parser.add_argument("--each", type=int, default=1, help="questions about a picture")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=800, help="decode: tokens in the cache")
    parser.add_argument("--tiles", type=int, default=5, help="ttft: of the picture, 3 to 5")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="ttft: which (all)")
    parser.add_argument("--compile", action="store_true",
                        help="step, decode: with torch.compile, too")
    parser.add_argument("--model", help="ttft: folder of a trained model, with --task")
    parser.add_argument("--task", help="ttft: the benchmark whose --count questions are asked")
    parser.add_argument("--data", default="data/eval", help="ttft: folder of the benchmarks")
    add_precision(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="tiny/qwen2", help="folder with a tokenizer.json")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)    # gpu, in tests
    parser.add_argument("--out", default="results/gpu.md", help="gpu: where the report goes")
    args = parser.parse_args(argv)
    for name in ("layers", "count", "each", "tokens", "rounds", "prompt"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.what == "gpu":
        return gpu(args.out, args.quick)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, name = PRESETS[args.preset].config, f"preset {args.preset}"
    if args.model:
        config, name = LLaVAVRConfig.read(args.model, {})[0], args.model
    print(f"tools/bench.py {args.what}, {name}, torch {torch.__version__}, "
          f"{args.device.type}, {torch.get_num_threads()} thread(s), seed {args.seed}, "
          f"{args.rounds} rounds")
    args.asked = args.precision
    args.precision = announce(args.precision, config)
    WAYS[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.bench: {error}")
