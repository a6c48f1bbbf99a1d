"""Ask a trained model about pictures, and watch it answer.

    laptop:   python sample.py --preset tiny --image chart.png "What is the highest value?"
    one GPU:  python sample.py --model runs/7b/phase2 --image before.png --image after.png "What changed?"
    a talk:   python sample.py --preset tiny --image chart.png      # questions line by line; an empty line ends it
    (eight GPUs answer no single question sooner: torchrun eval.py asks many at once)
"""

import argparse
import sys
from pathlib import Path

PRESETS = ("tiny", "0.5b", "1.5b", "7b")


def load_model(folder):
    """The trained model in eval mode, on the GPU in bfloat16 if there is one, else on the CPU in float32."""
    import torch  # here and not above: a mistyped argument is answered without the wait
    from model import LLaVAVR
    model = LLaVAVR.from_pretrained(folder)
    return (model.to("cuda", torch.bfloat16) if torch.cuda.is_available() else model).eval()


def reply(model, pictures, question, max_new_tokens):
    """Print the answer piece by piece as it is generated, and return it. `question` is a text or a list of turns."""
    show = lambda row, piece: print(piece, end="", flush=True)
    text = model.generate([pictures or None], [question], max_new_tokens=max_new_tokens, on_token=show)[0]
    print()
    return text


def talk(model, pictures, max_new_tokens):
    """Question after question with all that was said before, until an empty line, the end of input or Ctrl-C."""
    turns = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return turns
        if not question:
            return turns
        asked = turns + [{"from": "human", "value": question}]
        try:
            turns = asked + [{"from": "gpt", "value": reply(model, pictures, asked, max_new_tokens)}]
        except KeyboardInterrupt:                                                # of this answer, not of the talk
            print()


def main(argv=None):
    """Answer one question, or talk if there is none; returns the answer or the turns. Raises ValueError, OSError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="left out: a conversation on standard input")
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be repeated; shown in this order")
    parser.add_argument("--preset", default="0.5b", choices=PRESETS, help="the default model is runs/<preset>/phase2")
    parser.add_argument("--model", type=Path, help="folder of a trained model")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    folder = args.model or Path("runs") / args.preset / "phase2"
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.question is not None and not args.question.strip():
        raise ValueError("the question is empty; leave it out to open a conversation")
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}; train one with: python train.py --preset {args.preset}")

    from data import load_image
    pictures = [load_image(path) for path in args.image]
    model = load_model(folder)
    if args.question is None:
        return talk(model, pictures, args.max_new_tokens)
    return reply(model, pictures, args.question, args.max_new_tokens)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: {e}")
